"""Connecting to a peer at one of its addresses.

Rules
-----
- A peer is dialled once at a time; whoever else wants it waits for that.
- All addresses of a peer are tried, each a little after the one before, relays last, and
  the first connection made ends the other attempts.
- A dial goes on in the host's background when whoever wanted it is cancelled, until its
  own deadline.

Not here: which addresses may be believed (`addresses`), and whom to be connected to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, RemoteError

from .addresses import MAX_ADDRS_PER_PEER, PeerAddress, is_circuit
from .dial import cause_of, libp2p_id, resolve, usable
from .guard import GuardedPeerStore
from .own_port import OwnPort
from .stream import Errand

DIAL_STAGGER_S = 0.25
"""Head start of each address over the next (RFC 8305 says 250 ms)."""

CIRCUIT_STAGGER_S = 1.0
"""Head start of the last direct address over a relay: three slow round trips."""

CircuitDialer = Callable[[str, str], Awaitable[None]]
"""Connects to a peer, the second argument, by a circuit address, the first."""


class Dialling(Protocol):
    """What a dialer asks its host."""

    def is_connected(self, peer_id: str) -> bool:
        """Tell whether a peer is connected."""
        ...

    def addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Return where a peer may be reached, as far as is known."""
        ...

    def background(self) -> trio.Nursery:
        """Return the nursery of what outlives a call."""
        ...


class Dialer:
    """Connects a host to peers.

    Parameters
    ----------
    host : Dialling
        Whose connections they are.
    swarm, peerstore, own_port
        Of that host.

    Attributes
    ----------
    dial_circuit : CircuitDialer or None
        Dials circuit addresses; without it they cannot be.
    """

    def __init__(
        self, host: Dialling, swarm: Swarm, peerstore: GuardedPeerStore, own_port: OwnPort
    ) -> None:
        self._host = host
        self._swarm = swarm
        self._peerstore = peerstore
        self._own_port = own_port
        self._dials: dict[str, Errand[None]] = {}
        self.dial_circuit: CircuitDialer | None = None

    async def connect(self, peer: PeerAddress, timeout_s: float) -> None:
        """Connect to a peer, unless it is connected already.

        Raises
        ------
        RemoteError
            It cannot be reached; says why.
        """
        with trio.move_on_after(timeout_s):
            while not self._host.is_connected(peer.peer_id):
                others = self._dials.get(peer.peer_id)
                if others is None:
                    await self._start(peer, timeout_s).wait()
                    return
                try:
                    await others.wait()
                except RemoteError:
                    continue  # they may not have known our addresses: our own try
            return
        raise NoSource(f"cannot reach {peer.peer_id}: no answer within {timeout_s:g} s")

    def _start(self, peer: PeerAddress, timeout_s: float) -> Errand[None]:
        addrs = dict.fromkeys((*usable(peer.addrs), *self._host.addrs_of(peer.peer_id)))
        chosen = sorted(tuple(addrs)[: 2 * MAX_ADDRS_PER_PEER], key=is_circuit)
        errand = Errand(
            self._host.background(), lambda: self._dial(libp2p_id(peer.peer_id), chosen, timeout_s)
        )
        self._dials[peer.peer_id] = errand
        return errand

    async def _dial(self, peer_id: ID, addrs: Sequence[str], timeout_s: float) -> None:
        failures: list[str] = []
        connected = trio.CancelScope(deadline=trio.current_time() + timeout_s)

        async def attempt(addr: str, failed: trio.Event) -> None:
            try:
                for resolved in await resolve(addr):
                    await self._dial_one(resolved, peer_id)
                    self._peerstore.add_checked(peer_id, [addr])
                    connected.cancel()
            except Exception as error:  # libp2p's layers each have their own kinds
                failures.append(f"{addr}: {cause_of(error)}")
                failed.set()

        try:
            with connected:
                async with trio.open_nursery() as nursery:
                    for addr, following in zip(addrs, (*addrs[1:], ""), strict=False):
                        failed = trio.Event()
                        nursery.start_soon(attempt, addr, failed)
                        is_last_direct = is_circuit(following) and not is_circuit(addr)
                        with trio.move_on_after(
                            CIRCUIT_STAGGER_S if is_last_direct else DIAL_STAGGER_S
                        ):
                            await failed.wait()
        finally:
            self._dials.pop(str(peer_id), None)
        if self._host.is_connected(str(peer_id)):
            return
        if not addrs:
            raise NoSource(f"cannot reach {peer_id}: no address of it is known")
        if connected.cancelled_caught:
            failures.append(f"no answer within {timeout_s:g} s")
        raise NoSource(f"cannot reach {peer_id}: {'; '.join(failures[:3])}")

    async def _dial_one(self, addr: str, peer_id: ID) -> None:
        if not is_circuit(addr):
            if not await self._own_port.try_dial(addr, peer_id):
                await self._swarm.dial_addr(Multiaddr(addr), peer_id)
        elif self.dial_circuit is not None:
            await self.dial_circuit(addr, str(peer_id))
        else:
            raise NoSource("this host uses no relays")
