"""Getting into the network, and back into it: bootstraps, names, memory, neighbours.

Purpose
-------
`Bootstrapper` keeps a node in touch: with the peers it was given (addresses, or names
looked up in DNS), with those it remembers from earlier runs, and with those that mDNS
finds. It goes on as long as the node runs.

Rules
-----
- Given peers are tried again when they are lost, after `PAUSES_S`. When none of them
  answers, the log says so, once, and once again when one does.
- Remembered peers are tried at the start, and again whenever nobody is connected. They
  are strangers' addresses that worked once: failing is no news.
- Names are looked up at each attempt: what they mean may change.
- Two networks that did not know of each other become one when any two of their nodes
  meet: who comes new into the routing table makes us look for our own neighbourhood
  again (`Discovery.run`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import trio

from tensorswarm.store.errors import LocalError, RemoteError, TensorswarmError

from ..control.neighbours import Neighbours
from ..host.addresses import PeerAddress, is_loopback, parse_peer_address, with_peer_id
from ..host.host import Host
from .discovery import Discovery
from .dnsaddr import PREFIX, TxtLookup, parse_dnsaddr, resolve_dnsaddr, system_txt
from .file import MAX_PEERS_KEPT, DhtFile
from .mdns import Mdns

PAUSES_S = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Pauses between attempts to reach the bootstrap peers; then the last one repeats."""

REMEMBER_INTERVAL_S = 30.0
"""How often it is noted who is connected, for the next start."""

MAX_PARALLEL_MEETINGS = 16
"""Peers met at once."""

log = logging.getLogger("tensorswarm.node")


class Bootstraps:
    """The peers that a user gave: addresses, and names that stand for some.

    Parameters
    ----------
    texts : sequence of str
        Multiaddrs with ``/p2p/``, or ``/dnsaddr/<name>``.
    look_up : callable
        Asks the DNS.

    Attributes
    ----------
    peers : list of PeerAddress
        Those known so far; grows when names are looked up.
    failures : dict of str to str
        Names that could not be looked up, and why.

    Raises
    ------
    BadInput
        One of them is neither.
    """

    def __init__(self, texts: Sequence[str], look_up: TxtLookup = system_txt) -> None:
        self._look_up = look_up
        self._names = [text for text in texts if text.startswith(PREFIX)]
        for name in self._names:
            parse_dnsaddr(name)
        self._given = [parse_peer_address(text) for text in texts if text not in self._names]
        self.peers = list(self._given)
        self.failures: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._given or self._names)

    def all_on_loopback(self) -> bool:
        """Tell whether there are any, and all are on this machine."""
        addrs = [addr for peer in self._given for addr in peer.addrs]
        return bool(addrs) and not self._names and all(is_loopback(addr) for addr in addrs)

    async def resolve(self) -> None:
        """Look the names up; `peers` has the outcome, or stays as it was."""
        if not self._names:
            return
        found: list[PeerAddress] = []
        self.failures = {}
        for name in self._names:
            try:
                found += await resolve_dnsaddr(name, self._look_up)
            except RemoteError as error:
                self.failures[name] = str(error)
        if found:
            self.peers[:] = dict.fromkeys((*self._given, *found))


class Bootstrapper:
    """Keeps a node in touch with the network.

    Parameters
    ----------
    host, discovery, neighbours
        The node's parts.
    bootstraps : Bootstraps
        Whom the user gave.
    file : DhtFile, optional
        Where peers are remembered.
    mdns : Mdns, optional
        Finds peers on the local network.
    clock : callable
        Gives the time in seconds since 1970.
    """

    def __init__(
        self,
        host: Host,
        discovery: Discovery,
        neighbours: Neighbours,
        bootstraps: Bootstraps,
        *,
        file: DhtFile | None = None,
        mdns: Mdns | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._discovery = discovery
        self._neighbours = neighbours
        self._bootstraps = bootstraps
        self._file = file
        self._mdns = mdns
        self._clock = clock
        self._meetings = trio.CapacityLimiter(MAX_PARALLEL_MEETINGS)
        self._is_lost = False

    async def run(self) -> None:
        """Stay in touch until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._bootstraps:
                nursery.start_soon(self._keep_bootstrapped)
            if self._file is not None:
                nursery.start_soon(self._use_memory, self._file)
            if self._mdns is not None:
                nursery.start_soon(self._meet_the_local_network, self._mdns)

    # ---- whom the user gave

    async def _keep_bootstrapped(self) -> None:
        attempt = 0
        while True:
            await self._attempt()
            attempt = 0 if self._all_are_here() else attempt + 1
            await trio.sleep(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
            while self._all_are_here():
                self._note_touch(len(self._bootstraps.peers))  # they may have come to us
                await trio.sleep(PAUSES_S[0])

    def _all_are_here(self) -> bool:
        peers = self._bootstraps.peers
        return bool(peers) and all(self._host.is_connected(peer.peer_id) for peer in peers)

    async def _attempt(self) -> None:
        """Meet the given peers, and say what has changed."""
        await self._bootstraps.resolve()
        peers = list(self._bootstraps.peers)
        outcome = await self._discovery.bootstrap(_texts(peers))
        failed = {**self._bootstraps.failures, **outcome.failed}
        for address, reason in failed.items():
            # Said once: a peer that is down for a day is no news every minute.
            (log.debug if self._is_lost else log.warning)("bootstrap peer %s: %s", address, reason)
        if outcome.connected:
            self._note_touch(len(outcome.connected))
        elif not self._is_lost:
            log.warning("none of the bootstrap peers answers; trying again until one does")
            self._is_lost = True
        await self._meet_all(peers)

    def _note_touch(self, count: int) -> None:
        if self._is_lost:
            log.info("in touch with %d bootstrap peers again", count)
        self._is_lost = False

    # ---- whom we remember

    async def _use_memory(self, file: DhtFile) -> None:
        """Meet the peers of earlier runs when nobody is here; note who is here now."""
        try:
            while True:
                if not self._host.connected():
                    await self._try_remembered(file)
                with trio.move_on_after(REMEMBER_INTERVAL_S):
                    await trio.sleep_forever()
                await self._remember(file)
        finally:
            with trio.CancelScope(shield=True):
                await self._remember(file)

    async def _try_remembered(self, file: DhtFile) -> None:
        try:
            remembered = await trio.to_thread.run_sync(file.load_peers)
        except LocalError as error:
            log.warning("%s", error)
            return
        if remembered:
            outcome = await self._discovery.bootstrap(_texts(remembered))
            if outcome.connected:
                log.info("met %d peers of an earlier run", len(outcome.connected))
                await self._meet_all(remembered)

    async def _remember(self, file: DhtFile) -> None:
        peers = [
            PeerAddress(peer_id, addrs)
            for peer_id in self._host.connected()[:MAX_PEERS_KEPT]
            if (addrs := self._host.addrs_of(peer_id))
        ]
        if not peers:
            return
        try:
            await trio.to_thread.run_sync(file.write_peers, peers, self._clock())
        except LocalError as error:
            log.warning("%s", error)

    # ---- who is near

    async def _meet_the_local_network(self, mdns: Mdns) -> None:
        try:
            token = trio.lowlevel.current_trio_token()
            await trio.to_thread.run_sync(mdns.start, token)
        except OSError as error:
            log.info("no discovery on the local network: %s", error)
            return
        try:
            async with trio.open_nursery() as nursery:
                async for peer in mdns.found:
                    log.debug("on the local network: %s", peer.peer_id)
                    nursery.start_soon(self._meet, peer)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(mdns.close)

    # ---- meeting

    async def _meet_all(self, peers: Iterable[PeerAddress]) -> None:
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._meet, peer)

    async def _meet(self, peer: PeerAddress) -> None:
        async with self._meetings:
            try:
                await self._neighbours.meet(peer)
            except TensorswarmError as error:
                log.debug("%s is no neighbour: %s", peer.peer_id, error)


def _texts(peers: Iterable[PeerAddress]) -> list[str]:
    return [with_peer_id(addr, peer.peer_id) for peer in peers for addr in peer.addrs]
