"""An HTTP origin as a source: worker threads that fetch chunks from a web server.

`OriginSource` carries out the planner's requests with a few threads that share one
queue. Each thread has its own `OriginClient` and one buffer of a chunk, which every
byte passes through on its way to the `Sink`.

Rules

- Chunks that follow each other in a file are asked for in one range request. A chunk that
  lies in several files is put together, but not from files that are given only as a whole.
- A chunk that is no longer missing is not fetched: it is reported as DUPLICATE with
  0 bytes, so that each chunk of a request gets an answer.
- Trouble with one file (not there, another size, refused, bytes that do not match)
  does not stop a request's other files; the request fails with it at its end.
  Whether to give up the file or the origin is the node's decision. A file that is not
  there, or has another size, is not asked for again: a model of many small tensors would
  ask for it as often.
- A server that ignores ranges gives a file as a whole. That is worth one *pass*: the
  file is read once, in order, and every missing chunk of every wanted object in it
  is kept as it goes by, and reported under the request that began the pass.
  Requests for the same file are parked meanwhile, which takes no thread, and taken
  up again when the pass has gone by their chunks or ends. After `MAX_PASSES` passes
  the origin counts as lacking the file.
- A busy server (429, 503 and the like) fails the request as STALLED, and further
  requests wait as long as the server asks, up to a limit.

A cancelled request is reported no further once its chunk in flight is done. A pass
goes on nevertheless, because it serves the whole file. After `close` nothing is
reported, but for a report that was already under way.

What it does not do: decide what to ask of whom, count errors, give up a source.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import httpx

from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput, LocalError

from ..limits.rates import RateLimiter
from ..swarm.source import Failure, Outcome, Report, Request, Sink, SourceWorker
from .body import Body, Limits
from .failure import OriginFailure
from .guard import Guard
from .http import Answer, OriginClient
from .origin import Piece, Place, continues_run, pieces_of_file, pieces_of_span, runs_of

MAX_QUEUED_REQUESTS = 256
"""Most requests queued, in work or parked: the planner keeps a handful per source."""

MAX_PASSES = 2
"""Most times a file is read as a whole: once, and once more after a broken connection."""

PROGRESS_TIMEOUT_S = 20.0
"""Seconds for an answer's headers with all redirects: a cold store behind a hub takes a
few. The planner, which has others to ask, is less patient."""

MAX_PAUSE_S = 30.0
"""Longest pause that a busy server gets, in seconds; then it is asked again."""

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way.

    `todo` holds the chunks that are not answered, in order; `given` those that a
    pass answered out of order; `trouble` the first failure that concerned one file
    only, and `spoiled` the paths of all such files.
    """

    request: Request
    todo: deque[Piece] | None = None
    given: set[tuple[int, int]] = field(default_factory=set)
    trouble: OriginFailure | None = None
    spoiled: set[str] = field(default_factory=set)
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _WholeFile:
    """A file that the server gives only as a whole.

    `position` is how far the present pass has come, in bytes. `parked` holds the
    jobs that wait, each with the position that the pass must reach for it.
    """

    passes: int = 0
    active: bool = False
    position: int = 0
    parked: list[tuple[int, _Job]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Worker:
    """What one thread has to itself: its connections, and a buffer of one chunk.

    `half` tells of a chunk that lies in several files how much the buffer has: its
    object, its number, and the bytes.
    """

    client: OriginClient
    buffer: memoryview
    half: tuple[int, int, int] | None = None


class OriginSource(SourceWorker):
    """Fetches chunks from one HTTP origin. See `SourceWorker` for its methods.

    Parameters
    ----------
    source : str
        The origin's URL, its name in reports.
    locate : Mapping[int, FileRange or JoinedRanges]
        Where each wanted object lies, by the download's object index.
    urls : Mapping[str, str]
        The URL of every file in `locate`, by path.
    sink : Sink
        Takes the chunks.
    report : Report
        Hears what became of them.
    connections : int
        Threads, with a connection each.
    stall_timeout_s : float
        Longest wait for any bytes, in seconds.
    progress_timeout_s : float
        Longest wait for some KiB of a body, and for an answer's headers, in seconds.
    max_pause_s : float
        Longest pause granted to a busy server, in seconds.
    headers : Mapping[str, str] or None
        Further request headers, such as ``Authorization``. Only the origin's own
        host gets them.
    limiter : RateLimiter, optional
        Holds what all sources receive together below a rate.
    """

    def __init__(
        self,
        source: str,
        locate: Mapping[int, Place],
        urls: Mapping[str, str],
        sink: Sink,
        report: Report,
        *,
        connections: int = 2,
        stall_timeout_s: float = 3.0,
        progress_timeout_s: float = PROGRESS_TIMEOUT_S,
        max_pause_s: float = MAX_PAUSE_S,
        headers: Mapping[str, str] | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._source = source
        self._locate = locate
        self._urls = urls
        self._sink = sink
        self._report = report
        self._connections = connections
        self._limits = Limits(stall_timeout_s, progress_timeout_s)
        self._max_pause_s = max_pause_s
        self._headers = dict(headers or {})
        self._limiter = limiter
        self._guard = Guard()
        # Guards everything below, and the jobs' and whole files' hand-over.
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._queue: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._whole_files: dict[str, _WholeFile] = {}
        self._absent: dict[str, OriginFailure] = {}  # files by path, and what was answered
        self._resume_at = 0.0
        self._closed = False
        # Making a client and its certificates takes 0.1 s: begin before there is work.
        with self._changed:
            self._add_thread()

    def _add_thread(self) -> None:
        name = f"origin-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request behind those already submitted.

        Raises
        ------
        BadInput
            A request with this id is still under way.
        LocalError
            More than `MAX_QUEUED_REQUESTS` are.
        """
        with self._changed:
            if self._closed:
                return
            if request.request_id in self._jobs:
                raise BadInput(f"request {request.request_id} is already under way")
            if len(self._jobs) >= MAX_QUEUED_REQUESTS:
                raise LocalError(f"more than {MAX_QUEUED_REQUESTS} requests at one origin")
            job = _Job(request)
            self._jobs[request.request_id] = job
            self._queue.append(job)
            if len(self._queue) > self._idle and len(self._threads) < self._connections:
                self._add_thread()
            self._changed.notify()

    def cancel(self, request_id: int) -> None:
        """Skip what has not been sent of a request; what is in flight may still come."""
        with self._changed:
            job = self._jobs.get(request_id)
            if job is None:
                return
            job.cancelled = True
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
            for whole in self._whole_files.values():
                kept = [entry for entry in whole.parked if entry[1] is not job]
                waiting = waiting or len(kept) < len(whole.parked)
                whole.parked = kept
            if waiting:
                del self._jobs[request_id]

    def close(self) -> None:
        """Stop soon: sockets are shut down, threads end, nothing is reported after."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._jobs.clear()
            self._changed.notify_all()
        self._guard.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end after `close`; tell whether all did in time."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # The threads.

    @functools.cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return httpx.create_ssl_context()

    def _work(self) -> None:
        try:
            client = OriginClient(
                self._guard, self._limits, self._ssl_context, self._headers, self._limiter
            )
        except Exception as error:  # a malformed proxy setting, header or certificate file
            _logger.warning("no HTTP client can be made", exc_info=error)
            if not self._closed:
                detail = f"no HTTP client can be made: {error}"
                self._report.failed(self._source, None, Failure.LOCAL, detail)
            return
        worker = _Worker(client, memoryview(bytearray(CHUNK_SIZE)))
        with contextlib.closing(client):
            while (job := self._next_job()) is not None:
                self._serve(worker, job)

    def _next_job(self) -> _Job | None:
        """Wait for work; None means the end."""
        with self._changed:
            self._idle += 1
            try:
                while not self._closed:
                    pause_s = self._resume_at - time.monotonic()
                    if self._queue and pause_s <= 0:
                        return self._queue.popleft()
                    self._changed.wait(pause_s if self._queue else None)
                return None
            finally:
                self._idle -= 1

    def _serve(self, worker: _Worker, job: _Job) -> None:
        """Do one job and report its end, unless it was parked."""
        trouble: OriginFailure | None
        try:
            if not self._answer(worker, job):
                return
            trouble = job.trouble
        except OriginFailure as failure:
            trouble = failure
        except (LocalError, OSError) as error:  # the sink's: network errors are translated
            trouble = OriginFailure(Failure.LOCAL, str(error))
        except Exception as error:  # a thread that dies silently would hang the download
            _logger.exception("an origin's thread failed")
            trouble = OriginFailure(Failure.LOCAL, f"unexpected {type(error).__name__}: {error}")
        with self._changed:
            self._jobs.pop(job.request.request_id, None)
            if trouble is not None and trouble.pause_s > 0:
                pause_s = min(trouble.pause_s, self._max_pause_s)
                self._resume_at = max(self._resume_at, time.monotonic() + pause_s)
            if self._closed or job.cancelled:
                return
        request_id = job.request.request_id
        if trouble is None:
            self._report.done(self._source, request_id)
        else:
            self._report.failed(self._source, request_id, trouble.failure, trouble.detail)

    def _answer(self, worker: _Worker, job: _Job) -> bool:
        """Fetch what a job still wants; False when it was parked, and is no longer ours."""
        if job.todo is None:
            job.todo = deque(self._pieces_of(job))
        while not self._stopped(job) and (run := self._next_run(worker, job)):
            try:
                if not self._fetch(worker, job, run):
                    return False
            except OriginFailure as failure:
                if not failure.file_only:
                    raise
                job.trouble = job.trouble or failure
                job.spoiled.add(run[0].place.path)
                if failure.failure is Failure.LACKS:
                    self._absent.setdefault(run[0].place.path, failure)
        return True

    def _pieces_of(self, job: _Job) -> Iterator[Piece]:
        for span in job.request.spans:
            place = self._locate.get(span.object_index)
            if place is None or not all(run.path in self._urls for run in runs_of(place)):
                detail = f"object {span.object_index} is in none of the files there"
                job.trouble = job.trouble or OriginFailure(Failure.LACKS, detail)
                continue
            yield from pieces_of_span(span, place, self._sink.wanted(span.object_index).size_bytes)

    def _next_run(self, worker: _Worker, job: _Job) -> list[Piece]:
        """Take off the next chunks to fetch in one request; answer those not missing."""
        assert job.todo is not None
        run: list[Piece] = []
        while job.todo and continues_run(run, job.todo[0]):
            piece = job.todo.popleft()
            key = (piece.object_index, piece.chunk)
            if key in job.given or piece.place.path in job.spoiled:
                continue
            if not self._sink.is_missing(*key):
                if not piece.rest:
                    self._tell_chunk(job, piece, Outcome.DUPLICATE, 0)
            elif piece.place.path in self._absent:
                job.trouble = job.trouble or self._absent[piece.place.path]
            elif not piece.at or worker.half == (*key, piece.at):
                run.append(piece)
            else:  # what comes before it was not to be had, or went by in a pass
                detail = f"{piece.place.path}: has one half of a chunk, and the other was not given"
                job.trouble = job.trouble or OriginFailure(Failure.LACKS, detail, file_only=True)
        return run

    def _fetch(self, worker: _Worker, job: _Job, run: list[Piece]) -> bool:
        """Fetch a run, by range or by a pass over its file; False if the job was parked."""
        place = run[0].place
        url = self._urls[place.path]
        note_progress = functools.partial(self._tell_progress, job)
        with self._changed:
            takes_ranges = place.path not in self._whole_files
        if takes_ranges:
            start, stop = run[0].offset, run[-1].stop
            with worker.client.open(url, place, start, stop, note_progress) as answer:
                if not answer.is_whole_file:
                    self._read_run(worker, job, run, answer.body)
                    return True
                return self._pass(worker, job, run, contextlib.nullcontext(answer))
        whole = worker.client.open(url, place, 0, place.file_size, note_progress, ranged=False)
        return self._pass(worker, job, run, whole)

    def _read_run(self, worker: _Worker, job: _Job, run: list[Piece], body: Body) -> None:
        for piece in run:
            if self._stopped(job):
                return
            self._read_piece(worker, job, piece, body)
        body.expect_end()

    def _read_piece(self, worker: _Worker, job: _Job, piece: Piece, body: Body) -> None:
        filled = piece.at + piece.length
        worker.half = None
        body.read_into(worker.buffer[piece.at : filled])
        if piece.rest:
            worker.half = (piece.object_index, piece.chunk, filled)
            return
        outcome = self._sink.write_chunk(piece.object_index, piece.chunk, worker.buffer[:filled])
        self._tell_chunk(job, piece, outcome, filled)
        if outcome is Outcome.REFUSED:
            detail = f"{piece.place.path}: bytes from {piece.offset} on do not match their hash"
            raise OriginFailure(Failure.BAD_BYTES, detail, file_only=True)

    # Passes over files that the server gives only as a whole.

    def _pass(
        self,
        worker: _Worker,
        job: _Job,
        run: list[Piece],
        opening: contextlib.AbstractContextManager[Answer],
    ) -> bool:
        """Read a file once, or park the job while another thread does; False if parked."""
        assert job.todo is not None
        path = run[0].place.path
        if any(piece.is_part for piece in run):
            detail = f"{path}: given only as a whole, and a chunk ends in another file"
            job.trouble = job.trouble or OriginFailure(Failure.LACKS, detail, file_only=True)
            run = [piece for piece in run if not piece.is_part]
            if not run:
                return True
        job.todo.extendleft(reversed(run))  # after the pass it is seen what is still missing
        with self._changed:
            whole = self._whole_files.setdefault(path, _WholeFile())
            if self._stopped(job):
                return True
            if whole.active:
                goal = max(piece.stop for piece in job.todo if piece.place.path == path)
                whole.parked.append((goal, job))
                return False
            if whole.passes >= MAX_PASSES:
                detail = f"{path}: given only as a whole, and {MAX_PASSES} passes were not enough"
                raise OriginFailure(Failure.LACKS, detail, file_only=True)
            whole.active, whole.position = True, 0
        try:
            with opening as answer:
                self._read_whole(worker, job, path, whole, answer.body)
        finally:
            with self._changed:
                whole.active = False
                self._unpark(whole, math.inf)
        return True

    def _read_whole(
        self, worker: _Worker, job: _Job, path: str, whole: _WholeFile, body: Body
    ) -> None:
        sizes = {index: self._sink.wanted(index).size_bytes for index in self._locate}
        for piece in pieces_of_file(path, self._locate, sizes):
            if self._closed:
                return
            if not self._sink.is_missing(piece.object_index, piece.chunk):
                continue
            if whole.position == 0:
                whole.passes += 1  # a pass counts once there is something to read
            body.skip(piece.offset - whole.position)
            self._read_piece(worker, job, piece, body)
            job.given.add((piece.object_index, piece.chunk))
            self._unpark(whole, piece.stop)

    def _unpark(self, whole: _WholeFile, position: float) -> None:
        """Note how far a pass has come and put the jobs that waited for it in front."""
        with self._changed:
            if position != math.inf:
                whole.position = int(position)
            ready = [job for goal, job in whole.parked if goal <= position]
            if ready:
                whole.parked = [entry for entry in whole.parked if entry[0] > position]
                self._queue.extendleft(reversed(ready))
                self._changed.notify(len(ready))

    # What is told, unless nobody listens any more.

    def _stopped(self, job: _Job) -> bool:
        return self._closed or job.cancelled

    def _tell_progress(self, job: _Job, byte_count: int) -> None:
        if not self._closed:
            self._report.progress(self._source, job.request.request_id, byte_count)

    def _tell_chunk(self, job: _Job, piece: Piece, outcome: Outcome, byte_count: int) -> None:
        if not self._closed:
            self._report.chunk(
                self._source,
                job.request.request_id,
                piece.object_index,
                piece.chunk,
                outcome,
                byte_count,
            )
