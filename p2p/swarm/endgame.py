"""The end of a download: who should have a chunk sooner than whoever was asked.

A source that finds nothing free may ask for copies of what is in flight elsewhere,
when its copy should arrive clearly sooner; so a slow source never holds the last
chunks. Only such sources are relieved that have nothing free to go on with
themselves: before that, their work in flight is not what the download waits for.

A copy is never taken back in favour of a third source that would beat it: a cancel
does not recall what is sent already, so that made three copies of a chunk in flight,
and asked a source twice for one chunk. The price is that two slow copies can hold up a
source that becomes fast, or joins, after they were asked.

And towards the end a slow source leaves what is free to a faster one that would have
done all the rest before the slow one had done its next chunk: then the copy, and its
waste, is not needed at all. Somebody always takes it: who leaves a chunk to another
would finish all the rest later than that other, so leaving never goes in circles.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE

from .chunk_map import ChunkMap
from .flights import Flights
from .picker import Draft, Picker
from .source_state import SourceState
from .types import PlannerLimits


class _Owner(NamedTuple):
    """A source with work in flight, and how long that should take."""

    wait_s: float
    source: SourceState


class _Selection:
    """Chunks to copy."""

    def __init__(self, room_bytes: int) -> None:
        self.positions: list[int] = []
        self.size_bytes = 0
        self.room_bytes = room_bytes


class EndGame:
    """Decides about copies, and about leaving the rest to others.

    Parameters
    ----------
    sources : mapping of str to SourceState
        The present sources.
    flights : Flights
        What is in flight.
    chunks : ChunkMap
        The download.
    picker : Picker
        Tells who has something free.
    limits : PlannerLimits
        The numbers.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceState],
        flights: Flights,
        chunks: ChunkMap,
        picker: Picker,
        limits: PlannerLimits,
    ) -> None:
        self._sources = sources
        self._flights = flights
        self._chunks = chunks
        self._picker = picker
        self._limits = limits
        self._owners: list[_Owner] | None = None

    def begin(self) -> None:
        """Note that time has passed: what was worked out before is out of date."""
        self._owners = None

    # copies

    def draft_copies(self, now: float, source: SourceState, room_bytes: int) -> Draft:
        """Choose chunks in flight elsewhere that `source` should have sooner."""
        limits = self._limits
        if self._chunks.unready:  # there is more to come that nobody is asked for
            return Draft(0, limits.max_request_spans)
        if self._owners is None:
            self._owners = self._latest_owners(now)
        selection = _Selection(min(room_bytes, limits.max_copy_chunks * CHUNK_SIZE))
        for owner in self._owners:
            own_s = source.seconds_guessed(selection.size_bytes, limits.unknown_wait_s)
            if own_s >= limits.copy_gain * owner.wait_s:
                break
            if owner.source is not source and owner.source.requests:
                self._select(now, source, owner.source, selection)
        draft = Draft(selection.room_bytes, limits.max_request_spans)
        for position in sorted(selection.positions):
            draft.add(self._chunks, position, 1)
        return draft

    def _latest_owners(self, now: float) -> list[_Owner]:
        """Return the sources in their end-game that will be done last, the last first."""
        owners = [
            _Owner(expected_wait_s(now, source, source.queued_bytes), source)
            for source in self._sources.values()
            if source.requests and not self._picker.has_free(source)
        ]
        owners.sort(key=lambda owner: -owner.wait_s)
        return owners[: self._limits.max_copy_owners]

    def _select(
        self, now: float, source: SourceState, owner: SourceState, selection: _Selection
    ) -> None:
        """Select what `source` should have sooner than `owner`, the latest chunks first."""
        limits = self._limits
        is_first = True
        for position, size, wait_s in self._last_first(now, owner):
            own_s = source.seconds_guessed(selection.size_bytes + size, limits.unknown_wait_s)
            if (
                own_s >= limits.copy_gain * wait_s
                or selection.size_bytes + size > selection.room_bytes
                or len(selection.positions) >= limits.max_request_spans
            ):
                return
            requests = self._flights.by_position[position]
            if (
                not source.holds(position)
                or len(requests) >= limits.max_copies
                or any(request.source is source for request in requests)
            ):
                continue
            if is_first and self._is_faster_elsewhere(now, source, position, size, size):
                return
            is_first = False
            selection.positions.append(position)
            selection.size_bytes += size

    def _last_first(self, now: float, owner: SourceState) -> Iterator[tuple[int, int, float]]:
        """Yield what a source has in flight: position, bytes, time until it is there."""
        ahead_bytes = owner.queued_bytes
        for request in reversed(owner.requests.values()):
            for position in reversed(request.left):
                size = self._chunks.size_at(position)
                yield position, size, expected_wait_s(now, owner, ahead_bytes)
                ahead_bytes -= size

    # leaving

    def should_wait(self, now: float, source: SourceState) -> bool:
        """Tell whether a slow source should leave what is free to a faster one."""
        free_bytes = self._chunks.free_bytes
        chunk_bytes = min(CHUNK_SIZE, free_bytes)
        own_s = source.seconds_for(chunk_bytes)
        if own_s is None or own_s * self._flights.total_rate <= free_bytes:
            return False
        position = self._picker.first(source)
        return position is not None and self._is_faster_elsewhere(
            now, source, position, chunk_bytes, free_bytes
        )

    def _is_faster_elsewhere(
        self, now: float, source: SourceState, position: int, chunk_bytes: int, rest_bytes: int
    ) -> bool:
        """Tell whether somebody would do all the rest before `source` does a chunk.

        The other must hold the chunk at `position`, and must not have been silent for
        longer than it would be ahead.
        """
        own_s = source.seconds_for(chunk_bytes)
        if own_s is None:
            return False
        for other in self._sources.values():
            other_s = other.seconds_for(rest_bytes)
            if (
                other is not source
                and other_s is not None
                and other_s < own_s
                and other.holds(position)
                and (not other.requests or now - other.silent_since() < own_s - other_s)
            ):
                return True
        return False


def expected_wait_s(now: float, source: SourceState, queued_bytes: int) -> float:
    """Return how long a source with work should need for `queued_bytes` of it.

    Whoever has been silent for a while is expected to stay so for as long again.
    """
    silence_s = now - source.silent_since()
    rate = source.rate.bytes_per_s
    return max(silence_s, queued_bytes / rate if rate else 0.0)
