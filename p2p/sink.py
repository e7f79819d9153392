"""The bridge from the bulk plane's threads to the store and to the download's task."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from tensorswarm.store.errors import TensorswarmError
from tensorswarm.store.incoming import ChunkMismatch, Incoming

from .source import Failure, Outcome, WantedObject


class StoreSink:
    """A `Sink` that keeps chunks in the store; index by position in `incoming`.

    Attributes
    ----------
    error : TensorswarmError or None
        The first failure on our own side, such as a full disk; it ends the download.
    """

    def __init__(self, incoming: Sequence[Incoming]) -> None:
        self._incoming = incoming
        self.error: TensorswarmError | None = None

    def wanted(self, object_index: int) -> WantedObject:
        """Return digest and size of a wanted object."""
        incoming = self._incoming[object_index]
        return WantedObject(incoming.digest, incoming.size_bytes)

    def is_missing(self, object_index: int, chunk: int) -> bool:
        """Tell whether a chunk is still wanted."""
        return self._incoming[object_index].is_missing(chunk)

    def write_chunk(self, object_index: int, chunk: int, data: memoryview) -> Outcome:
        """Verify a chunk, then keep it."""
        try:
            kept = self._incoming[object_index].write_chunk(chunk, data)
        except ChunkMismatch:
            return Outcome.REFUSED
        except TensorswarmError as error:
            self.error = self.error or error
            raise
        return Outcome.PROVED if kept else Outcome.DUPLICATE


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


Event = Progressed | ChunkCame | RequestDone | SourceFailed


class EventQueue:
    """A `Report` that carries events from worker threads into a trio task.

    The queue needs no bound of its own: there are no more events than there are chunks
    in flight, and the planner bounds those.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._arrived = trio.Event()

    def _put(self, event: Event) -> None:
        self._events.append(event)
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

    def take(self) -> list[Event]:
        """Return what happened since the last call."""
        self._arrived = trio.Event()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def progress(self, source: str, request_id: int, byte_count: int) -> None:
        """Note that payload bytes arrived."""
        self._put(Progressed(source, request_id, byte_count))

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
        self._put(ChunkCame(source, request_id, object_index, chunk, outcome, byte_count))

    def done(self, source: str, request_id: int) -> None:
        """Note that a request was answered."""
        self._put(RequestDone(source, request_id))

    def failed(self, source: str, request_id: int | None, failure: Failure, detail: str) -> None:
        """Note that a request, or the whole source, failed."""
        self._put(SourceFailed(source, request_id, failure, detail))
