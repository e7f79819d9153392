"""py-libp2p, set up as we use it, with the holes we know of closed.

Purpose
-------
`build` makes the py-libp2p host that `Host` runs: TCP, Noise and yamux, nothing
else. Everything that reaches into py-libp2p's insides stands in this file, each
with the reason; when py-libp2p is upgraded, this is the file to read again
(written for 0.8.1).

What is put right
-----------------
- One failing task stops the whole network: an exception that leaves any task of
  the swarm cancels all of it, and a peer can cause one (a stream whose protocol
  name is not UTF-8 will do). `contain` and `guard_streams` keep a failure to the
  connection it belongs to.
- It counts inbound connections for good: once `max_connections` have come, since the start,
  no more are let in, however many have left; and while as many only sit there, they keep
  everybody out for 10 s. `guard_door` counts those that shake hands, for as long as they do.
- The default resource manager refuses the 257th connection whatever
  `max_connections` says, and opens a "circuit breaker"; ours has our limits only.
- The auto-connector dials peers nobody asked for; ours does nothing.
- The peer store forgets the oldest peers past 1,000, itself first, after which
  identify fails; it believes any address, up to 1,000 for one peer; and it forgets
  connected peers after two hours. `GuardedPeerStore` does none of these.
- Listening sockets are opened with SO_REUSEPORT, so a second node on the same port
  starts without complaint and the two share the connections. `check_port` asks
  first.
- yamux answers each read with a window update, however small: see `window`.
- yamux does not enforce the receive window: `buffered_bytes` lets `Host` drop a
  peer that sends more than it was allowed to.
- A vanished peer's connection would live for a quarter of an hour: see
  `set_socket_options`.
- The addresses told to peers lose all after their first ``/p2p/``, so that a circuit
  address becomes that of its relay, where another peer answers. `build` puts
  `get_addrs` right.
- Some modules log to the root logger, which installs a handler there.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IMuxedConn, INetConn, INetStream, INotifee, IRawConnection
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.network import swarm as swarm_module
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.rcmgr import ResourceLimits, ResourceManager
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service.trio_manager import TrioManager
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput

from .addresses import MAX_ADDRS_PER_PEER, believable, tcp_host, with_peer_id
from .door import MAX_HALF_OPEN, Door, StreamBudget
from .lean import make_lean
from .pnet import ProtectedConnection
from .stream import is_ending
from .window import tell_by_halves

log = logging.getLogger(__name__)

MAX_CONNECTIONS_PER_PEER = 4
"""One is enough; two arise when both sides dial at once, more while one is replaced."""

MAX_STREAMS = 10_000
"""Streams in all. Past that new ones wait, so it is well above what `host.door` allows."""

MAX_KNOWN_PEERS = 5_000
"""Peers whose addresses are kept, at about 1 KB each."""

MAX_PROTOCOLS = 100
"""Protocols remembered of a peer: Kubo names about thirty."""

ADDRESS_TTL_S = 24 * 3600
"""How long a peer's addresses are kept without hearing of it, in seconds."""

UPGRADE_TIMEOUT_S = 10
"""Time for the handshakes of a new connection, in seconds: three round trips."""

UNANSWERED_TIMEOUT_S = 60
"""A peer that acknowledges nothing for so long is gone, in seconds. yamux pings every
30 s, so there is always something to acknowledge."""


class NoAutoConnect(AutoConnector):
    """An auto-connector that never dials: whom to connect to is the node's decision."""

    async def start(self) -> None:
        """Do nothing; py-libp2p asks a connector that has not started for nothing more."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Remember nothing."""


class GuardedPeerStore(PeerStore):
    """The peer store, with addresses checked and whoever matters kept.

    Attributes
    ----------
    remote_host : callable
        Tells the IP address at which we see a peer, None if it is not connected.
    is_kept : callable
        Tells whether a peer must not be forgotten.
    on_protocols : callable
        Called with a peer's id when it has told us which protocols it speaks.
    """

    def __init__(self) -> None:
        super().__init__(max_peers=MAX_KNOWN_PEERS)
        self.remote_host: Callable[[ID], str | None] = lambda _peer: None
        self.is_kept: Callable[[ID], bool] = lambda _peer: True
        self.on_protocols: Callable[[ID], None] = lambda _peer: None

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        """Add what a peer, or somebody else, claims to be the peer's addresses."""
        told_by = self.remote_host(peer_id)
        self.add_checked(peer_id, believable((str(addr) for addr in addrs), told_by))

    def add_checked(self, peer_id: ID, addrs: Collection[str]) -> None:
        """Add addresses that may be dialled; the newest `MAX_ADDRS_PER_PEER` stay."""
        if not addrs:
            return
        super().add_addrs(peer_id, [Multiaddr(addr) for addr in addrs], ADDRESS_TTL_S)
        known = self.peer_data_map[peer_id].addrs if peer_id in self.peer_data_map else []
        del known[:-MAX_ADDRS_PER_PEER]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """Note what a peer speaks, as identify does after its clearing what was known."""
        super().add_protocols(peer_id, list(protocols)[:MAX_PROTOCOLS])
        self.on_protocols(peer_id)

    def forget_expired(self) -> None:
        """Forget peers not heard of for `ADDRESS_TTL_S`, apart from those that are kept."""
        for peer_id, data in list(self.peer_data_map.items()):
            if self.is_kept(peer_id):
                data.update_last_identified()
            elif data.is_expired():
                self.peer_data_map.pop(peer_id, None)
                self.peer_record_map.pop(peer_id, None)

    def _enforce_peer_limit(self) -> None:
        excess = len(self.peer_data_map) - self.max_peers
        # An eighth more than needed, so that a full store is not searched at each new peer.
        excess += self.max_peers // 8 if excess > 0 else 0
        for peer_id in [peer for peer in self.peer_data_map if not self.is_kept(peer)]:
            if excess <= 0:
                break
            self.peer_data_map.pop(peer_id, None)
            self.peer_record_map.pop(peer_id, None)
            excess -= 1


def build(
    key_pair: KeyPair,
    *,
    max_connections: int,
    own_addrs: Callable[[], Sequence[str]],
    door: Door,
    network_key: bytes | None = None,
) -> tuple[BasicHost, Swarm, GuardedPeerStore]:
    """Make a py-libp2p host, not running yet.

    Parameters
    ----------
    key_pair : KeyPair
        The identity.
    max_connections : int
        Connections in all; for a moment a few more, while one makes room for another.
    own_addrs : callable
        Gives the multiaddrs to tell other peers, at each moment.
    door : Door
        Decides who comes in.
    network_key : bytes, optional
        Of the private network that all connections belong to.
    """
    quiet_logging()
    tell_by_halves()
    make_lean()
    vars(swarm_module)["new_protected_conn"] = ProtectedConnection  # see `pnet`
    # Who has shaken hands may stand beside whom it displaces.
    config, resources = _limits(max_connections + MAX_HALF_OPEN)
    peerstore = GuardedPeerStore()
    noise_key = create_new_x25519_key_pair().private_key
    host = new_host(
        key_pair=key_pair,
        sec_opt={NOISE_PROTOCOL_ID: NoiseTransport(key_pair, noise_privkey=noise_key)},
        muxer_opt={YAMUX_PROTOCOL_ID: Yamux},  # type: ignore[dict-item]
        peerstore_opt=peerstore,
        connection_config=config,
        resource_manager=resources,
        psk=network_key.hex() if network_key is not None else None,
        addrs_factory=lambda _listening: [Multiaddr(addr) for addr in own_addrs()],
        # It does not ask which connections left from the listening port: see `own_port`.
        disable_identify_address_discovery=True,
    )
    swarm = host.get_network()
    if not isinstance(host, BasicHost) or not isinstance(swarm, Swarm):
        raise TypeError("this py-libp2p is not the one that tensorswarm was written for")
    own_id = str(host.get_id())

    def told() -> list[Multiaddr]:
        return [Multiaddr(with_peer_id(addr, own_id)) for addr in own_addrs()]

    host.get_addrs = told  # type: ignore[method-assign]
    swarm.retry_config = RetryConfig(max_retries=0)  # whoever wants it tries again
    swarm.auto_connector = NoAutoConnect(swarm)
    peerstore.remote_host = lambda peer_id: remote_host(swarm, peer_id)
    peerstore.is_kept = lambda peer: peer == host.get_id() or peer in swarm.connections
    guard_streams(swarm, door.streams)
    guard_door(swarm, door)
    return host, swarm, peerstore


def _limits(max_connections: int) -> tuple[ConnectionConfig, ResourceManager]:
    """Return py-libp2p's limits; all of the connections may come from outside."""
    config = ConnectionConfig(
        max_connections=max_connections,
        min_connections=0,  # all of them may be inbound: a hub has only such
        low_watermark=0,
        high_watermark=max_connections,  # connections are refused, not pruned
        max_connections_per_peer=1,  # with more, a connect takes 250 ms instead of 10
        inbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
        outbound_upgrade_timeout=UPGRADE_TIMEOUT_S,
    )
    resources = ResourceManager(
        limits=ResourceLimits(
            max_connections=2 * max_connections + 64,  # each counts twice while it is set up
            max_streams=MAX_STREAMS,
        ),
        connection_limits=ConnectionLimits(
            max_established_inbound=max_connections,
            max_established_outbound=max_connections,
            max_established_per_peer=MAX_CONNECTIONS_PER_PEER,
            max_established_total=max_connections,
        ),
        enable_metrics=False,  # they keep an entry for every peer ever seen
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
    )
    return config, resources


def guard_streams(swarm: Swarm, budget: StreamBudget) -> None:
    """Keep what goes wrong with an inbound stream from stopping the swarm."""
    inner = swarm.common_stream_handler

    async def handle(net_stream: INetStream) -> None:
        peer_id = net_stream.muxed_conn.peer_id
        name = str(peer_id)
        if not budget.take(name):
            if budget.is_flood(name):
                log.debug("cut %s: it opens streams without end", peer_id)
                for conn in list(swarm.connections.get(peer_id, ())):
                    cut(conn)
                return
            log.debug("%s has too many streams open", peer_id)
            await net_stream.reset()
            return
        try:
            await inner(net_stream)
        except Exception as error:  # the peer's doing: our own handlers raise nothing
            log.debug("stream from %s: %s: %s", peer_id, type(error).__name__, error)
            await net_stream.reset()
        finally:
            budget.gone(name)

    swarm.set_stream_handler(handle)


def guard_door(swarm: Swarm, door: Door) -> None:
    """Let connections in: few that shake hands, and as many as there may be afterwards.

    py-libp2p's own way holds a place for each connection until the host ends.
    """
    half_open, places = door.half_open, door.places

    def others() -> int:
        live = sum(is_live(conn) for conn in swarm.get_connections())
        return max(0, live - len(places))

    async def let_in(carrier: ReadWriteCloser, maddr: Multiaddr) -> None:
        remote = carrier.get_remote_address()
        host = remote[0] if remote else ""
        if not places.may_enter(host, trio.current_time(), others()):
            places.refused += 1
            return  # and the listener closes it, before anything is said
        with trio.CancelScope() as handshake:
            number = half_open.enter(host, trio.current_time(), handshake.cancel)
            if number is None:
                return
            expected = door.expected.get(remote) if remote else None
            muxed: IMuxedConn
            try:
                if expected is not None:  # it waits for us to speak
                    ours = protected(swarm, RawConnection(carrier, True))
                    peer_id = ID.from_string(expected)
                    muxed = (await swarm.upgrade_outbound_raw_conn(ours, peer_id)).muxed_conn
                elif not await _has_spoken(carrier):
                    return
                else:
                    half_open.spoke(number, trio.current_time())
                    theirs = RawConnection(carrier, False)
                    muxed = await swarm.upgrade_inbound_raw_conn(theirs, maddr)
            except Exception as error:  # libp2p's layers each have their own kinds
                log.debug("inbound connection from %s: %s", remote, error)
                return
            finally:
                half_open.left(number)
        if handshake.cancelled_caught:
            log.debug("inbound connection from %s: it made room for another", remote)
            return
        # When this ends, the listener closes the connection.
        with trio.CancelScope() as stay:
            gone = getattr(muxed, "event_closed", None)
            place = places.enter(
                str(muxed.peer_id), host, trio.current_time(), stay.cancel, max(0, others() - 1)
            )
            if place is None:
                return
            try:
                await (swarm.manager.wait_finished() if gone is None else gone.wait())
            finally:
                places.left(place)
        if stay.cancelled_caught:
            log.debug("inbound connection from %s: it made room for another", remote)

    swarm._handle_inbound_connection = let_in  # type: ignore[method-assign, assignment]


async def _has_spoken(carrier: ReadWriteCloser) -> bool:
    """Wait for the first byte of a connection; False if none comes in time."""
    sock = getattr(getattr(carrier, "stream", None), "socket", None)
    if not isinstance(sock, trio.socket.SocketType):
        return True  # a circuit: the relay's connection has spoken
    with trio.move_on_after(UPGRADE_TIMEOUT_S) as silence:
        await trio.lowlevel.wait_readable(sock)
    return not silence.cancelled_caught


def contain(manager: TrioManager) -> None:
    """Make a failing task of a service end alone, with the connection it served."""
    run_task = manager.run_task

    def run_contained(task: Callable[..., Awaitable[None]], *args: Any, **options: Any) -> None:
        async def contained() -> None:
            try:
                await task(*args)
            except Exception:
                log.warning("a task of libp2p failed", exc_info=True)
                close = getattr(getattr(task, "__self__", None), "close", None)
                if close is not None and not isinstance(task.__self__, Swarm):  # type: ignore[attr-defined]
                    await closed_quietly(close)

        options.setdefault("name", getattr(task, "__qualname__", "task"))
        run_task(contained, **options)

    manager.run_task = run_contained  # type: ignore[method-assign, assignment]


async def closed_quietly(close: Callable[[], Awaitable[None]]) -> None:
    """Close something of libp2p's, whatever that comes to."""
    try:
        await close()
    except Exception as error:
        log.debug("closing: %s", error)


class Watcher(INotifee):
    """Hears of new connections; py-libp2p calls all six methods."""

    def __init__(self, connected: Callable[[INetConn], None]) -> None:
        self._connected = connected

    async def connected(self, network: object, conn: INetConn) -> None:
        """Pass the connection on."""
        self._connected(conn)

    async def disconnected(self, network: object, conn: INetConn) -> None:
        """Do nothing."""

    async def opened_stream(self, network: object, stream: INetStream) -> None:
        """Do nothing."""

    async def closed_stream(self, network: object, stream: INetStream) -> None:
        """Do nothing."""

    async def listen(self, network: object, multiaddr: Multiaddr) -> None:
        """Do nothing."""

    async def listen_close(self, network: object, multiaddr: Multiaddr) -> None:
        """Do nothing."""


def carrier_of(muxed_conn: IMuxedConn) -> Any:
    """Return what carries a connection: a TrioTCPStream, or a circuit through a relay."""
    found: Any = muxed_conn
    for attribute in (
        "secured_conn",  # SecureSession
        "conn",  # NoiseTransportReadWriter
        "read_writer",  # NoisePacketReadWriter
        "read_write_closer",  # RawConnection
        "stream",
    ):
        found = getattr(found, attribute, None)
    return found


def socket_of(conn: INetConn) -> trio.socket.SocketType | None:
    """Return the TCP socket under a connection, None if it leads through a relay."""
    found = getattr(getattr(carrier_of(conn.muxed_conn), "stream", None), "socket", None)
    return found if isinstance(found, trio.socket.SocketType) else None


def cut(conn: INetConn) -> None:
    """End what carries a connection; libp2p notices and cleans up."""
    sock = socket_of(conn)
    if sock is not None:
        sock.close()
        return
    abort = getattr(carrier_of(conn.muxed_conn), "abort", None)
    if abort is not None:
        abort()


def set_socket_options(conn: INetConn) -> None:
    """Have the kernel give up on a peer that acknowledges nothing."""
    sock = socket_of(conn)
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it
    if sock is None or option is None:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, option, UNANSWERED_TIMEOUT_S * 1000)
    except OSError as error:
        log.debug("setting the timeout of a connection: %s", error)


def remote_host(swarm: Swarm, peer_id: ID) -> str | None:
    """Return the IP address at which we see a connected peer.

    The socket is asked, because py-libp2p's own answer is None for IPv6.
    """
    for conn in swarm.connections.get(peer_id, ()):
        sock = socket_of(conn)
        if sock is None or not is_live(conn):
            continue
        try:
            host = str(sock.getpeername()[0]).partition("%")[0]
        except OSError:
            continue  # it broke a moment ago
        return host.removeprefix("::ffff:") if "." in host else host
    return None


def protected(swarm: Swarm, raw: IRawConnection) -> IRawConnection:
    """Put a connection that we dial under the network's key, if there is one.

    py-libp2p does that for those that it dials itself, and for inbound ones.
    """
    return raw if swarm.psk is None else ProtectedConnection(raw, swarm.psk)


async def probe(swarm: Swarm, addr: str, peer_id: ID) -> None:
    """Connect to an address, see that a peer is there by a Noise handshake, and hang up.

    The swarm does not hear of it, so that a connection there is to the peer stays as it is.
    Raises whatever libp2p raises when it fails.
    """
    transport = swarm.transport_manager.transport_for_dialing(Multiaddr(addr))
    if transport is None:
        raise BadInput(f"cannot dial {addr}")
    raw = await transport.dial(Multiaddr(addr))
    if not isinstance(raw, IRawConnection):
        raise BadInput(f"cannot dial {addr} as a plain connection")
    try:
        await swarm.upgrader.upgrade_security(protected(swarm, raw), True, peer_id)
    finally:
        with trio.CancelScope(shield=True):
            await raw.close()


def is_live(conn: INetConn) -> bool:
    """Tell whether a connection can be used; py-libp2p notices its end a little later."""
    return not (conn.is_closed or is_ending(conn.muxed_conn))


async def wait_gone(conn: INetConn) -> None:
    """Wait until a connection that is being closed has said goodbye and is closed."""
    gone = getattr(conn.muxed_conn, "event_closed", None)
    if gone is not None:
        await gone.wait()


def buffered_bytes(conn: INetConn) -> int:
    """Return how many received bytes a connection holds for readers to take."""
    buffers = getattr(conn.muxed_conn, "stream_buffers", {})
    return sum(len(buffer) for buffer in buffers.values())


def check_port(addr: str) -> None:
    """See whether a listening address is free.

    Raises
    ------
    BadInput
        It is in use, is not an address of this machine, or may not be listened on.
    """
    host, port = tcp_host(addr)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reasons = {
        errno.EADDRINUSE: "another program listens there; choose another port, or 0 for any",
        errno.EADDRNOTAVAIL: "that is not an address of this machine",
        errno.EACCES: "ports below 1024 need privileges",
    }
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As libp2p does, but without SO_REUSEPORT: a port in TIME_WAIT will do,
            # one where somebody listens will not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = reasons.get(error.errno or 0, str(error))
        raise BadInput(f"cannot listen on {addr}: {reason}") from error


def quiet_logging() -> None:
    """Keep py-libp2p's log away from stderr and from the root logger.

    It logs a peer's misbehaviour as errors, and has no handler, so that Python's last
    resort prints them. Its own LIBP2P_DEBUG still works.
    """
    root = logging.getLogger("libp2p")
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    # This module alone calls logging.debug() and the like, on the root logger.
    vars(swarm_connection)["logging"] = logging.getLogger(swarm_connection.__name__)
