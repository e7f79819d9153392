"""A peer as a source: carries out the planner's requests over bulk connections.

Purpose: take requests from a bounded queue, ask for their bytes ahead of what has
arrived, and hand every chunk to the sink, which verifies and stores it.

Rules
- One thread per connection, one reused chunk buffer per thread, nothing kept.
- A request is turned into range requests just before they are sent: chunks that
  somebody else has brought meanwhile are not asked for, and a cancelled request is
  not continued. What is on the wire already is taken and counted.
- Every request ends in exactly one `done` or `failed`, a cancelled one in `done`
  (nothing more will come of it), unless the source as a whole fails or is closed.
- Bytes that do not match their hash, a broken protocol, refused access, a stall and a
  fault of our own end the source. A request for bytes that the peer lacks ends that
  request.
- A cut connection costs what was under way on it, no more: a new one is made at once and
  asked for what has not come. That is nobody's fault as long as there is progress: a
  source ends with the fourth cut in a row without a whole chunk in between.
- How much is asked for ahead, and over how many connections, follows from what was
  measured (see `wire_plan`): a long wire must be full while one connection is made anew.
- After `close` nothing is reported, but a report that another thread has begun may
  still be running when `close` returns: waiting for it could deadlock the caller.

Not here: which chunks to ask for (the planner), and how fast is fast enough.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from tensorswarm.store.digest import CHUNK_SIZE, chunk_length
from tensorswarm.store.errors import HashMismatch, LocalError, RemoteError

from ..limits.rates import RateLimiter
from ..swarm.source import Failure, Outcome, Report, Request, Sink, SmallBatch
from .client import (
    STALL_TIMEOUT_S,
    BulkConnection,
    Busy,
    Closed,
    Denied,
    Lacks,
    Stalled,
    Unreachable,
)
from .desk import MAX_QUEUED_REQUESTS, Desk, Job, TooManyRequests
from .dial import RACE_TIMEOUT_S, Race
from .http1 import RangeRequest
from .http1_small import SmallRequest
from .ranges import MAX_RANGE_CHUNKS, Range, Together, asks_of
from .tls import BulkIdentity
from .wire_plan import MAX_CONNECTIONS, Pace, connections_for

__all__ = ["MAX_QUEUED_REQUESTS", "MAX_RANGES_AHEAD", "PeerSource", "TooManyRequests"]

MAX_RANGES_AHEAD = 256
"""Range requests on the wire: their 200 bytes each fit the sockets' buffers, so that
sending them cannot wait for a peer that is itself sending. Five small objects, of 40
bytes each in their request, count as one."""

MAX_CUTS_IN_VAIN = 3
"""Connections in a row that may be cut before a chunk came whole. On a wire that cuts every
5 s on average, one in twenty lives no longer than its handshakes; a peer that always cuts
is out at the planner's 3 s of silence at the latest."""

QUICK_FAILURE_S = 0.6
"""Time within which a first attempt to connect may fail and is made again: with it, both
are over before the planner's 3 s of silence."""

PROGRESS_INTERVAL_S = 0.25
"""Seconds after which progress is reported before a piece is full: often enough for the
planner's 3 s, whatever the rate."""

LIMITED_RECEIVE_S = 0.1
"""Seconds of a limited rate that the kernel may receive ahead of us: more would be a
burst on the line, less a brake where the round trip is as long."""

MIN_RECEIVE_BYTES = 32 << 10
"""Smallest receive buffer: two TLS records."""

IDLE_CLOSE_S = 30.0
"""Seconds without work after which a connection is given back: half of the server's
own patience, so that no request meets a connection that is just being closed."""

_log = logging.getLogger(__name__)


class PeerSource:
    """Carries out requests at one peer. Implements `source.SourceWorker`.

    Parameters
    ----------
    source : str
        The peer id, in base58.
    addresses : sequence of (str, int)
        Where its bulk server may be reached, best first; raced (see `bulk.dial`).
    identity : BulkIdentity
        Our certificate.
    sink : Sink
        Verifies and stores chunks.
    report : Report
        Hears what became of everything.
    connections : int, optional
        Connections at most, each opened when there is work for it. By default one, and
        more when that one shows that the peer is far away (see `wire_plan`).
    pipeline_depth : int, optional
        Requests that one connection has begun at the same time.
    connect_timeout_s, stall_timeout_s, idle_close_s : float, optional
        Seconds to connect, for any wait on the peer, and without work.
    limiter : RateLimiter, optional
        Holds what all sources receive together below a rate.
    """

    def __init__(
        self,
        source: str,
        addresses: Sequence[tuple[str, int]],
        identity: BulkIdentity,
        sink: Sink,
        report: Report,
        *,
        connections: int | None = None,
        pipeline_depth: int = 4,
        connect_timeout_s: float = RACE_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        idle_close_s: float = IDLE_CLOSE_S,
        limiter: RateLimiter | None = None,
    ) -> None:
        ahead_bytes = None
        if limiter is not None:
            ahead_bytes = max(MIN_RECEIVE_BYTES, int(limiter.bytes_per_s * LIMITED_RECEIVE_S))

        def race() -> Race:
            return Race(
                addresses,
                identity,
                source,
                timeout_s=connect_timeout_s,
                stall_timeout_s=stall_timeout_s,
                max_receive_bytes=ahead_bytes,
            )

        self._desk = Desk(source, sink, report, limiter)

        def make_worker(number: int) -> _Worker:
            return _Worker(
                self._desk,
                race,
                pipeline_depth,
                idle_close_s,
                f"bulk-{source[-6:]}-{number}",
                self._note_round_trip,
            )

        self._make_worker = make_worker
        self._connections = connections or MAX_CONNECTIONS
        self._growing = threading.Lock()
        self._workers: list[_Worker] = []
        self._grow(connections or 1)

    def _grow(self, wanted: int) -> None:
        with self._growing:
            while len(self._workers) < min(wanted, self._connections) and not self._desk.stopped:
                worker = self._make_worker(len(self._workers))
                self._workers.append(worker)
                worker.thread.start()

    def _note_round_trip(self, round_trip_s: float) -> None:
        """Have as many connections as a round trip asks for; called by a worker."""
        self._grow(connections_for(round_trip_s))

    def submit(self, request: Request) -> None:
        """Queue a request behind those already submitted.

        After `close`, or after the source has failed as a whole, it is ignored.

        Raises
        ------
        TooManyRequests
            `MAX_QUEUED_REQUESTS` are waiting.
        """
        self._desk.submit(request)

    def cancel(self, request_id: int) -> None:
        """Skip what has not been sent of a request; what is on the wire still comes.

        It is reported as done when nothing more will come of it.
        """
        self._desk.cancel(request_id)

    def close(self) -> None:
        """Stop: connections are cut, threads end soon, nothing is reported after."""
        self._desk.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end after `close`; False when some still run."""
        deadline = time.monotonic() + timeout_s
        with self._growing:
            workers = list(self._workers)
        for worker in workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        return not any(worker.thread.is_alive() for worker in workers)


class _Worker:
    """One thread and its connection."""

    def __init__(
        self,
        desk: Desk,
        race: Callable[[], Race],
        pipeline_depth: int,
        idle_close_s: float,
        name: str,
        note_round_trip: Callable[[float], None],
    ) -> None:
        self._note_round_trip = note_round_trip
        self._pace = Pace()
        self._again: deque[Job] = deque()  # begun on a connection that was cut
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._desk = desk
        self._race = race
        self._pipeline_depth = pipeline_depth
        self._idle_close_s = idle_close_s
        self._connection: BulkConnection | None = None
        self._buffer = memoryview(bytearray(CHUNK_SIZE))
        self._sending: Job | None = None
        self._open_jobs: list[Job] = []  # begun and not finished, oldest first
        self._wire: deque[tuple[Job, Range | Together]] = deque()
        self._wire_bytes = self._wire_weight = 0
        self._chunks_read = 0  # of the first range on the wire
        self._cuts = 0  # since a whole chunk last came
        self._has_brought = False
        self._connecting_since = 0.0
        self._is_new = False

    def _run(self) -> None:
        try:
            while not self._desk.stopped:
                if not self._open_jobs:
                    self._wait_for_job()
                elif not self._try_step():
                    return
        except Exception as error:  # ours or the sink's: without this, a silent stall
            _log.exception("a bulk worker failed")
            self._desk.fail(Failure.LOCAL, f"{type(error).__name__}: {error}")
        finally:
            self._disconnect()

    def _wait_for_job(self) -> None:
        job = self._desk.wait_for_job(self._idle_close_s)
        if job is None:
            self._disconnect()
        else:
            self._begin(job)

    def _try_step(self) -> bool:
        """Take one step; False when this worker is through."""
        try:
            self._step()
        except Closed as error:
            self._take_cut(str(error))
        except (Unreachable, Busy) as error:
            if isinstance(error, Unreachable) and self._may_try_again():
                self._take_cut(str(error))  # a handshake can be cut like anything else
                return True
            self._disconnect()
            if self._desk.leave_to_others(self, self._open_jobs):
                return False
            self._desk.fail(Failure.UNREACHABLE, str(error))
        except RemoteError as error:
            self._desk.fail(_failure_of(error), str(error))
        except (LocalError, OSError) as error:  # the sink's: sockets raise RemoteError
            self._desk.fail(Failure.LOCAL, str(error))
        return True

    def _step(self) -> None:
        """Send what may be sent, then receive one chunk."""
        if self._connection is None:
            self._connecting_since = time.monotonic()
            race = self._race()
            self._desk.link(self, race)
            self._connection = race.run()
            self._desk.link(self, self._connection)
            self._pace.begin(time.monotonic(), self._connection.round_trip_s)
            self._is_new = True
        self._send_ahead(self._connection)
        if self._wire:
            self._receive(self._connection)

    def _range_chunks(self) -> int:
        """Return how many chunks to ask for in one: no more than what is asked for ahead."""
        return min(MAX_RANGE_CHUNKS, self._pace.bytes_ahead() // CHUNK_SIZE)

    def _begin(self, job: Job) -> None:
        job.ranges = asks_of(job.request, self._desk.sink, self._range_chunks)
        self._sending = job
        self._open_jobs.append(job)

    def _send_ahead(self, connection: BulkConnection) -> None:
        """Fill the wire when it is half empty, so that small requests leave together."""
        ahead_bytes = self._pace.bytes_ahead()
        if self._wire_weight > MAX_RANGES_AHEAD // 2 or self._wire_bytes > ahead_bytes // 2:
            return
        batch: list[RangeRequest | SmallRequest] = []
        while self._wire_weight < MAX_RANGES_AHEAD and self._wire_bytes < ahead_bytes:
            found = self._next_range()
            if found is None:
                break
            self._wire.append(found)
            self._wire_bytes += found[1].asked.length
            self._wire_weight += found[1].weight
            batch.append(found[1].asked)
        if batch:
            connection.send_gets(batch)

    def _next_range(self) -> tuple[Job, Range | Together] | None:
        while True:
            job = self._sending
            if job is None and self._again:
                self._sending = self._again.popleft()
                continue
            if job is None:
                if len(self._open_jobs) >= self._pipeline_depth:
                    return None
                taken = self._desk.take_job()
                if taken is None:
                    return None
                self._begin(taken)
                continue
            if not job.cancelled:
                for found in job.ranges:
                    job.on_wire += 1
                    return job, found
            self._sending = None
            job.all_sent = True
            self._finish_if_through(job)

    def _receive(self, connection: BulkConnection) -> None:
        job, asked = self._wire[0]
        if isinstance(asked, Together):
            self._receive_small(connection, job, asked)
            return
        if self._chunks_read == 0:
            try:
                connection.read_head()
            except Lacks as error:
                job.lacks = str(error)
                self._wire_bytes -= asked.asked.length
                self._drop_range(job)
                return
        chunk = asked.first_chunk + self._chunks_read
        length = chunk_length(asked.object_size, chunk)
        data = self._buffer[:length]
        self._read(connection, job, data)
        self._wire_bytes -= length
        outcome = self._desk.sink.write_chunk(asked.object_index, chunk, data)
        self._desk.chunk(job, asked.object_index, chunk, outcome, length)
        if outcome is Outcome.REFUSED:
            raise HashMismatch(
                f"chunk {chunk} of object {asked.asked.digest.hex()} does not match its hash"
            )
        self._note_chunk(length)
        self._chunks_read += 1
        if self._chunks_read == asked.chunks:
            self._drop_range(job)

    def _note_chunk(self, byte_count: int) -> None:
        """Note bytes that were right: the connection is worth another one."""
        self._cuts = 0
        self._has_brought = True
        if self._is_new and self._connection is not None:
            self._is_new = False
            self._pace.round_trip_s = self._connection.round_trip_s
            self._note_round_trip(self._connection.round_trip_s)
        self._pace.note(time.monotonic(), byte_count)

    def _receive_small(self, connection: BulkConnection, job: Job, asked: Together) -> None:
        """Take an answer with many small objects; those it leaves out are lacking."""
        positions = connection.read_small_head()
        objects = asked.asked.objects
        sizes = [objects[i].size_bytes for i in positions]
        data = self._buffer[: sum(sizes)]
        self._read(connection, job, data)
        self._wire_bytes -= asked.asked.length
        came = data.tobytes()  # and cut after: slices of bytes are cheaper than of a view
        ends = list(accumulate(sizes, initial=0))
        indices = asked.object_indices
        parts = [
            (indices[i], came[start:stop])
            for i, start, stop in zip(positions, ends, ends[1:], strict=False)
        ]
        outcomes = self._desk.sink.write_small(parts)
        self._desk.small(job, SmallBatch.of(parts, outcomes))
        if Outcome.REFUSED in outcomes:
            index, _ = parts[outcomes.index(Outcome.REFUSED)]
            digest, _ = self._desk.sink.wanted(index)
            raise HashMismatch(f"the bytes of object {digest.hex()} do not match its hash")
        if parts:
            self._note_chunk(len(data))
        if len(positions) < len(objects):
            given = set(positions)
            lacking = next(each for i, each in enumerate(objects) if i not in given)
            job.lacks = f"does not have object {lacking.digest.hex()}"
        self._drop_range(job)

    def _read(self, connection: BulkConnection, job: Job, data: memoryview) -> None:
        """Fill `data` from the connection, in pieces that each show the peer is still there."""
        start = room = 0
        while start < len(data):
            if not room:
                room = self._desk.take_room(job, len(data) - start)
            came = connection.read_into(data[start : start + room], PROGRESS_INTERVAL_S)
            start += came
            room -= came
            self._desk.progress(job, came)

    def _drop_range(self, job: Job) -> None:
        self._wire_weight -= self._wire.popleft()[1].weight
        self._chunks_read = 0
        job.on_wire -= 1
        self._finish_if_through(job)

    def _finish_if_through(self, job: Job) -> None:
        if not job.all_sent or job.on_wire:
            return
        self._open_jobs.remove(job)
        if job.lacks is not None:
            self._desk.finish(job, Failure.LACKS, job.lacks)
        else:
            self._desk.finish(job)

    def _may_try_again(self) -> bool:
        """Tell whether a peer is worth another attempt to connect.

        It is if it gave something here; and once if the first attempt failed at once: that
        too may have been a cut, and there is time left to take another way.
        """
        if self._has_brought:
            return self._cuts < MAX_CUTS_IN_VAIN
        return not self._cuts and time.monotonic() - self._connecting_since < QUICK_FAILURE_S

    def _take_cut(self, detail: str) -> None:
        """Ask a new connection for what has not come over one that was cut."""
        self._disconnect()
        self._cuts += 1
        if self._cuts > MAX_CUTS_IN_VAIN:
            self._desk.fail(Failure.CLOSED, detail)
            return
        self._sending = None
        for job in self._open_jobs:
            job.ranges = asks_of(job.request, self._desk.sink, self._range_chunks)
            job.on_wire = 0
            job.all_sent = False
        self._again = deque(self._open_jobs)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._desk.unlink(self)
        self._wire.clear()
        self._wire_bytes = self._wire_weight = self._chunks_read = 0


def _failure_of(error: RemoteError) -> Failure:
    for kind, failure in (
        (Stalled, Failure.STALLED),
        (Denied, Failure.REFUSED_ACCESS),
        (HashMismatch, Failure.BAD_BYTES),
    ):
        if isinstance(error, kind):
            return failure
    return Failure.PROTOCOL
