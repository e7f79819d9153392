"""Our end of the libp2p network: who we are, who is connected, streams between us.

Purpose
-------
`Host` is the one place where the node meets py-libp2p: it listens, dials, opens
streams and hands inbound ones to handlers. Peer ids, addresses and protocol names
are text; errors are ours. What has to be known of py-libp2p's insides is in
`host.guard`, what has to be known of its streams in `host.stream`.

Rules
-----
- TCP, Noise and yamux only. One connection per peer is enough; a second is not
  dialled while there is one.
- Every wait has a deadline; no method hangs on a peer.
- The first connections leave from the port that is listened on (`own_port`).
- A remote's misbehaviour never stops the host: it costs its own connection.
- Closing takes less than two seconds, whatever the peers do.

What it does not do: find peers (`discovery`), decide whom to be connected to, keep
connections alive, or measure them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.identity.identify_push.identify_push import push_identify_to_peers
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.tools.anyio_service.trio_manager import TrioManager
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput, LocalError, NoSource, RemoteError, TensorswarmError

from . import guard as host_guard
from .addresses import (
    MAX_ADDRS_PER_PEER,
    PeerAddress,
    advertised,
    parse_listen,
    parse_peer_address,
    plain,
    with_peer_id,
)
from .dial import addr_text, cause_of, interfaces, libp2p_id, usable
from .dialer import CircuitDialer, Dialer
from .door import Door
from .goodbye import end, end_all
from .own_port import OwnPort
from .stream import Errand, Stream

__all__ = ["Handler", "Host", "Stream"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 900
"""Connections in all: each is an open file, and 1,024 of those is the usual limit."""

CONNECT_TIMEOUT_S = 10.0
"""Default time to connect to a peer, in seconds."""

STREAM_TIMEOUT_S = 10.0
"""Default time to open a stream, in seconds."""

CLOSE_TIMEOUT_S = 1.5
"""Time for closing the host, in seconds; then whatever is left is cut."""

WATCH_INTERVAL_S = 1.0
"""How often buffers are measured: a peer at 200 MB/s overshoots by that much."""

MAX_BUFFERED_BYTES = 64 << 20
"""Received and unread bytes of one connection: four streams with full windows."""

FORGET_INTERVAL_S = 600.0
"""How often expired peers are forgotten, in seconds."""

Handler = Callable[[str, Stream], Awaitable[None]]


class Host:
    """A libp2p host. Use as ``async with Host(...) as host``.

    Parameters
    ----------
    key_pair : KeyPair, optional
        The identity; a new one by default.
    listen : sequence of str
        Addresses to listen on, as `addresses.parse_listen` reads them. With none,
        the host can only dial.
    announce : sequence of str
        Multiaddrs to tell peers besides those listened on: where a port mapping
        or a load balancer leads here.
    max_connections : int
        Connections in all.
    network_key : bytes, optional
        Of the private network to belong to (`pnet`); without it, the public one.

    Raises
    ------
    BadInput
        An address cannot be read, or cannot be listened on.

    Attributes
    ----------
    key_pair : KeyPair
        The identity.
    peer_id : str
        Its public name.
    door : Door
        Who comes in, with counters.
    own_port : OwnPort
        For connections that leave from the listening port.
    """

    def __init__(
        self,
        key_pair: KeyPair | None = None,
        listen: Sequence[str] = (),
        *,
        announce: Sequence[str] = (),
        max_connections: int = MAX_CONNECTIONS,
        network_key: bytes | None = None,
    ) -> None:
        self.key_pair = key_pair or create_new_key_pair()
        self.peer_id = str(ID.from_pubkey(self.key_pair.public_key))
        self._listen = tuple(dict.fromkeys(parse_listen(text) for text in listen))
        self._announce = tuple(plain(text) for text in announce)
        self._told: tuple[str, ...] = ()
        self._bound: tuple[str, ...] = ()
        self._nursery: trio.Nursery | None = None
        self._stack = AsyncExitStack()
        self._scope = trio.CancelScope()
        self._is_running = False
        self.door = Door(max_connections)
        self._libp2p, self._swarm, self._peerstore = host_guard.build(
            self.key_pair,
            max_connections=max_connections,
            own_addrs=lambda: self._told,
            door=self.door,
            network_key=network_key,
        )
        self.own_port = OwnPort(self._swarm)
        self._dialer = Dialer(self, self._swarm, self._peerstore, self.own_port)
        self._connected_listeners: list[Callable[[str], None]] = []
        self._identified_listeners: list[Callable[[str], None]] = []
        self._circuits: tuple[str, ...] = ()
        self._peerstore.on_protocols = self._tell_identified
        self._swarm.register_notifee(host_guard.Watcher(self._tell_connected))

    # ---- life

    async def __aenter__(self) -> Host:
        for addr in self._listen:
            host_guard.check_port(addr)
        try:
            outer = await self._stack.enter_async_context(trio.open_nursery())
            await outer.start(self._run_network)
            await self._start_listening()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if self._is_running:
            conns = self._swarm.get_connections()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(CLOSE_TIMEOUT_S):
                    await end_all(conns)
                    await self._libp2p.close()
                self._cut_what_is_left(conns)
        self._scope.cancel()
        if _is_cancellation(error):
            return await self._stack.__aexit__(kind, error, traceback)
        # The body's own error, if any: our nurseries have no part in it, and would wrap it.
        await self._stack.__aexit__(None, None, None)
        return None

    async def _run_network(self, task_status: trio.TaskStatus[None]) -> None:
        """Run libp2p and our errands until `__aexit__` ends them.

        Shielded once it runs: when everything is cancelled from outside, whoever uses the
        host is to end first, and its last words are still to be sent. Not before: whoever
        starts us waits for our end when it is cancelled, and nobody else would bring it.
        """
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                manager = TrioManager(self._swarm)
                self._swarm._manager = manager
                nursery.start_soon(manager.run)
                await manager.wait_started()
                host_guard.contain(manager)
                nursery.start_soon(self._watch)
                await trio.lowlevel.checkpoint_if_cancelled()
                task_status.started()
                self._scope.shield = self._is_running = True

    async def _start_listening(self) -> None:
        await self._swarm.listen(*(Multiaddr(addr) for addr in self._listen))
        bound = [str(addr) for addr in self._libp2p.get_transport_addrs()]
        if len(bound) < len(self._listen):
            raise BadInput(f"cannot listen on {', '.join(self._listen)}")
        self.own_port.listens_on(bound)
        self._bound = tuple(reached for addr in bound for reached in interfaces(addr))
        self._tell_addrs()

    def _tell_addrs(self) -> None:
        direct = (*self._announce, *advertised(self._bound))
        self._told = tuple(dict.fromkeys((*direct, *self._circuits)))

    def _cut_what_is_left(self, conns: Iterable[INetConn]) -> None:
        for conn in (*conns, *self._swarm.get_connections()):
            host_guard.cut(conn)  # libp2p forgets those whose goodbye is stuck, without closing
        for listener in self._swarm.listeners.values():
            nursery = getattr(listener, "_nursery", None)
            if nursery is not None:  # closing it was cancelled half-way
                nursery.cancel_scope.cancel()

    # ---- who and where

    def addrs(self) -> tuple[str, ...]:
        """Return full multiaddrs of this host, ``/p2p/`` included.

        Real ports, also where 0 was asked for. For 0.0.0.0 and ``::``, the addresses
        of all interfaces, loopback last.
        """
        ours = dict.fromkeys((*self._announce, *self._bound, *self._circuits))
        return tuple(with_peer_id(addr, self.peer_id) for addr in ours)

    def advertised_addrs(self) -> tuple[str, ...]:
        """Return the multiaddrs that are told to other peers, without ``/p2p/``."""
        return self._told

    def set_circuits(self, addrs: Sequence[str]) -> bool:
        """Tell peers at which circuit addresses we can be reached, from now on.

        Connected peers hear of it at once (identify push).

        Returns
        -------
        bool
            Whether that is news.
        """
        if tuple(addrs) == self._circuits:
            return False
        self._circuits = tuple(addrs)
        self._tell_addrs()
        self.start_soon(lambda: push_identify_to_peers(self._libp2p))
        return True

    def set_circuit_dialer(self, dialer: CircuitDialer) -> None:
        """Have circuit addresses dialled by `dialer`; without one they cannot be."""
        self._dialer.dial_circuit = dialer

    def connected(self) -> tuple[str, ...]:
        """Return the ids of all connected peers."""
        return tuple(
            str(peer)
            for peer, conns in self._swarm.connections.items()
            if any(host_guard.is_live(conn) for conn in conns)
        )

    def is_connected(self, peer_id: str) -> bool:
        """Tell whether a peer is connected."""
        conns = self._swarm.connections.get(libp2p_id(peer_id), ())
        return any(host_guard.is_live(conn) for conn in conns)

    def is_relayed(self, peer_id: str) -> bool:
        """Tell whether a peer is connected, and through relays only."""
        conns = self._swarm.connections.get(libp2p_id(peer_id), ())
        live = [conn for conn in conns if host_guard.is_live(conn)]
        return bool(live) and all(host_guard.socket_of(conn) is None for conn in live)

    def remote_host(self, peer_id: str) -> str | None:
        """Return the IP address at which we see a peer, None if it is not connected."""
        return host_guard.remote_host(self._swarm, libp2p_id(peer_id))

    def protocols_of(self, peer_id: str) -> frozenset[str]:
        """Return the protocols a peer says it speaks; empty until it has told us."""
        try:
            return frozenset(self._peerstore.get_protocols(libp2p_id(peer_id)))
        except PeerStoreError:
            return frozenset()

    def on_connected(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called with the peer's id for each new connection."""
        self._connected_listeners.append(listener)

    def _tell_connected(self, conn: INetConn) -> None:
        host_guard.set_socket_options(conn)
        for listener in self._connected_listeners:
            listener(str(conn.muxed_conn.peer_id))

    def on_identified(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called with a peer's id once `protocols_of` it are known."""
        self._identified_listeners.append(listener)

    def add_peer_addrs(self, peer_id: str, addrs: Iterable[str]) -> None:
        """Remember where a peer may be reached.

        Parameters
        ----------
        peer_id : str
            The peer.
        addrs : iterable of str
            Multiaddrs that may be dialled: a user's, or what
            `addresses.believable` left of a peer's claims. Unreadable ones are
            left out.
        """
        self._peerstore.add_checked(libp2p_id(peer_id), usable(addrs)[:MAX_ADDRS_PER_PEER])

    def _tell_identified(self, peer_id: ID) -> None:
        for listener in self._identified_listeners:
            listener(str(peer_id))

    def addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Return where a peer may be reached, as far as we know."""
        try:
            return tuple(map(addr_text, self._peerstore.addrs(libp2p_id(peer_id))))
        except PeerStoreError:
            return ()

    @property
    def libp2p(self) -> BasicHost:
        """The py-libp2p host, for `discovery` alone."""
        return self._libp2p

    # ---- connecting

    async def connect(self, address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> str:
        """Connect to the peer at an address.

        Parameters
        ----------
        address : str
            A multiaddr with ``/p2p/``.
        timeout_s : float
            Time for it, in seconds.

        Returns
        -------
        str
            The peer's id.

        Raises
        ------
        BadInput
            The address cannot be read.
        RemoteError
            The peer cannot be reached, or another one answers; says why.
        """
        peer = parse_peer_address(address)
        await self.connect_peer(peer, timeout_s)
        return peer.peer_id

    async def connect_peer(self, peer: PeerAddress, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Connect to a peer, unless it is connected already.

        The addresses given are tried first, then others that are known. Addresses
        that came from peers go through `addresses.believable` before. Unreadable
        ones are left out.

        Raises
        ------
        RemoteError
            It cannot be reached; says why.
        """
        if peer.peer_id == self.peer_id:
            raise NoSource("that is this node's own address")
        await self._dialer.connect(peer, timeout_s)

    async def probe(self, addr: str, peer_id: str) -> bool:
        """Tell whether a peer answers at an address, on a connection made for that alone.

        Wants a deadline of the caller's round it.
        """
        try:
            await host_guard.probe(self._swarm, addr, libp2p_id(peer_id))
        except Exception as error:  # libp2p's layers each have their own kinds
            log.debug("%s does not answer at %s: %s", peer_id, addr, cause_of(error))
            return False
        return True

    async def disconnect(self, peer_id: str) -> None:
        """End all connections to a peer; its streams end with an error. Never raises."""
        conns = self._swarm.get_connections(libp2p_id(peer_id))
        errands = [Errand(self.background(), lambda conn=conn: end(conn)) for conn in conns]  # type: ignore[misc]
        for errand in errands:
            await errand.wait()

    # ---- streams

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float = STREAM_TIMEOUT_S
    ) -> Stream:
        """Open a stream, connecting first if need be. Costs about 5 ms of CPU.

        Raises
        ------
        RemoteError
            The peer cannot be reached, does not speak the protocol, or does not
            answer in time.
        """
        with trio.move_on_after(timeout_s):
            if not self.is_connected(peer_id):
                await self.connect_peer(PeerAddress(peer_id, ()), timeout_s)
            opening = Errand(self.background(), lambda: self._open(peer_id, protocol))
            try:
                return await opening.wait()
            except trio.Cancelled:
                opening.abandon(Stream.abort)
                raise
        raise NoSource(f"{peer_id} did not open a {protocol} stream within {timeout_s:g} s")

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Have `handler` called with peer id and stream for each inbound stream.

        The stream is closed when the handler returns. A `RemoteError` that leaves the
        handler is the peer's fault and only logged; any other error is a bug of ours,
        logged as such. Neither harms the host.
        """

        async def handle(net_stream: INetStream) -> None:
            assert isinstance(net_stream, NetStream)
            stream = Stream(net_stream, self.background(), self._heard)
            try:
                await handler(stream.peer_id, stream)
            except RemoteError as error:
                log.debug("%s stream of %s: %s", protocol, stream.peer_id, error)
                stream.abort()
            except Exception:
                log.exception("the handler of %s failed", protocol)
                stream.abort()
            except BaseException:  # the connection ended, or the host is closing
                stream.abort()
                raise
            await stream.aclose()

        self._libp2p.set_stream_handler(TProtocol(protocol), handle)

    def _heard(self, peer_id: str) -> None:
        self.door.places.heard(peer_id, trio.current_time())

    async def _open(self, peer_id: str, protocol: str) -> Stream:
        try:
            net_stream = await self._libp2p.new_stream(libp2p_id(peer_id), [TProtocol(protocol)])
        except Exception as error:  # libp2p's layers each have their own kinds
            raise NoSource(f"{peer_id} opens no {protocol} stream: {cause_of(error)}") from error
        assert isinstance(net_stream, NetStream)
        return Stream(net_stream, self.background(), self._heard)

    def start_soon(self, operation: Callable[[], Awaitable[object]]) -> None:
        """Run an operation in the background, until it or the host ends.

        An error of ours that leaves it ends it quietly; any other is logged as a bug.
        """

        async def run() -> None:
            try:
                await operation()
            except TensorswarmError as error:
                log.debug("in the background: %s", error)
            except Exception:
                log.exception("a background operation failed")

        Errand(self.background(), run)

    def background(self) -> trio.Nursery:
        """Return the nursery of what outlives a call.

        Raises
        ------
        LocalError
            The host is not running.
        """
        if self._nursery is None:
            raise LocalError("the host is not running")
        return self._nursery

    # ---- watching

    async def _watch(self) -> None:
        """Drop peers that flood us, and forget those not heard of."""
        forget_at = trio.current_time() + FORGET_INTERVAL_S
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            for conn in self._swarm.get_connections():
                if host_guard.buffered_bytes(conn) > MAX_BUFFERED_BYTES:
                    log.warning("dropped %s: it sends more than allowed", conn.muxed_conn.peer_id)
                    host_guard.cut(conn)
            if trio.current_time() >= forget_at:
                forget_at = trio.current_time() + FORGET_INTERVAL_S
                self._peerstore.forget_expired()


def _is_cancellation(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is_cancellation(inner) for inner in error.exceptions)
    return isinstance(error, trio.Cancelled)
