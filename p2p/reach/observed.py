"""Where others see us: what peers say our address is, and what of that is believed.

Purpose: know the addresses at which a NAT shows our listening port, for hole punching.
Peers to whom a connection left from that port (`host.own_port`) are asked by libp2p's
identify, whose answer holds the address that the asker is seen at.
https://github.com/libp2p/specs/blob/master/identify/README.md

Rules
- Believed is a plain TCP address of the scope wanted, the Internet's unless told otherwise.
- Each peer has one vote. Only what most of them say is believed; of a draw, both.
- What was heard is good for `GOOD_FOR_S`; then they are asked again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput, RemoteError

from ..host.addresses import Scope, believable, is_circuit, scope_of, tcp_host
from ..host.host import Host
from ..host.own_port import OBSERVERS
from .relay_wire import MessageStream

IDENTIFY_PROTOCOL = "/ipfs/id/1.0.0"

ASK_TIMEOUT_S = 5.0
"""Seconds for all observers together to answer: two round trips, and a busy machine."""

GOOD_FOR_S = 60.0
"""How long answers are kept: a NAT forgets in minutes, and our network may change."""

MAX_TOLD = 4
"""Addresses of ours that are told to a peer, and of a peer's that are dialled."""

_log = logging.getLogger(__name__)


def believed(said: Iterable[str]) -> tuple[str, ...]:
    """Choose, of the addresses that one peer each says, those said most often. No I/O."""
    votes = Counter(said)
    most = max(votes.values(), default=0)
    return tuple(addr for addr, count in votes.items() if count == most)[:MAX_TOLD]


def of_scope(addrs: Iterable[str], innermost: Scope) -> tuple[str, ...]:
    """Choose the plain TCP addresses, names left out, that reach at least so far. No I/O."""
    found = []
    for addr in addrs:
        try:
            is_plain = addr.startswith(("/ip4/", "/ip6/")) and not is_circuit(addr)
            if is_plain and scope_of(tcp_host(addr)[0]) >= innermost:
                found.append(addr)
        except BadInput:
            continue
    return tuple(dict.fromkeys(found))[:MAX_TOLD]


class Observers:
    """The peers that see us by our listening port.

    Parameters
    ----------
    host : Host
        Ours.
    innermost : Scope
        Addresses further inside are not believed.
    """

    def __init__(self, host: Host, innermost: Scope) -> None:
        self._host = host
        self._innermost = innermost
        self._known: tuple[str, ...] = ()
        self._known_at = -GOOD_FOR_S
        self._lock = trio.Lock()

    async def own_addrs(self) -> tuple[str, ...]:
        """Return where our listening port may be dialled, as far as is known."""
        async with self._lock:
            now = trio.current_time()
            if not self._known or now - self._known_at >= GOOD_FOR_S:
                self._known = believed(await self._ask_all())
                self._known_at = now
            own = of_scope(self._host.advertised_addrs(), self._innermost)
            return tuple(dict.fromkeys((*self._known, *own)))[:MAX_TOLD]

    async def _ask_all(self) -> list[str]:
        said: list[str] = []

        async def ask(peer_id: str) -> None:
            try:
                addr = await self._ask(peer_id)
            except RemoteError as error:
                _log.debug("%s does not say where it sees us: %s", peer_id, error)
                return
            said.extend(addr)

        with trio.move_on_after(ASK_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for peer_id in dict.fromkeys(self._host.own_port.observers()[: 2 * OBSERVERS]):
                    nursery.start_soon(ask, peer_id)
        return said

    async def _ask(self, peer_id: str) -> tuple[str, ...]:
        stream = await self._host.open_stream(peer_id, IDENTIFY_PROTOCOL, ASK_TIMEOUT_S)
        try:
            answer = await MessageStream(stream).read(Identify)
        finally:
            stream.abort()
        try:
            addr = str(Multiaddr(answer.observed_addr))
        except Exception as error:  # the library raises many kinds; all mean "unreadable"
            _log.debug("%s sees us at what cannot be read: %s", peer_id, error)
            return ()
        # Without its own id at the end, and only if it is what a NAT may look like.
        return of_scope(believable([addr], told_by="127.0.0.1"), self._innermost)
