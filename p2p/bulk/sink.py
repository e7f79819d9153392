"""The bridge from the bulk plane's threads to the store and to the download's task."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from tensorswarm.store.errors import TensorswarmError
from tensorswarm.store.incoming import Kept
from tensorswarm.store.wanted import Wanted

from ..swarm.source import Failure, Outcome, SmallBatch, WantedObject

WAKE_INTERVAL_S = 0.02
"""How long news that need no decision may wait. Waking the task for each chunk costs
more than the chunk's planning, and takes the interpreter from the threads that receive."""


class StoreSink:
    """A `Sink` that keeps chunks in the store; index by position in `wanted`.

    Attributes
    ----------
    error : TensorswarmError or None
        The first failure on our own side, such as a full disk; it ends the download.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self.error: TensorswarmError | None = None

    def wanted(self, object_index: int) -> WantedObject:
        """Return digest and size of a wanted object."""
        return WantedObject(
            self._wanted.digest(object_index), self._wanted.size_bytes(object_index)
        )

    def many_wanted(self, object_indices: Sequence[int]) -> list[WantedObject]:
        """Return digest and size of wanted objects."""
        return list(map(WantedObject, *self._wanted.many(object_indices)))

    def is_missing(self, object_index: int, chunk: int) -> bool:
        """Tell whether a chunk is still wanted."""
        return self._wanted.is_missing(object_index, chunk)

    def are_missing(self, object_indices: Sequence[int]) -> list[bool]:
        """Tell which of some objects of one chunk each are still wanted."""
        return self._wanted.are_missing(object_indices)

    def write_chunk(self, object_index: int, chunk: int, data: memoryview) -> Outcome:
        """Verify a chunk, then keep it."""
        try:
            return _OUTCOMES[self._wanted.write_chunk(object_index, chunk, data)]
        except TensorswarmError as error:
            self.error = self.error or error
            raise

    def write_small(self, parts: Sequence[tuple[int, bytes | memoryview]]) -> list[Outcome]:
        """Verify whole objects of one chunk each, then keep those that are right."""
        try:
            kept = self._wanted.write_small(parts)
        except TensorswarmError as error:
            self.error = self.error or error
            raise
        if kept.count(Kept.NEW) == len(kept):
            return [Outcome.PROVED] * len(kept)
        return [_OUTCOMES[each] for each in kept]


_OUTCOMES = {
    Kept.NEW: Outcome.PROVED,
    Kept.KNOWN: Outcome.DUPLICATE,
    Kept.WRONG: Outcome.REFUSED,
}


class Progressed(NamedTuple):
    """Payload bytes arrived."""

    source: str
    request_id: int
    byte_count: int


class ChunkCame(NamedTuple):
    """A whole chunk arrived and was judged."""

    source: str
    request_id: int
    object_index: int
    chunk: int
    outcome: Outcome
    byte_count: int


class SmallCame(NamedTuple):
    """Whole objects of one chunk each arrived and were judged."""

    source: str
    request_id: int
    batch: SmallBatch


class RequestDone(NamedTuple):
    """A request was answered."""

    source: str
    request_id: int


class SourceFailed(NamedTuple):
    """A request failed, or (with None) a whole source."""

    source: str
    request_id: int | None
    failure: Failure
    detail: str


Event = Progressed | ChunkCame | SmallCame | RequestDone | SourceFailed


class EventQueue:
    """A `Report` that carries events from worker threads into a trio task.

    Each event carries the time it happened at, so that waiting in the queue does not
    spoil what is measured. The queue needs no bound of its own: there are no more
    events than there are chunks in flight, and the planner bounds those.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[float, Event]] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._arrived = trio.Event()
        self._clock_offset_s = trio.current_time() - time.perf_counter()
        self._woken_at_s = 0.0

    def _put(self, event: Event, *, urgent: bool) -> None:
        """Queue an event; wake the task for an urgent one, for others now and then."""
        now = time.perf_counter()
        self._events.append((now + self._clock_offset_s, event))
        if urgent or now - self._woken_at_s >= WAKE_INTERVAL_S:
            self._woken_at_s = now
            # After the end of the program's event loop nobody listens any more.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        self._arrived.set()

    def wake(self) -> None:
        """Make `wait` return, from the trio thread."""
        self._arrived.set()

    async def wait(self) -> None:
        """Wait until something happened."""
        await self._arrived.wait()

    def take(self) -> list[tuple[float, Event]]:
        """Return what happened since the last call, with trio's time of each."""
        self._arrived = trio.Event()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def progress(self, source: str, request_id: int, byte_count: int) -> None:
        """Note that payload bytes arrived."""
        self._put(Progressed(source, request_id, byte_count), urgent=False)

    def chunk(
        self,
        source: str,
        request_id: int,
        object_index: int,
        chunk: int,
        outcome: Outcome,
        byte_count: int,
    ) -> None:
        """Note what became of a chunk."""
        event = ChunkCame(source, request_id, object_index, chunk, outcome, byte_count)
        self._put(event, urgent=outcome is Outcome.REFUSED)

    def small(self, source: str, request_id: int, batch: SmallBatch) -> None:
        """Note what became of small objects that came together."""
        self._put(
            SmallCame(source, request_id, batch),
            urgent=any(each.outcome is Outcome.REFUSED for each in batch.others),
        )

    def done(self, source: str, request_id: int) -> None:
        """Note that a request was answered."""
        self._put(RequestDone(source, request_id), urgent=True)

    def failed(self, source: str, request_id: int | None, failure: Failure, detail: str) -> None:
        """Note that a request, or the whole source, failed."""
        self._put(SourceFailed(source, request_id, failure, detail), urgent=True)
