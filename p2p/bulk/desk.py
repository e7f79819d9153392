"""What the workers of one peer source share: the queue, the reports, and the end.

Thread-safe. Whoever takes a job from the queue reports its end here, once; after the end of
the source nothing is reported any more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from tensorswarm.store.errors import LocalError

from ..limits.rates import RateLimiter
from ..swarm.source import Failure, Outcome, Report, Request, Sink, SmallBatch
from .dial import Abortable
from .ranges import Range, Together

PIECE_BYTES = 256 << 10
"""Bytes taken from a connection at a time, each followed by a report of progress."""

HELD_S = 0.5
"""Seconds of waiting for our own limit after which the planner is told that the peer is
not to blame."""

MAX_QUEUED_REQUESTS = 256
"""Requests submitted and not begun: far more than a planner keeps at one source."""


class TooManyRequests(LocalError):
    """More requests were submitted than a source queues."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way; what it still asks for is worked out when a worker begins it."""

    request: Request
    ranges: Iterator[Range | Together] = iter(())
    on_wire: int = 0
    all_sent: bool = False
    cancelled: bool = False
    lacks: str | None = None


class Desk:
    """What the workers of one source share: queue, reports, and the end. Thread-safe."""

    def __init__(
        self, source: str, sink: Sink, report: Report, limiter: RateLimiter | None
    ) -> None:
        self.sink = sink
        self._limiter = limiter
        self._source = source
        self._report = report
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._waiting = 0
        self._links: dict[Hashable, Abortable] = {}
        self.stopped = False

    def submit(self, request: Request) -> None:
        """Queue a request; see `PeerSource.submit`."""
        with self._changed:
            if self.stopped:
                return
            if len(self._queue) >= MAX_QUEUED_REQUESTS:
                raise TooManyRequests(f"{MAX_QUEUED_REQUESTS} requests wait for {self._source}")
            job = Job(request)
            self._queue.append(job)
            self._jobs[request.request_id] = job
            self._changed.notify()

    def cancel(self, request_id: int) -> None:
        """Note that nothing more of a request is to be sent."""
        with self._changed:
            job = self._jobs.get(request_id)
            if job is not None:
                job.cancelled = True

    def wait_for_job(self, timeout_s: float) -> Job | None:
        """Take the next request, for a worker that has none; None after the time."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._queue or self.stopped, timeout_s)
            self._waiting -= 1
            return self._queue.popleft() if self._queue else None

    def take_job(self) -> Job | None:
        """Take a request ahead of time, unless it is there for a worker without any."""
        with self._changed:
            return self._queue.popleft() if len(self._queue) > self._waiting else None

    def link(self, worker: Hashable, connection: Abortable) -> None:
        """Note the connection that a worker has or is making, so that it can be cut."""
        with self._changed:
            self._links[worker] = connection
            stopped = self.stopped
        if stopped:
            connection.abort()

    def unlink(self, worker: Hashable) -> None:
        """Note that a worker has no connection."""
        with self._changed:
            self._links.pop(worker, None)

    def leave_to_others(self, worker: Hashable, jobs: Sequence[Job]) -> bool:
        """Give jobs back if another worker has a connection; True when it does."""
        with self._changed:
            if not any(other is not worker for other in self._links):
                return False
            for job in reversed(jobs):
                fresh = Job(job.request, cancelled=job.cancelled)
                self._queue.appendleft(fresh)
                self._jobs[job.request.request_id] = fresh
            self._changed.notify_all()
            return True

    def stop(self) -> bool:
        """Stop everything; False when that was done before."""
        with self._changed:
            if self.stopped:
                return False
            self.stopped = True
            self._queue.clear()
            self._jobs.clear()
            connections = list(self._links.values())
            self._changed.notify_all()
        for connection in connections:
            connection.abort()
        return True

    def fail(self, failure: Failure, detail: str) -> None:
        """End the source and report why, once."""
        if self.stop():
            self._report.failed(self._source, None, failure, detail)

    def finish(self, job: Job, failure: Failure | None = None, detail: str = "") -> None:
        """Report the end of a request."""
        request_id = job.request.request_id
        with self._changed:
            if self._jobs.get(request_id) is job:
                del self._jobs[request_id]
        if self.stopped:
            return
        if failure is None:
            self._report.done(self._source, request_id)
        else:
            self._report.failed(self._source, request_id, failure, detail)

    def take_room(self, job: Job, byte_count: int) -> int:
        """Wait until bytes may be received; return how many, at most `byte_count`."""
        limiter = self._limiter
        if limiter is None:
            return min(byte_count, PIECE_BYTES)
        begun = time.monotonic()
        room = min(byte_count, limiter.slice_bytes)
        limiter.take(self._source, room)
        if time.monotonic() - begun >= HELD_S:
            self.progress(job, 0)
        return room

    def progress(self, job: Job, byte_count: int) -> None:
        """Report bytes that arrived."""
        if not self.stopped:
            self._report.progress(self._source, job.request.request_id, byte_count)

    def small(self, job: Job, batch: SmallBatch) -> None:
        """Report what became of small objects."""
        if not self.stopped:
            self._report.small(self._source, job.request.request_id, batch)

    def chunk(
        self, job: Job, object_index: int, chunk: int, outcome: Outcome, byte_count: int
    ) -> None:
        """Report what became of a chunk."""
        if not self.stopped:
            self._report.chunk(
                self._source, job.request.request_id, object_index, chunk, outcome, byte_count
            )
