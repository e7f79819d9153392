"""A peer as a source, over a libp2p stream: where its bulk plane cannot be reached.

Purpose: carry out the planner's requests as `peer_source` does, with the same ranges, the
same company of small objects and the same HTTP heads, on a stream of
`stream_server.BULK_STREAM_PROTOCOL`. It works on any connection there is to the peer, one
through a relay included.

Rules
- One task, one stream, one reused chunk buffer. Bytes are verified and written in a
  thread, a chunk at a time, so that the other streams of this node go on meanwhile.
- The contract is that of `peer_source`: a request is turned into ranges just before they
  are sent; every request ends in one `done` or `failed`, unless the source as a whole
  fails or is closed; a cut stream costs what was on it, and a second cut without a
  request answered in between ends the source.
- Nothing is reported after `close`.

Not here: which chunks to ask for (the planner), and when a stream is used instead of the
bulk plane (`download`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import trio

from tensorswarm.store.digest import CHUNK_SIZE, chunk_length
from tensorswarm.store.errors import HashMismatch, LocalError, RemoteError

from ..host.host import Stream
from ..limits.rates import RateLimiter
from ..swarm.source import Failure, Outcome, Report, Request, Sink, SmallBatch
from . import http1
from .client import (
    MIN_PIECE_BYTES,
    STALL_TIMEOUT_S,
    Busy,
    Closed,
    Denied,
    Stalled,
    Unreachable,
)
from .http1_small import SmallClientExchange, bitmap_bytes
from .peer_source import IDLE_CLOSE_S, MAX_QUEUED_REQUESTS, TooManyRequests
from .ranges import Range, Together, asks_of

OPEN_TIMEOUT_S = 5.0
"""Seconds to open a stream on a connection that is there: a round trip or two, and what a
busy relay adds."""

MAX_RANGES_AHEAD = 64
"""Range requests on the wire: their 200 bytes each fit yamux's first window (256 KiB), so
that sending them never waits for a peer that is itself sending."""

MAX_WEIGHT_AHEAD = 256
"""The same in units of 200 bytes: a request for many small objects is as long as many others.
51 KiB in all."""

MAX_BYTES_AHEAD = 8 << 20
"""Bytes asked for beyond the answer being read: 1 Gbit/s over 65 ms, more than a libp2p
stream carries."""

_log = logging.getLogger(__name__)

_FAILURES: tuple[tuple[type[RemoteError], Failure], ...] = (
    (Unreachable, Failure.UNREACHABLE),
    (Busy, Failure.UNREACHABLE),
    (Stalled, Failure.STALLED),
    (Denied, Failure.REFUSED_ACCESS),
    (HashMismatch, Failure.BAD_BYTES),
)


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way."""

    request: Request
    ranges: Iterator[Range | Together]
    on_wire: int = 0
    all_sent: bool = False
    cancelled: bool = False
    lacks: bool = False


@dataclass(frozen=True, slots=True)
class _Asked:
    """A range, or small objects, whose answer has not come."""

    what: Range | Together
    exchange: http1.ClientExchange | SmallClientExchange


class StreamSource:
    """Carries out requests at one peer. Implements `source.SourceWorker`.

    Made in a trio task; `submit`, `cancel` and `close` may be called from any thread.

    Parameters
    ----------
    source : str
        The peer id, in base58.
    open_stream : callable
        Opens a stream of the protocol to the peer.
    start_soon : callable
        Runs an operation in the background, as `Host.start_soon` does.
    sink : Sink
        Verifies and stores chunks.
    report : Report
        Hears what became of everything.
    open_timeout_s, stall_timeout_s, idle_close_s : float, optional
        Seconds to open the stream, for any wait on the peer, and without work.
    limiter : RateLimiter, optional
        Holds what all sources receive together below a rate.
    """

    def __init__(
        self,
        source: str,
        open_stream: Callable[[], Awaitable[Stream]],
        start_soon: Callable[[Callable[[], Awaitable[object]]], object],
        sink: Sink,
        report: Report,
        *,
        open_timeout_s: float = OPEN_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        idle_close_s: float = IDLE_CLOSE_S,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._limiter = limiter
        self._turns = trio.CapacityLimiter(1)
        self._source = source
        self._open_stream = open_stream
        self._sink = sink
        self._report = report
        self._open_timeout_s = open_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._idle_close_s = idle_close_s
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._lock = threading.Lock()
        self._queue: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._stopped = False
        self._woken = trio.Event()
        self._stream: Stream | None = None
        self._rest = memoryview(b"")  # received and not consumed
        self._buffer = memoryview(bytearray(CHUNK_SIZE))
        self._wire: deque[tuple[_Job, _Asked]] = deque()
        self._wire_bytes = self._wire_weight = 0
        self._cuts = 0  # since a request was last answered
        start_soon(self._run)

    # ---- for any thread

    def submit(self, request: Request) -> None:
        """Queue a request behind those already submitted; ignored after the end.

        Raises
        ------
        TooManyRequests
            `MAX_QUEUED_REQUESTS` are waiting.
        """
        with self._lock:
            if self._stopped:
                return
            if len(self._queue) >= MAX_QUEUED_REQUESTS:
                raise TooManyRequests(f"{MAX_QUEUED_REQUESTS} requests wait for {self._source}")
            job = _Job(request, asks_of(request, self._sink))
            self._queue.append(job)
            self._jobs[request.request_id] = job
        self._soon(self._wake)

    def cancel(self, request_id: int) -> None:
        """Skip what has not been sent of a request; what is on the wire still comes."""
        with self._lock:
            job = self._jobs.get(request_id)
            if job is not None:
                job.cancelled = True

    def close(self) -> None:
        """Stop soon: the stream is closed and nothing is reported after."""
        if self._stop():
            self._soon(self._scope.cancel)

    def _soon(self, function: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):  # then the task has ended, too
            self._token.run_sync_soon(function)

    def _wake(self) -> None:
        self._woken.set()

    def _stop(self) -> bool:
        with self._lock:
            if self._stopped:
                return False
            self._stopped = True
            self._queue.clear()
            self._jobs.clear()
            return True

    # ---- the task

    async def _run(self) -> None:
        try:
            with self._scope:
                while not self._stopped:
                    await self._try_step()
        except Exception as error:  # ours or the sink's: without this, a silent stall
            _log.exception("a stream worker failed")
            self._fail(Failure.LOCAL, f"{type(error).__name__}: {error}")
        finally:
            self._stop()
            self._disconnect()

    async def _try_step(self) -> None:
        try:
            await self._step()
        except Closed as error:
            self._take_cut(str(error))
        except RemoteError as error:
            kinds = (failure for kind, failure in _FAILURES if isinstance(error, kind))
            self._fail(next(kinds, Failure.PROTOCOL), str(error))
        except (LocalError, OSError) as error:  # the sink's: libp2p raises RemoteError
            self._fail(Failure.LOCAL, str(error))

    async def _step(self) -> None:
        """Send what may be sent, then receive one chunk."""
        if not self._wire and not self._queue:
            await self._wait_for_work()
            return
        if self._stream is None:
            self._stream = await self._connect()
        await self._send_ahead(self._stream)
        if self._wire:
            await self._receive_answer(self._stream)

    async def _wait_for_work(self) -> None:
        self._woken = trio.Event()
        if self._queue:  # came in before the event was new
            return
        with trio.move_on_after(self._idle_close_s) as idle:
            await self._woken.wait()
        if idle.cancelled_caught:
            self._disconnect()

    async def _connect(self) -> Stream:
        with trio.move_on_after(self._open_timeout_s):
            try:
                return await self._open_stream()
            except RemoteError as error:
                raise Unreachable(f"no stream to it: {error}") from error
        raise Unreachable(f"opened no stream within {self._open_timeout_s:g} s")

    # ---- asking

    async def _send_ahead(self, stream: Stream) -> None:
        """Fill the wire when it is half empty, so that small requests leave together."""
        if not self._has_room(2):
            return
        heads = []
        while self._has_room(1):
            found = self._next_range()
            if found is None:
                break
            job, what = found
            exchange: http1.ClientExchange | SmallClientExchange
            if isinstance(what, Together):
                exchange = SmallClientExchange(what.asked, self._source)
            else:
                exchange = http1.ClientExchange(what.asked, self._source)
            self._wire.append((job, _Asked(what, exchange)))
            self._wire_bytes += what.asked.length
            self._wire_weight += what.weight
            heads.append(exchange.encoded)
        if not heads:
            return
        try:
            with trio.fail_after(self._stall_timeout_s):
                await stream.send(b"".join(heads))
        except trio.TooSlowError as error:
            raise Stalled(f"took no request within {self._stall_timeout_s:g} s") from error
        except RemoteError as error:
            raise Closed(str(error)) from error

    def _has_room(self, parts: int) -> bool:
        """Tell whether less than one of so many parts of what may be on the wire is there."""
        return (
            len(self._wire) < MAX_RANGES_AHEAD // parts
            and self._wire_weight < MAX_WEIGHT_AHEAD // parts
            and self._wire_bytes < MAX_BYTES_AHEAD // parts
        )

    def _next_range(self) -> tuple[_Job, Range | Together] | None:
        while self._queue:
            job = self._queue[0]
            if not job.cancelled and not job.lacks:
                for found in job.ranges:
                    job.on_wire += 1
                    return job, found
            with self._lock:
                if self._stopped:
                    return None
                self._queue.popleft()
            job.all_sent = True
            self._finish_if_through(job)
        return None

    # ---- receiving

    async def _receive_answer(self, stream: Stream) -> None:
        job, asked = self._wire[0]
        answer = asked.exchange.read_head(await self._receive_head(stream))
        if answer is http1.Answer.DENIED:
            raise Denied("does not let us have anything")
        if answer is http1.Answer.BUSY:
            raise Busy("has no capacity for another stream")
        what = asked.what
        if answer is http1.Answer.LACKS:
            job.lacks = True
        elif isinstance(what, Together):
            assert isinstance(asked.exchange, SmallClientExchange)  # made for it
            await self._receive_small(stream, job, what, asked.exchange)
        else:
            for chunk in range(what.first_chunk, what.first_chunk + what.chunks):
                await self._receive_chunk(stream, job, what, chunk)
        self._wire.popleft()
        self._wire_bytes -= what.asked.length
        self._wire_weight -= what.weight
        job.on_wire -= 1
        self._finish_if_through(job)

    async def _receive_small(
        self, stream: Stream, job: _Job, what: Together, exchange: SmallClientExchange
    ) -> None:
        """Take an answer with many small objects; those it leaves out are lacking."""
        objects = what.asked.objects
        given = bytearray(bitmap_bytes(len(objects)))
        await self._fill(stream, None, memoryview(given))
        positions = exchange.read_bitmap(given)
        data = self._buffer[: sum(objects[i].size_bytes for i in positions)]
        await self._fill(stream, job, data)
        parts, start = [], 0
        for i in positions:
            stop = start + objects[i].size_bytes
            parts.append((what.object_indices[i], data[start:stop]))
            start = stop
        outcomes = await trio.to_thread.run_sync(self._sink.write_small, parts)
        if not self._stopped:
            batch = SmallBatch.of(parts, outcomes)
            self._report.small(self._source, job.request.request_id, batch)
        if Outcome.REFUSED in outcomes:
            digest, _ = objects[positions[outcomes.index(Outcome.REFUSED)]]
            raise HashMismatch(f"the bytes of object {digest.hex()} do not match its hash")
        job.lacks = job.lacks or len(positions) < len(objects)

    async def _receive_head(self, stream: Stream) -> bytes:
        data = bytearray()
        with trio.move_on_after(self._stall_timeout_s):
            while True:
                if not self._rest:
                    self._rest = memoryview(await self._receive(stream))
                known = len(data)
                data += self._rest[: http1.MAX_HEAD_BYTES]
                end = http1.find_head(data, 0, len(data))
                if end is not None:
                    self._rest = self._rest[end - known :]
                    return bytes(data[:end])
                self._rest = self._rest[len(data) - known :]
        raise Stalled(f"no answer within {self._stall_timeout_s:g} s")

    async def _receive_chunk(self, stream: Stream, job: _Job, found: Range, chunk: int) -> None:
        length = chunk_length(found.object_size, chunk)
        data = self._buffer[:length]
        await self._fill(stream, job, data)
        index = found.object_index
        outcome = await trio.to_thread.run_sync(self._sink.write_chunk, index, chunk, data)
        if not self._stopped:
            request_id = job.request.request_id
            self._report.chunk(self._source, request_id, index, chunk, outcome, length)
        if outcome is Outcome.REFUSED:
            raise HashMismatch(
                f"chunk {chunk} of object {found.asked.digest.hex()} does not match its hash"
            )

    async def _fill(self, stream: Stream, job: _Job | None, data: memoryview) -> None:
        """Fill `data` with what comes next; it is progress of a job, or of none."""
        filled = reported = 0
        while filled < len(data):
            if not self._rest:
                with trio.move_on_after(self._stall_timeout_s):
                    self._rest = memoryview(await self._receive(stream))
                if not self._rest:
                    raise Stalled(f"nothing moved for {self._stall_timeout_s:g} s")
            piece = self._rest[: len(data) - filled]
            if self._limiter is not None and job is not None:
                piece = piece[: self._limiter.slice_bytes]
                await trio.to_thread.run_sync(
                    self._limiter.take,
                    self._source,
                    len(piece),
                    abandon_on_cancel=True,
                    limiter=self._turns,
                )
            data[filled : filled + len(piece)] = piece
            self._rest = self._rest[len(piece) :]
            filled += len(piece)
            came = filled - reported
            # A few bytes now and then are a stall, so the planner is not told of them.
            if job is None or self._stopped:
                continue
            if came >= MIN_PIECE_BYTES or filled == len(data):
                self._report.progress(self._source, job.request.request_id, came)
                reported = filled

    async def _receive(self, stream: Stream) -> bytes:
        try:
            data = await stream.receive_some()
        except RemoteError as error:
            raise Closed(str(error)) from error
        if not data:
            raise Closed("closed the stream before the end of an answer")
        return data

    # ---- ends

    def _finish_if_through(self, job: _Job) -> None:
        if not job.all_sent or job.on_wire:
            return
        self._cuts = 0
        if job.lacks:
            self._finish(job, Failure.LACKS, "does not have these bytes")
        else:
            self._finish(job)

    def _finish(self, job: _Job, failure: Failure | None = None, detail: str = "") -> None:
        request_id = job.request.request_id
        with self._lock:
            self._jobs.pop(request_id, None)
            if self._stopped:
                return
        if failure is None:
            self._report.done(self._source, request_id)
        else:
            self._report.failed(self._source, request_id, failure, detail)

    def _take_cut(self, detail: str) -> None:
        """Give up what was on a stream that was cut; the rest gets one more."""
        lost = dict.fromkeys(job for job, _ in self._wire)
        self._disconnect()
        self._cuts += 1
        if self._cuts > 1:
            self._fail(Failure.CLOSED, detail)
            return
        with self._lock:
            self._queue = deque(job for job in self._queue if job not in lost)
        for job in lost:
            self._finish(job, Failure.CLOSED, detail)

    def _fail(self, failure: Failure, detail: str) -> None:
        """End the source and report why, once."""
        if self._stop():
            self._report.failed(self._source, None, failure, detail)

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None
        self._wire.clear()
        self._wire_bytes = self._wire_weight = 0
        self._rest = memoryview(b"")
