"""Sparing the dearer sources: nearer ones are asked first, when somebody wants that.

By default every source that holds something free is asked, as fast as it gives. Where
bytes from afar cost money, or somebody else's bandwidth, a download can go by nearness
instead (`PlannerLimits.near_first`): the local network before the wide one, and that
before an origin.

Rules
1. A source is asked for what no nearer source that is present holds. That begins at once:
   what only the farther ones have is fetched beside the rest.
2. Of chunks that are in flight from somewhere nearer it makes no copies.
3. Nearness must not be had at any price: when all nearer sources together give less than
   `near_least_bytes_per_s`, after `near_trial_s`, the farther ones help them freely.
   Silent and slow ones are dropped by the planner's deadlines in any case.

In a crowd the crowd's own rules hold instead: there the origin gives each chunk once to
all members together, and peers are asked for the rest.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping

from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .picker import Draft, ones, zeros
from .source_state import SourceState
from .types import PlannerLimits


class Nearness:
    """Which sources are spared, and what they may be asked for all the same.

    Parameters
    ----------
    sources : mapping of str to SourceState
        Those that are present.
    chunks : ChunkMap
        The download.
    limits : PlannerLimits
        The numbers.
    """

    def __init__(
        self, sources: Mapping[str, SourceState], chunks: ChunkMap, limits: PlannerLimits
    ) -> None:
        self._sources = sources
        self._chunks = chunks
        self._limits = limits
        self._waiting_since: dict[int, float] = {}

    def nearer(self, now: float, state: SourceState) -> list[SourceState]:
        """Return the sources for whose sake this one is spared; none if it may help."""
        limits = self._limits
        if not limits.near_first:
            return []
        nearer = [each for each in self._sources.values() if each.distance < state.distance]
        if not nearer:
            self._waiting_since.pop(state.distance, None)
            return []
        since = self._waiting_since.setdefault(state.distance, now)
        if now >= since + limits.near_trial_s:
            given = sum(each.rate.bytes_per_s or 0.0 for each in nearer)
            if given < limits.near_least_bytes_per_s:
                return []
        return nearer

    def draft(self, state: SourceState, nearer: list[SourceState], room_bytes: int) -> Draft:
        """Take free chunks that no nearer source holds, in order, most urgent first.

        Every block is looked at, so it costs more than the picker's choice: tolerable,
        because whoever finds nothing is not asked again for a while.
        """
        draft = Draft(room_bytes, self._limits.max_request_spans)
        if any(each.holds_all for each in nearer):
            return draft
        chunks = self._chunks
        for block in sorted(range(chunks.block_count), key=chunks.level_of.__getitem__):
            left = chunks.free[block] & state.held[block]
            for each in nearer:
                left &= ~each.held[block]
            while left:
                start = zeros(left)
                width = ones(left >> start)
                before_bytes = draft.size_bytes
                count = draft.add(chunks, block * BLOCK_CHUNKS + start, width)
                if count:
                    taken = (1 << count) - 1 << start
                    left &= ~taken
                    chunks.take(block, taken, draft.size_bytes - before_bytes)
                if count < width:
                    return draft
        return draft
