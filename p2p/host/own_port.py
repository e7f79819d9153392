"""Dialling from the port that we listen on, so that a NAT knows us by one address.

Purpose
-------
A NAT gives a connection that leaves us a port of its own on the public side. Most give the
same one to all connections from the same port of ours (RFC 4787: endpoint-independent
mapping), so what a peer sees of a connection that left from the listening port is where
others could reach that port, if the NAT lets them. Hole punching (`reach.punch`) needs to
know that address, and needs its own dials to leave from that port, too.

Rules
-----
- The first connections that we dial, `OBSERVERS` of them, leave from the listening port;
  when one ends, the next one dialled takes its place. They are to peers we were given, and
  to relays. More would be of no use, and cost more of what can go wrong.
- Where that does not work, the same address is dialled from a chance port at once: another
  connection may have just ended there (TIME_WAIT), a firewall may want other ports, or the
  peer has dialled us from its listening port at the same moment, so that TCP made one
  connection of two dials and nobody is its server.
- Only what goes to the Internet leaves from the listening port: elsewhere no NAT is in between
  that matters.

Not here: who asks to be told our address, and who is believed (`reach.observed`).
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource

from . import guard as host_guard
from .addresses import Scope, scope_of, tcp_host

OBSERVERS = 4
"""Connections that leave from the listening port: three agree even if one lies, and one
may be lost."""

CONNECT_TIMEOUT_S = 1.5
"""Time for an ordinary connection from the listening port, in seconds: twice what a satellite
takes. Then a chance port has to do."""

UPGRADE_TIMEOUT_S = 10.0
"""Time for the handshakes, in seconds, as for any other connection."""

log = logging.getLogger(__name__)


class OwnPort:
    """The listening port, as where connections leave from.

    Parameters
    ----------
    swarm : Swarm
        py-libp2p's.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._bound: tuple[tuple[str, int], ...] = ()

    def listens_on(self, addrs: Iterable[str]) -> None:
        """Note the multiaddrs that are listened on, with real ports."""
        if hasattr(socket, "SO_REUSEPORT"):  # Windows has it not
            self._bound = tuple(tcp_host(addr) for addr in addrs)

    def source_for(self, addr: str) -> tuple[str, int] | None:
        """Return the address and port to leave from for `addr`; None if there is none."""
        target = ipaddress.ip_address(tcp_host(addr)[0].partition("%")[0])
        for host, port in self._bound:
            ip = ipaddress.ip_address(host.partition("%")[0])
            if ip.version == target.version and (
                ip.is_unspecified or ip.is_loopback == target.is_loopback
            ):
                return host, port
        return None

    def observers(self) -> list[str]:
        """Return the ids of the peers that see us by our own port."""
        ports = {port for _, port in self._bound}
        found = []
        for conn in self._swarm.get_connections():
            sock = host_guard.socket_of(conn)
            if sock is None or not host_guard.is_live(conn):
                continue
            if getattr(conn, "direction", None) is not Direction.OUTBOUND:
                continue
            try:
                if sock.getsockname()[1] in ports:
                    found.append(str(conn.muxed_conn.peer_id))
            except OSError:
                continue  # it broke a moment ago
        return found

    # ---- ordinary connections

    async def try_dial(self, addr: str, peer_id: ID) -> bool:
        """Connect to a peer from our own port, if that is of use; tell whether it worked."""
        is_far = scope_of(tcp_host(addr)[0]) is Scope.GLOBAL
        if not is_far or self.source_for(addr) is None or len(self.observers()) >= OBSERVERS:
            return False
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                raw = await self.connect(addr)
            await self.upgrade(raw, addr, peer_id, as_client=True)
        except Exception as error:  # libp2p's layers each have their own kinds
            log.debug("%s from our own port: %s: %s", addr, type(error).__name__, error)
            return False
        return True

    # ---- the two steps of any connection from our own port

    async def connect(self, addr: str) -> RawConnection:
        """Make a TCP connection to an IP address. Wants a deadline round it.

        Raises
        ------
        OSError
            It did not come about.
        NoSource
            We listen on nothing from which one could leave for there.
        """
        source = self.source_for(addr)
        if source is None:
            raise NoSource(f"no listening port from which to dial {addr}")
        host, port = tcp_host(addr)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            await sock.bind(source)
            await sock.connect((host, port))
            return RawConnection(TrioTCPStream(trio.SocketStream(sock)), True)
        except BaseException:
            sock.close()
            raise

    async def upgrade(
        self,
        raw: RawConnection,
        addr: str,
        peer_id: ID,
        *,
        as_client: bool,
        timeout_s: float = UPGRADE_TIMEOUT_S,
    ) -> None:
        """Shake hands on a TCP connection and hand it over to libp2p; closes it on failure.

        Raises
        ------
        Exception
            Whatever libp2p raises; `NoSource` when another peer is there.
        """
        try:
            with trio.fail_after(timeout_s):
                if as_client:
                    protected = host_guard.protected(self._swarm, raw)
                    await self._swarm.upgrade_outbound_raw_conn(protected, peer_id)
                    return
                serving = RawConnection(raw.stream, False)
                muxed = await self._swarm.upgrade_inbound_raw_conn(serving, Multiaddr(addr))
        except BaseException:
            with trio.CancelScope(shield=True):
                await host_guard.closed_quietly(raw.close)
            raise
        if muxed.peer_id != peer_id:
            await host_guard.closed_quietly(muxed.close)
            raise NoSource(f"another peer answers at {addr}")
