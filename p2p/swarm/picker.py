"""Which free chunks a source is asked for next.

The order of rules:

1. Priority: nothing of a less urgent level while the source holds something free
   of a more urgent one.
2. Rarity: the chunks with the fewest holders, as far as the sample below shows.
3. Runs: go on where the last request ended; else settle where the share of free
   chunks is largest for one more source, ties at random, and there at the start of
   the longest run. A run that another source is working on is split in its middle;
   a fresh one is begun at a random place, so that several nodes that download the
   same model from one seed soon have different chunks to give each other.

In a crowd (`pick_scattered`) the third rule is another: among the rarest, counted
exactly, one at random; and the first few chunks of a download wholly at random.

Blocks are compared by sampling the source's live blocks, at most
`PlannerLimits.sample_blocks` per search, so a search costs the same for a thousand
chunks and for a million. Up to 16 blocks (4,096 chunks) the comparison is complete.

No I/O; the random generator is the caller's.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

from tensorswarm.store.digest import CHUNK_SIZE

from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .source import Span
from .source_state import SourceState
from .types import PlannerLimits

MAX_ROUNDS = 4
"""Blocks that one request may draw from: bounds its cost when only crumbs are left."""


class Draft:
    """A request in the making: chunks in order, within limits of bytes and spans."""

    __slots__ = ("_max_spans", "positions", "room_bytes", "size_bytes", "spans")

    def __init__(self, room_bytes: int, max_spans: int) -> None:
        self.spans: list[Span] = []
        self.positions: list[int] = []
        self.size_bytes = 0
        self.room_bytes = room_bytes
        self._max_spans = max_spans

    def add(self, chunks: ChunkMap, position: int, width: int) -> int:
        """Add what fits from a run of positions; return how many and count their bytes."""
        spans, count, size_bytes = chunks.fit(
            position, width, self.room_bytes, self._max_spans - len(self.spans)
        )
        if not spans:
            return 0
        last = self.spans[-1] if self.spans else None
        first = spans[0]
        if last and (last.object_index, last.first_chunk + last.count) == first[:2]:
            self.spans[-1] = last._replace(count=last.count + first.count)
            del spans[0]
        self.spans += spans
        self.positions.extend(range(position, position + count))
        self.size_bytes += size_bytes
        self.room_bytes -= size_bytes
        return count


class Picker:
    """Chooses among free chunks.

    Parameters
    ----------
    chunks : ChunkMap
        The download.
    rng : random.Random
        Breaks ties.
    limits : PlannerLimits
        For the size of the sample and the number of spans.

    Attributes
    ----------
    steps : int
        Blocks and runs looked at so far.
    """

    def __init__(self, chunks: ChunkMap, rng: random.Random, limits: PlannerLimits) -> None:
        self._chunks = chunks
        self._rng = rng
        self._limits = limits
        self._workers = array("H", bytes(2 * chunks.block_count))
        self.steps = 0

    def has_free(self, source: SourceState) -> bool:
        """Tell whether anything is free that the source holds."""
        free, held = self._chunks.free, source.held
        while source.level < self._chunks.level_count:
            live = source.live[source.level]
            while live:
                self.steps += 1
                if free[live[-1]] & held[live[-1]]:
                    return True
                source.listed[live.pop()] = 0
            source.level += 1
        return False

    def best(self, source: SourceState) -> tuple[int, int] | None:
        """Return the block to take from and the chunks in it that are equally good."""
        if not self.has_free(source):
            return None
        chunks = self._chunks
        near = self._near(source)
        if near is not None and not chunks.counted_blocks:
            return near, chunks.free[near] & source.held[near]
        best_block, best_mask = -1, 0
        best_score = (1 << 30, 0.0)
        for block in self._sample(source, near):
            rarity, mask = chunks.rarest(block, chunks.free[block] & source.held[block])
            share = -mask.bit_count() / (self._workers[block] + 1)
            score = (rarity, -BLOCK_CHUNKS - 1.0 if block == near else share)
            if score < best_score:
                best_block, best_mask, best_score = block, mask, score
        return best_block, best_mask

    def first(self, source: SourceState) -> int | None:
        """Return a position that the source could well be asked for next, if any."""
        choice = self.best(source)
        return None if choice is None else choice[0] * BLOCK_CHUNKS + zeros(choice[1])

    def _near(self, source: SourceState) -> int | None:
        """Return the block where the source can go on without a jump."""
        chunks = self._chunks
        home = source.home
        if home < 0:
            return None
        if not chunks.free[home] & source.held[home]:
            home = source.cursor // BLOCK_CHUNKS
            if home == source.home or home >= chunks.block_count or self._workers[home]:
                return None
            if not chunks.free[home] & source.held[home] & 1:
                return None
        return home if chunks.level_of[home] == source.level else None

    def _sample(self, source: SourceState, near: int | None) -> Iterator[int]:
        """Yield blocks of the source's most urgent level that hold something free."""
        free, held = self._chunks.free, source.held
        live = source.live[source.level]
        wanted = self._limits.sample_blocks
        if near is not None:
            yield near
        if len(live) <= wanted:
            for i in range(len(live) - 1, -1, -1):
                self.steps += 1
                if free[live[i]] & held[live[i]]:
                    yield live[i]
                else:
                    self._strike(source, live, i)
            return
        while wanted and live:
            self.steps += 1
            i = int(self._rng.random() * len(live))
            if free[live[i]] & held[live[i]]:
                wanted -= 1
                yield live[i]
            else:
                self._strike(source, live, i)

    def _strike(self, source: SourceState, live: array[int], i: int) -> None:
        source.listed[live[i]] = 0
        live[i] = live[-1]
        live.pop()

    def pick(self, source: SourceState, room_bytes: int) -> Draft:
        """Take free chunks for a request of at most `room_bytes` bytes."""
        draft = Draft(room_bytes, self._limits.max_request_spans)
        for _ in range(MAX_ROUNDS):
            choice = self.best(source)
            if choice is None or not self._take(source, *choice, draft):
                break
        return draft

    def pick_at(self, source: SourceState, position: int, room_bytes: int) -> Draft:
        """Take the free chunks from a position on that the source holds, if any."""
        draft = Draft(room_bytes, self._limits.max_request_spans)
        block, start = divmod(position, BLOCK_CHUNKS)
        width = ones((self._chunks.free[block] & source.held[block]) >> start)
        count = draft.add(self._chunks, position, width) if width else 0
        if count:
            self._chunks.take(block, (1 << count) - 1 << start, draft.size_bytes)
        return draft

    def pick_scattered(self, source: SourceState, room_bytes: int, *, by_rarity: bool) -> Draft:
        """Take free chunks for a request, the first one at random among the rarest."""
        draft = Draft(room_bytes, self._limits.max_request_spans)
        if not self.has_free(source):
            return draft
        chunks = self._chunks
        fewest, ties = 1 << 30, 0
        block = choices = -1
        for candidate in self._sample(source, None):
            mask = chunks.free[candidate] & source.held[candidate]
            rarity = 0
            if by_rarity:
                rarity, mask = chunks.rarest(candidate, mask, is_exact=True)
            count = mask.bit_count()
            if rarity < fewest:
                fewest, ties = rarity, 0
            elif rarity > fewest:
                continue
            ties += count
            if self._rng.random() * ties < count:
                block, choices = candidate, mask
        turn = int(self._rng.random() * BLOCK_CHUNKS)
        start = turn + zeros(later) if (later := choices >> turn) else zeros(choices)
        width = ones(choices >> start)
        count = draft.add(chunks, block * BLOCK_CHUNKS + start, width)
        if count:
            chunks.take(block, (1 << count) - 1 << start, draft.size_bytes)
        return draft

    def _take(self, source: SourceState, block: int, mask: int, draft: Draft) -> bool:
        """Take runs out of a set of chunks; return whether there is room for more."""
        chunks = self._chunks
        self.settle(source, block)
        while mask:
            self.steps += 1
            start, width = self._run(source, block, mask, draft.room_bytes // CHUNK_SIZE)
            before_bytes = draft.size_bytes
            count = draft.add(chunks, block * BLOCK_CHUNKS + start, width)
            if count:
                taken = (1 << count) - 1 << start
                mask &= ~taken
                chunks.take(block, taken, draft.size_bytes - before_bytes)
                source.cursor = block * BLOCK_CHUNKS + start + count
            if count < width:
                return False
        return True

    def settle(self, source: SourceState, block: int) -> None:
        """Note in which block a source works now; -1 for none."""
        if source.home != block:
            if source.home >= 0:
                self._workers[source.home] -= 1
            if block >= 0:
                self._workers[block] += 1
            source.home = block

    def _run(self, source: SourceState, block: int, mask: int, wanted: int) -> tuple[int, int]:
        """Return where in the block to begin, and how many chunks follow each other."""
        start = source.cursor - block * BLOCK_CHUNKS
        if 0 <= start < BLOCK_CHUNKS and mask >> start & 1:
            return start, ones(mask >> start)
        start, width = self.longest_run(mask)
        if width > 2 * max(wanted, 1):
            if self._workers[block] > 1:
                skipped = width // 2
            else:
                skipped = int(self._rng.random() * (width - wanted))
            start, width = start + skipped, width - skipped
        return start, width

    def longest_run(self, mask: int) -> tuple[int, int]:
        """Return start and width of the longest run of ones, ties at random."""
        starts, width = mask, 1
        doubled = [mask]
        while longer := starts & starts >> width:
            starts, width = longer, width * 2
            doubled.append(starts)
        for power in range(len(doubled) - 2, -1, -1):
            if longer := starts & doubled[power] >> width:
                starts, width = longer, width + (1 << power)
        turn = int(self._rng.random() * BLOCK_CHUNKS)
        later = starts >> turn
        if later:
            return turn + zeros(later), width
        return zeros(starts), width


def ones(number: int) -> int:
    """Return how many ones a number ends with."""
    return zeros(~number)


def zeros(number: int) -> int:
    """Return how many zeros a number ends with; it must not be zero."""
    return (number & -number).bit_length() - 1
