"""The bulk plane over libp2p streams, serving half: for peers that cannot dial us.

Purpose: answer the requests of the bulk plane (see `http1`) on streams of
`BULK_STREAM_PROTOCOL`, on whatever connection the peer has to us: one that it dialled,
one that we dialled because it cannot be reached, or one through a relay.

Rules
- The same requests, answers and refusals as over TLS, and the same access rule, asked
  for every request: who said hello and may have bytes.
- Everything is bounded: streams of one peer and in all, the head of a request, the wait
  for the next one, the time that a reader may take for each slice of bytes.
- Disks are read in threads, `SLICE_BYTES` at a time; a stream holds one such buffer.
- A peer that breaks the protocol is told so (400) and its stream ends.

Not here: what is in the store and who is allowed (`open_reader` is called in threads,
`allow` is not).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from tensorswarm.store.errors import LocalError, NoSource, ProtocolError
from tensorswarm.store.reader import ObjectReader

from ..host.host import Stream
from ..limits.rates import RateLimiter
from . import http1
from .gate import Gate
from .http1_small import SmallServerExchange, read_request
from .peer_reader import PeerReader
from .small_objects import SmallObjects, read_each

BULK_STREAM_PROTOCOL = "/tensorswarm/bulk/1"
"""Protocol id of a stream that carries requests of the bulk plane."""

MAX_STREAMS = 64
"""Streams served at once: with a buffer of 256 KiB each, 16 MiB. As many as the bulk
server's connections."""

MAX_STREAMS_PER_PEER = 4
"""Streams of one peer: one is used, the others are for those that are being replaced."""

SLICE_BYTES = 256 << 10
"""Bytes read from the disk and sent at a time. Larger ones are not faster (measured up to
1 MiB); a hop to a thread costs 0.1 ms, which at 100 MB/s is 4 % of the time."""

FIRST_REQUEST_TIMEOUT_S = 5.0
"""Seconds for the first request of a stream: whoever opens one has something to ask."""

IDLE_TIMEOUT_S = 60.0
"""Seconds that a stream may be without a request, as on the bulk plane."""

SEND_TIMEOUT_S = 20.0
"""Seconds in which a peer must take a slice: with 256 KiB, 13 kB/s. py-libp2p itself gives
up when a peer's window stays shut for 5 s."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """What was served over streams so far.

    Attributes
    ----------
    streams : int
        Streams open now.
    turned_away : int
        Streams answered 503 because a limit was reached.
    requests : int
        Requests answered, refusals included.
    bytes_sent : int
        Object bytes handed to libp2p.
    """

    streams: int
    turned_away: int
    requests: int
    bytes_sent: int


class StreamServer:
    """Serves objects over libp2p streams. Give `handle` to a `Host` as a handler.

    Parameters
    ----------
    open_reader : callable
        From a digest to a reader, or None when there is no such object.
    allow : callable
        From a peer id to whether it may have anything.
    limiter : RateLimiter, optional
        Holds what is sent in all below a rate.
    read_small : callable, optional
        Reads many small objects at once, in threads; by default, one after the other.
    may_have : callable, optional
        Tells whether a peer may have an object; if not, it is answered as missing.
    gate : Gate, optional
        Where requests for parts of objects wait for their turn, as in the bulk server.
    max_streams, max_streams_per_peer : int, optional
        Streams served at once; further ones are answered 503.
    first_request_timeout_s, idle_timeout_s, send_timeout_s : float, optional
        Seconds for the first request, for each next one, and for a slice to be taken.
    """

    def __init__(
        self,
        open_reader: Callable[[bytes], ObjectReader | None],
        allow: Callable[[str], bool],
        *,
        limiter: RateLimiter | None = None,
        read_small: SmallObjects | None = None,
        may_have: Callable[[str, bytes], bool] = lambda _peer_id, _digest: True,
        gate: Gate | None = None,
        max_streams: int = MAX_STREAMS,
        max_streams_per_peer: int = MAX_STREAMS_PER_PEER,
        first_request_timeout_s: float = FIRST_REQUEST_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        self.open_reader = open_reader
        self.allow = allow
        self.read_small: SmallObjects = read_small or partial(read_each, open_reader)
        self.may_have = may_have
        self.gate = gate
        self.limiter = limiter
        self.slice_bytes = min(SLICE_BYTES, limiter.slice_bytes) if limiter else SLICE_BYTES
        # Threads of their own: those who wait for a turn must not keep others from the disk.
        self.turns = trio.CapacityLimiter(max_streams)
        self.first_request_timeout_s = first_request_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.send_timeout_s = send_timeout_s
        self._max_streams = max_streams
        self._max_streams_per_peer = max_streams_per_peer
        self._open: Counter[str] = Counter()
        self._turned_away = 0
        self.requests = 0
        self.bytes_sent = 0

    async def handle(self, peer_id: str, stream: Stream) -> None:
        """Answer the requests on a stream until the peer is through.

        Raises
        ------
        RemoteError
            The peer was too slow, or was lost.
        """
        is_full = (
            self._open.total() >= self._max_streams
            or self._open[peer_id] >= self._max_streams_per_peer
        )
        if is_full:
            self._turned_away += 1
        self._open[peer_id] += 1  # also while it is turned away: that takes time too
        try:
            await _Service(self, peer_id, stream, is_full=is_full).answer_all()
        except ProtocolError as error:  # it was told so; the stream is closed, not reset
            _log.info("peer %s %s", peer_id, error)
        except LocalError as error:
            _log.warning("cut peer %s off: %s", peer_id, error)
            stream.abort()
        finally:
            self._open[peer_id] -= 1
            if not self._open[peer_id]:
                del self._open[peer_id]

    def is_serving(self, peer_id: str) -> bool:
        """Tell whether a peer has a stream for bytes open."""
        return peer_id in self._open

    def statistics(self) -> StreamStatistics:
        """Return what was served so far."""
        return StreamStatistics(
            self._open.total(), self._turned_away, self.requests, self.bytes_sent
        )


class _Service:
    """One stream that is being served."""

    def __init__(self, server: StreamServer, peer_id: str, stream: Stream, *, is_full: bool):
        self._server = server
        self._peer_id = peer_id
        self._stream = stream
        self._is_full = is_full
        self._input = bytearray()
        self._output = bytearray()
        self._reader = PeerReader(
            peer_id, server.open_reader, server.read_small, server.may_have, server.gate
        )

    async def answer_all(self) -> None:
        try:
            wait_s = self._server.first_request_timeout_s
            while (head := await self._next_head(wait_s)) is not None:
                if not await self._answer(head):
                    return
                wait_s = self._server.idle_timeout_s
        finally:
            self._reader.close()

    async def _next_head(self, wait_s: float) -> bytes | None:
        """Return the next request's head, or None when the peer is through."""
        with trio.move_on_after(wait_s):
            while (end := http1.find_head(self._input, 0, len(self._input))) is None:
                await self._flush()
                data = await self._stream.receive_some()
                if not data:
                    return None
                self._input += data
            head = bytes(self._input[:end])
            del self._input[:end]
            return head
        if self._input:
            raise ProtocolError("did not finish a request")
        return None

    async def _answer(self, head: bytes) -> bool:
        """Answer a request; False when the stream ends with that."""
        self._server.requests += 1
        try:
            exchange = read_request(head)
        except ProtocolError:
            await self._send(http1.bad_request())
            raise
        if self._is_full:
            await self._send(exchange.refusal(http1.UNAVAILABLE))
            return False
        if not self._server.allow(self._peer_id):
            await self._send(exchange.refusal(http1.FORBIDDEN))
            return False
        if isinstance(exchange, SmallServerExchange):
            await self._answer_small(exchange)
            return True
        _, offset, length = exchange.request
        reader = await trio.to_thread.run_sync(self._reader.reader_for, exchange.request)
        if reader is None:
            self._output += exchange.refusal(http1.NOT_FOUND)
        elif not reader.covers(offset, length):
            self._output += exchange.refusal(http1.RANGE_NOT_SATISFIABLE)
        else:
            await self._answer_part(exchange, reader)
        return True

    async def _answer_part(self, exchange: http1.ServerExchange, reader: ObjectReader) -> None:
        digest, offset, length = exchange.request
        gate, ticket = self._server.gate, None
        if gate is not None and gate.concerns(self._peer_id, digest):
            await self._flush()  # others wait for what is collected
            ticket = await trio.to_thread.run_sync(
                gate.ask, self._peer_id, digest, offset, limiter=self._server.turns
            )
        try:
            self._output += exchange.partial_content(reader.size_bytes)
            await self._put_body(reader, offset, offset + length)
        finally:
            if gate is not None and ticket is not None:
                gate.end(ticket)

    async def _answer_small(self, exchange: SmallServerExchange) -> None:
        body = await self._next_body(exchange.body_bytes)
        try:
            request = exchange.read_body(body)
        except ProtocolError:
            await self._send(http1.bad_request())
            raise
        found = await trio.to_thread.run_sync(self._reader.small, request.objects)
        head, answer = exchange.answer(found)
        self._output += head
        step = self._server.slice_bytes
        for start in range(0, len(answer), step):
            piece = answer[start : start + step]
            await self._take_room(len(piece))
            self._output += piece
            if len(self._output) >= step:
                await self._flush()
        self._server.bytes_sent += sum(len(data) for data in found if data is not None)

    async def _next_body(self, size_bytes: int) -> bytes:
        """Return the body of a request; at most 10 KiB, so it may wait in memory."""
        with trio.move_on_after(self._server.idle_timeout_s):
            while len(self._input) < size_bytes:
                await self._flush()
                data = await self._stream.receive_some()
                if not data:
                    break
                self._input += data
        if len(self._input) < size_bytes:
            raise ProtocolError("did not finish a request")
        body = bytes(self._input[:size_bytes])
        del self._input[:size_bytes]
        return body

    async def _take_room(self, length: int) -> None:
        """Wait until bytes may be sent."""
        if self._server.limiter is not None:
            await trio.to_thread.run_sync(
                self._server.limiter.take, self._peer_id, length, limiter=self._server.turns
            )

    async def _put_body(self, reader: ObjectReader, offset: int, end: int) -> None:
        """Send an object's bytes; what does not fill a slice waits for the next answer."""
        while offset < end:
            room = self._server.slice_bytes - len(self._output)
            if room <= 0:
                await self._flush()
                continue
            length = min(room, end - offset)
            await self._take_room(length)
            self._output += await trio.to_thread.run_sync(self._read, reader, offset, length)
            self._server.bytes_sent += length
            offset += length

    def _read(self, reader: ObjectReader, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        try:
            reader.read_into(offset, memoryview(data))
        except OSError as error:
            raise LocalError(f"cannot read an object that was asked for: {error}") from error
        return data

    async def _send(self, last: bytes) -> None:
        self._output += last
        await self._flush()

    async def _flush(self) -> None:
        if not self._output:
            return
        data, self._output = bytes(self._output), bytearray()
        try:
            with trio.fail_after(self._server.send_timeout_s):
                await self._stream.send(data)
        except trio.TooSlowError as error:
            raise NoSource(f"peer {self._peer_id} does not take what it asked for") from error
