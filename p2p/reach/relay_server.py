"""Being a relay: circuit relay v2, the relay's side.

Purpose: let peers that nobody can reach be reached through this node. A peer makes a
reservation on the connection that it has to us; whoever wants to speak with it asks us to
join a stream to it. Standard protocol, so go-libp2p and js-libp2p nodes can use it too:
https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md

Rules
- Everything is bounded (`RelayLimits`): reservations in all and of one address, circuits in
  all and of one peer, the time and the bytes of each circuit.
- Nobody is dialled: a circuit leads only to peers that are connected and have reserved.
- No circuit over a circuit.
- A reservation ends with its time or with the connection it was made on.
- Bytes are passed on as they come, at most `host_stream.READ_SIZE` held for each direction.
  They are encrypted between the end points; a relay can count them, and stop.

Rejected: py-libp2p's own relay (`CircuitV2Protocol`, 0.8.1). It keeps one circuit per peer
in its table, writes status messages into the midst of relayed bytes when a limit is
reached, sleeps in its handlers, and reads under deadlines that cancel inside a frame.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    HopMessage,
    Limit,
    Reservation,
    Status,
    StopMessage,
)
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, ProtocolError, RemoteError

from ..host.addresses import is_circuit, with_peer_id
from ..host.host import Host, Stream
from ..limits.rates import RateLimiter
from .relay_wire import HOP_PROTOCOL, MESSAGE_TIMEOUT_S, STOP_PROTOCOL, MessageStream, voucher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives.

    Attributes
    ----------
    reservations : int
        Peers that may be reached through it (go-libp2p: 128).
    reservations_per_host : int
        Of those, with the same IP address (go-libp2p: 8).
    reservation_s : int
        How long one lasts (go-libp2p: an hour); it is renewed at half of that.
    circuits : int
        Circuits at once: with 2 MiB held for each, 64 MiB.
    circuits_per_peer : int
        Of those, with the same peer at one of the ends.
    circuit_s : int
        How long one lasts: half a day, for a large model over a slow line.
    circuit_bytes : int
        Bytes in each direction: 64 GiB. With the usual 128 KiB a relay helps two peers to
        meet; this one is meant to carry models between peers that cannot.
    """

    reservations: int = 128
    reservations_per_host: int = 8
    reservation_s: int = 3600
    circuits: int = 32
    circuits_per_peer: int = 8
    circuit_s: int = 12 * 3600
    circuit_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    """What a relay does, and did.

    Attributes
    ----------
    reservations, circuits : int
        Now.
    refused : int
        Requests refused so far.
    bytes_relayed : int
        In both directions, so far.
    """

    reservations: int
    circuits: int
    refused: int
    bytes_relayed: int


class RelayServer:
    """A relay on a host.

    Parameters
    ----------
    host : Host
        Ours.
    limits : RelayLimits, optional
        What it gives.
    allow : callable, optional
        From a peer id to whether it may reserve and connect.
    limiter : RateLimiter, optional
        Holds what is passed on, with all else that the node gives, below a rate.
    clock : callable, optional
        Seconds since 1970.
    """

    def __init__(
        self,
        host: Host,
        limits: RelayLimits | None = None,
        *,
        allow: Callable[[str], bool] = lambda _peer_id: True,
        limiter: RateLimiter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._limits = limits or RelayLimits()
        self._allow = allow
        self._limiter = limiter
        self._turns = trio.CapacityLimiter(2 * self._limits.circuits)
        self._clock = clock
        self._reserved: dict[str, tuple[float, str]] = {}  # until when, and the IP address
        self._circuits: Counter[str] = Counter()
        self._count = self._refused = self._bytes = 0

    def start(self) -> None:
        """Begin to take requests."""
        self._host.set_handler(HOP_PROTOCOL, self._handle)

    def statistics(self) -> RelayStatistics:
        """Return what it does."""
        self._expire()
        return RelayStatistics(len(self._reserved), self._count, self._refused, self._bytes)

    async def _handle(self, peer_id: str, stream: Stream) -> None:
        messages = MessageStream(stream)
        asked = await messages.read(HopMessage)
        if self._host.is_relayed(peer_id) or not self._allow(peer_id):
            await self._refuse(messages, Status.PERMISSION_DENIED)
        elif asked.type == HopMessage.RESERVE:
            await self._reserve(peer_id, messages)
        elif asked.type == HopMessage.CONNECT and asked.HasField("peer"):
            await self._connect(peer_id, _peer_id(asked.peer.id), messages)
        else:
            await self._refuse(messages, Status.UNEXPECTED_MESSAGE)

    async def _refuse(self, messages: MessageStream, status: Status.ValueType) -> None:
        self._refused += 1
        await messages.write(HopMessage(type=HopMessage.STATUS, status=status))

    # ---- reservations

    def _expire(self) -> None:
        now = self._clock()
        for peer_id, (until, _) in list(self._reserved.items()):
            if now >= until or not self._host.is_connected(peer_id):
                del self._reserved[peer_id]

    async def _reserve(self, peer_id: str, messages: MessageStream) -> None:
        self._expire()
        place = self._host.remote_host(peer_id) or ""
        others = [host for peer, (_, host) in self._reserved.items() if peer != peer_id]
        limits = self._limits
        if len(others) >= limits.reservations or others.count(place) >= (
            limits.reservations_per_host
        ):
            await self._refuse(messages, Status.RESERVATION_REFUSED)
            return
        until = int(self._clock()) + limits.reservation_s
        self._reserved[peer_id] = (until, place)
        addrs = [addr for addr in self._host.advertised_addrs() if not is_circuit(addr)]
        await messages.write(
            HopMessage(
                type=HopMessage.STATUS,
                status=Status.OK,
                reservation=Reservation(
                    expire=until,
                    addrs=[
                        Multiaddr(with_peer_id(addr, self._host.peer_id)).to_bytes()
                        for addr in addrs
                    ],
                    voucher=voucher(self._host, ID.from_string(peer_id).to_bytes(), until),
                ),
                limit=self._limit(),
            )
        )

    def _limit(self) -> Limit:
        return Limit(duration=self._limits.circuit_s, data=self._limits.circuit_bytes)

    # ---- circuits

    async def _connect(self, source: str, target: str, messages: MessageStream) -> None:
        self._expire()
        if target not in self._reserved:
            await self._refuse(messages, Status.NO_RESERVATION)
            return
        most = self._limits.circuits_per_peer
        if (
            self._count >= self._limits.circuits
            or self._circuits[source] >= most
            or self._circuits[target] >= most
        ):
            await self._refuse(messages, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self._note(source, target, 1)
        try:
            await self._join(source, target, messages)
        finally:
            self._note(source, target, -1)

    def _note(self, source: str, target: str, change: int) -> None:
        self._count += change
        for peer_id in (source, target):
            self._circuits[peer_id] += change
            if not self._circuits[peer_id]:
                del self._circuits[peer_id]

    async def _join(self, source: str, target: str, messages: MessageStream) -> None:
        try:
            other = await self._call(source, target)
        except RemoteError as error:
            _log.info("no circuit from %s to %s: %s", source, target, error)
            await self._refuse(messages, Status.CONNECTION_FAILED)
            return
        try:
            await messages.write(
                HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
            )
            with trio.move_on_after(self._limits.circuit_s):
                async with trio.open_nursery() as nursery:
                    ends = nursery.cancel_scope
                    nursery.start_soon(self._pass_on, messages, other, ends)
                    nursery.start_soon(self._pass_on, other, messages, ends)
        finally:
            other.stream.abort()
            messages.stream.abort()

    async def _call(self, source: str, target: str) -> MessageStream:
        """Open a stream to a peer that has reserved, and ask whether it wants the circuit."""
        stream = await self._host.open_stream(target, STOP_PROTOCOL, MESSAGE_TIMEOUT_S)
        messages = MessageStream(stream)
        try:
            call = StopMessage(type=StopMessage.CONNECT, limit=self._limit())
            call.peer.id = ID.from_string(source).to_bytes()
            await messages.write(call)
            answer = await messages.read(StopMessage)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise NoSource(f"{target} does not want it (status {answer.status})")
        except BaseException:
            stream.abort()
            raise
        return messages

    async def _send(self, taker: Stream, data: bytes) -> None:
        if self._limiter is None:
            await taker.send(data)
            return
        step = self._limiter.slice_bytes
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            await trio.to_thread.run_sync(
                self._limiter.take, taker.peer_id, len(piece), limiter=self._turns
            )
            await taker.send(piece)

    async def _pass_on(
        self, giver: MessageStream, taker: MessageStream, ends: trio.CancelScope
    ) -> None:
        """Pass bytes on until one side ends, or the limit is reached; that ends both."""
        left = self._limits.circuit_bytes
        data = giver.rest
        try:
            while left > 0:
                if data:
                    left -= len(data)
                    self._bytes += len(data)
                    await self._send(taker.stream, data)
                data = await giver.stream.receive_some()
                if not data:
                    break
        except RemoteError as error:
            _log.debug("a circuit ended: %s", error)
        ends.cancel()


def _peer_id(raw: bytes) -> str:
    try:
        return str(ID(raw))
    except Exception as error:
        raise ProtocolError("a relay request for what is no peer id") from error
