"""A libp2p connection inside a stream through a relay (the end points' side).

Purpose: hand a stream that a relay has joined to another peer's over to py-libp2p as if it
were a socket. Noise runs inside it, so the relay sees and changes nothing.

Like `host.guard`, this file reaches into py-libp2p's insides; to be read again at every
upgrade. py-libp2p has a relay client of its own (`libp2p.relay.circuit_v2`), which is not used: its
transport comes with a discovery service that looks for relays by itself, and its reads
under deadlines cancel inside a frame of the connection to the relay (see `host.stream`).

What it does not do: speak with the relay (`relay_client`).
"""

from __future__ import annotations

import math

import trio
from libp2p.abc import INetConn
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, RemoteError

from ..host import goodbye
from ..host import guard as host_guard
from ..host.addresses import CIRCUIT
from ..host.host import Host
from .relay_wire import MessageStream

UPGRADE_TIMEOUT_S = 10.0
"""Seconds for the handshakes inside the circuit, as for any other connection."""


class CircuitStream(ReadWriteCloser):
    """A relayed stream in the shape of a py-libp2p socket.

    Attributes
    ----------
    closed : trio.Event
        Set when either side has ended it.
    """

    def __init__(self, messages: MessageStream) -> None:
        self._stream = messages.stream
        self._rest = memoryview(messages.rest)
        self.closed = trio.Event()

    async def read(self, n: int | None = None) -> bytes:
        """Return up to `n` bytes as soon as there are any; nothing at the end."""
        if not self._rest:
            try:
                self._rest = memoryview(await self._stream.receive_some())
            except RemoteError as error:
                self.closed.set()
                raise ConnectionClosedError(f"the circuit is gone: {error}") from error
        count = len(self._rest) if n is None else n
        data = bytes(self._rest[:count])
        self._rest = self._rest[count:]
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        try:
            await self._stream.send(data)
        except RemoteError as error:
            self.closed.set()
            raise ConnectionClosedError(f"the circuit is gone: {error}") from error

    async def close(self) -> None:
        """Close the stream to the relay."""
        self.closed.set()
        await self._stream.aclose()

    def abort(self) -> None:
        """Cut it at once."""
        self.closed.set()
        self._stream.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return None: where the peer is, only the relay knows."""
        return None


async def connect_through(host: Host, messages: MessageStream, peer_id: str) -> None:
    """Make a stream that a relay has joined to a peer's into a connection with that peer.

    Raises
    ------
    RemoteError
        The handshakes failed, or somebody else is at the other end.
    """
    circuit = CircuitStream(messages)
    raw = _raw(circuit, initiator=True, relay=messages.stream.peer_id)
    try:
        with trio.fail_after(UPGRADE_TIMEOUT_S):
            swarm = _swarm(host)
            protected = host_guard.protected(swarm, raw)
            _keep(await swarm.upgrade_outbound_raw_conn(protected, ID.from_string(peer_id)))
    except trio.TooSlowError as error:
        circuit.abort()
        raise NoSource(f"{peer_id} did not answer through the relay") from error
    except RemoteError:
        circuit.abort()
        raise
    except Exception as error:  # libp2p's layers each have their own kinds
        circuit.abort()
        raise NoSource(f"{peer_id} is not to be had through the relay: {error}") from error
    except BaseException:
        circuit.abort()
        raise


async def accept_through(host: Host, messages: MessageStream) -> tuple[CircuitStream, str]:
    """Do the same on the side that is being connected to.

    Returns
    -------
    CircuitStream
        To be kept open until `closed`.
    str
        The peer at the other end.

    Raises
    ------
    RemoteError
        The handshakes failed.
    """
    circuit = CircuitStream(messages)
    raw = _raw(circuit, initiator=False, relay=messages.stream.peer_id)
    try:
        swarm = _swarm(host)
        muxed = await swarm.upgrade_inbound_raw_conn(raw, Multiaddr(CIRCUIT))
        for conn in swarm.connections.get(muxed.peer_id, ()):
            if conn.muxed_conn is muxed:
                _keep(conn)
    except Exception as error:
        circuit.abort()
        raise NoSource(f"the handshake through the relay failed: {error}") from error
    except BaseException:
        circuit.abort()
        raise
    return circuit, str(muxed.peer_id)


async def leave(host: Host, peer_id: str) -> None:
    """End the connections to a peer that lead through a relay, if there is a direct one."""
    if host.is_relayed(peer_id):
        return
    for conn in list(_swarm(host).connections.get(ID.from_string(peer_id), ())):
        if host_guard.socket_of(conn) is None:
            await goodbye.end(conn)


def _keep(conn: INetConn) -> None:
    """Keep py-libp2p from closing a circuit as soon as the peer is connected directly, too.

    Of two connections it closes the older one when its age is above a limit; what is under
    way in the circuit would be lost. `leave` closes it in its time.
    """
    vars(conn)["_created_at"] = math.inf


def _raw(circuit: CircuitStream, *, initiator: bool, relay: str) -> RawConnection:
    place = Multiaddr(f"/p2p/{relay}{CIRCUIT}")
    return RawConnection(circuit, initiator, ConnectionType.RELAYED, [place])


def _swarm(host: Host) -> Swarm:
    swarm = host.libp2p.get_network()
    assert isinstance(swarm, Swarm)  # `host_guard.build` has seen to that
    return swarm
