"""What the planner, the node and the sources say to each other.

A *source* is a peer or an origin that can give bytes. The planner (no I/O)
hands out `Request` objects; a `SourceWorker` owns the blocking sockets of one
source and carries them out in its own threads; it gives the bytes to a `Sink`,
which verifies and stores them, and tells a `Report` what became of each chunk.

Everything here is plain data and protocols; nothing does I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol


class Span(NamedTuple):
    """Consecutive chunks of one object.

    Attributes
    ----------
    object_index : int
        Index of the object in the download's list of wanted objects.
    first_chunk : int
        First chunk of the run.
    count : int
        Number of chunks, at least one.
    """

    object_index: int
    first_chunk: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here


@dataclass(frozen=True, slots=True)
class Request:
    """Chunks asked of one source, to be answered in order."""

    source: str
    request_id: int
    spans: tuple[Span, ...]


class WantedObject(NamedTuple):
    """An object that a download wants: its digest and its size in bytes."""

    digest: bytes
    size_bytes: int


class Outcome(Enum):
    """What became of a chunk that arrived."""

    PROVED = "proved"
    DUPLICATE = "duplicate"
    REFUSED = "refused"


class Failure(Enum):
    """Why a request, or a whole source, came to nothing."""

    STALLED = "stopped answering"
    CLOSED = "closed the connection"
    REFUSED_ACCESS = "refused access"
    LACKS = "does not have it"
    PROTOCOL = "broke the protocol"
    BAD_BYTES = "sent bytes that do not match their hash"
    UNREACHABLE = "could not be reached"
    LOCAL = "failed on our side"


class Sink(Protocol):
    """Where chunks go. Thread-safe: called from the workers' threads.

    What is asked of many objects at once may be answered one by one, as here.
    """

    def wanted(self, object_index: int) -> WantedObject:
        """Return digest and size of a wanted object."""
        ...

    def many_wanted(self, object_indices: Sequence[int]) -> list[WantedObject]:
        """Return digest and size of wanted objects, as `wanted` of each."""
        return [self.wanted(index) for index in object_indices]

    def is_missing(self, object_index: int, chunk: int) -> bool:
        """Tell whether a chunk is still wanted."""
        ...

    def are_missing(self, object_indices: Sequence[int]) -> list[bool]:
        """Tell which of some objects of one chunk each are still wanted."""
        return [self.is_missing(index, 0) for index in object_indices]

    def write_chunk(self, object_index: int, chunk: int, data: memoryview) -> Outcome:
        """Verify a chunk against its digest, then keep it.

        Raises
        ------
        NoRoom
            The disk is full.
        OSError
            The disk failed in another way.
        """
        ...

    def write_small(self, parts: Sequence[tuple[int, bytes | memoryview]]) -> list[Outcome]:
        """Verify whole objects of one chunk each, then keep those that are right.

        Parameters
        ----------
        parts : sequence of (int, bytes or memoryview)
            Object index and bytes of each.

        Raises
        ------
        NoRoom, OSError
            As for a chunk.
        """
        ...


class SmallOutcome(NamedTuple):
    """What became of an object of one chunk."""

    object_index: int
    outcome: Outcome
    byte_count: int


class SmallBatch(NamedTuple):
    """What became of objects of one chunk each that came together.

    Attributes
    ----------
    proved : sequence of int
        Those that were right and new, by object index.
    proved_bytes : int
        Their bytes.
    others : sequence of SmallOutcome
        The others.
    """

    proved: Sequence[int]
    proved_bytes: int
    others: Sequence[SmallOutcome]

    @classmethod
    def of(
        cls, parts: Sequence[tuple[int, bytes | memoryview]], outcomes: Sequence[Outcome]
    ) -> SmallBatch:
        """Sort objects, with what came for each, by their outcome."""
        if outcomes.count(Outcome.PROVED) == len(outcomes):
            return cls([index for index, _ in parts], sum([len(data) for _, data in parts]), ())
        each = [
            SmallOutcome(index, outcome, len(data))
            for (index, data), outcome in zip(parts, outcomes, strict=True)
        ]
        right = [one for one in each if one.outcome is Outcome.PROVED]
        return cls(
            [one.object_index for one in right],
            sum(one.byte_count for one in right),
            [one for one in each if one.outcome is not Outcome.PROVED],
        )


class Report(Protocol):
    """Who hears of the work. Thread-safe: called from the workers' threads."""

    def progress(self, source: str, request_id: int, byte_count: int) -> None:
        """Note that `byte_count` payload bytes arrived, not verified yet.

        None at all says that we keep the source waiting ourselves.
        """
        ...

    def chunk(
        self,
        source: str,
        request_id: int,
        object_index: int,
        chunk: int,
        outcome: Outcome,
        byte_count: int,
    ) -> None:
        """Note what became of a whole chunk."""
        ...

    def small(self, source: str, request_id: int, batch: SmallBatch) -> None:
        """Note what became of objects of one chunk each that came together."""
        ...

    def done(self, source: str, request_id: int) -> None:
        """Note that every span of a request was answered."""
        ...

    def failed(self, source: str, request_id: int | None, failure: Failure, detail: str) -> None:
        """Note that a request failed, or (with None) the whole source."""
        ...


class SourceWorker(Protocol):
    """Carries out requests at one source. No method blocks; any thread may call."""

    def submit(self, request: Request) -> None:
        """Queue a request behind those already submitted."""
        ...

    def cancel(self, request_id: int) -> None:
        """Skip what has not been sent of a request; what is in flight may still come."""
        ...

    def close(self) -> None:
        """Stop soon: sockets are shut down, threads end, nothing is reported after."""
        ...
