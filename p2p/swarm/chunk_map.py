"""Which chunks of a download are proved, in flight or free, and how rare each is.

All chunks stand in one line of *positions*: the most urgent objects first, the
chunks of an object next to each other, small objects side by side. The line is
cut into blocks of 256 positions; a block never mixes priorities. A set of
chunks inside a block is a 256-bit integer, so that one operation of the
interpreter handles 256 chunks and the cost of a decision does not depend on
the number of chunks.

A chunk is *proved*, *free* (nobody was asked for it), *unready* (it cannot be asked for
yet, and counts as free in bytes) or none of these, that is, in flight. Positions that only
fill up a block count as proved.

Rarity is the number of present sources that hold a chunk, where sources that
hold everything are left out: they raise every count alike. The counts of a
block are kept as bit planes (plane k holds bit k of all 256 counts), so adding
a source's bitmap is a ripple-carry addition over a handful of integers, and
finding the rarest of a set is one walk down the planes.

The map knows neither sources nor requests; it does no I/O.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, repeat

from tensorswarm.store.digest import CHUNK_SIZE, MAX_OBJECT_SIZE, chunk_count, chunk_length
from tensorswarm.store.errors import BadInput
from tensorswarm.store.runs import runs_in

from .source import Span

BLOCK_CHUNKS = 256
"""Positions in a block: wide enough to make planning cheap and runs long (256 MiB),
narrow enough that integer operations stay near the cost of the smallest ones."""

FULL_BLOCK = (1 << BLOCK_CHUNKS) - 1
"""The set of all positions of a block."""


class ChunkMap:
    """State and rarity of every chunk of a download.

    Parameters
    ----------
    sizes_bytes : sequence of int
        Sizes of the wanted objects.
    proved : mapping of int to bytes
        For some objects, which of their chunks are there already: chunk i is
        bit i % 8 of byte i // 8.
    priorities : mapping of int to int
        For some objects a priority other than 0; lower numbers come first.
    max_chunks, max_priorities : int
        See `PlannerLimits`.
    unready : iterable of int
        Objects that cannot be asked for yet; see `make_ready`.

    Raises
    ------
    BadInput
        A size is negative or too large, or there are too many chunks.
    """

    def __init__(
        self,
        sizes_bytes: Sequence[int],
        proved: Mapping[int, bytes],
        priorities: Mapping[int, int],
        *,
        max_chunks: int,
        max_priorities: int,
        unready: Iterable[int] = (),
    ) -> None:
        if len(sizes_bytes) and not 0 <= min(sizes_bytes) <= max(sizes_bytes) <= MAX_OBJECT_SIZE:
            raise BadInput("an object's size is negative or too large")
        self._sizes = array("q", sizes_bytes)
        self.missing_chunks = sum([-(-size // CHUNK_SIZE) for size in self._sizes])
        self.missing_bytes = sum(self._sizes)
        if self.missing_chunks > max_chunks:
            raise BadInput(f"{self.missing_chunks} chunks are more than {max_chunks}")
        self._lay_out(priorities, max_priorities)
        self.everything = [FULL_BLOCK] * self.block_count
        self._planes: list[list[int]] = [[] for _ in range(self.block_count)]
        self.counted_blocks = 0
        self.bared: dict[int, int] = {}
        self.free_bytes = self.missing_bytes
        for object_index, bitmap in proved.items():
            self._mark_proved(object_index, bitmap)
        self.unready: dict[int, int] = {}
        self.unready_chunks = 0
        for block, mask in self.spread_whole(unready):
            if held_back := mask & self.free[block]:
                self.unready[block] = self.unready.get(block, 0) | held_back
                self.unready_chunks += held_back.bit_count()
                self.free[block] &= ~mask

    def _lay_out(self, priorities: Mapping[int, int], max_priorities: int) -> None:
        """Give every object its positions, and every priority its blocks."""
        self._is_in_order = not priorities and all(self._sizes)
        ranks = sorted({0, *priorities.values()})
        level_of_priority = {p: min(i, max_priorities - 1) for i, p in enumerate(ranks)}
        order: Iterable[int] = range(len(self._sizes))
        if priorities:
            order = sorted(order, key=lambda i: priorities.get(i, 0))
        if self._is_in_order:
            self._lay_out_in_order()
            return
        self._first = array("q", bytes(8 * len(self._sizes)))
        self._starts = array("q")
        self._objects = array("q")
        self.free: list[int] = []
        self.level_of = array("H")
        position, level = 0, -1
        for object_index in order:
            count = chunk_count(self._sizes[object_index])
            if not count:
                continue
            object_level = level_of_priority[priorities.get(object_index, 0)]
            if object_level != level:
                position = self._end_level(position, level)
                level = object_level
            self._first[object_index] = position
            self._starts.append(position)
            self._objects.append(object_index)
            position += count
        self._end_level(position, level)
        self.block_count = len(self.free)
        self.level_count = max(self.level_of, default=-1) + 1
        self.proved = [FULL_BLOCK ^ free for free in self.free]

    def _lay_out_in_order(self) -> None:
        """Lay out objects of one priority, none of them empty, one behind the other."""
        ends = array("q", accumulate([-(-size // CHUNK_SIZE) for size in self._sizes]))
        self._first = array("q", [0])
        self._first += ends
        total = self._first.pop()
        self._starts = self._first
        self._objects = array("q", range(len(self._sizes)))
        self.free = []
        self.level_of = array("H")
        self._end_level(total, 0)
        self.block_count = len(self.free)
        self.level_count = max(self.level_of, default=-1) + 1
        self.proved = [FULL_BLOCK ^ free for free in self.free]

    def _end_level(self, position: int, level: int) -> int:
        """Fill up the last block of a priority; return where the next one starts."""
        while position > len(self.free) * BLOCK_CHUNKS:
            width = min(BLOCK_CHUNKS, position - len(self.free) * BLOCK_CHUNKS)
            self.free.append((1 << width) - 1)
            self.level_of.append(level)
        return len(self.free) * BLOCK_CHUNKS

    def _mark_proved(self, object_index: int, bitmap: bytes) -> None:
        size = self._size_of(object_index)
        count = 0
        for block, mask in self.spread(object_index, bitmap):
            count += mask.bit_count()
            self.proved[block] |= mask
            self.free[block] &= ~mask
        last = chunk_count(size) - 1
        size_bytes = count * CHUNK_SIZE
        if last >= 0 and self.is_proved(self._first[object_index] + last):
            size_bytes -= CHUNK_SIZE - chunk_length(size, last)
        self.missing_chunks -= count
        self.missing_bytes -= size_bytes
        self.free_bytes -= size_bytes

    # where things are

    def _size_of(self, object_index: int) -> int:
        if not 0 <= object_index < len(self._sizes):
            raise BadInput(f"there is no object {object_index}")
        return self._sizes[object_index]

    def position(self, object_index: int, chunk: int) -> int:
        """Return the position of a chunk; `BadInput` when there is no such chunk."""
        if not 0 <= chunk < chunk_count(self._size_of(object_index)):
            raise BadInput(f"object {object_index} has no chunk {chunk}")
        return self._first[object_index] + chunk

    def size_of_chunk(self, object_index: int, chunk: int) -> int:
        """Return the bytes of a chunk."""
        return min(CHUNK_SIZE, self._sizes[object_index] - chunk * CHUNK_SIZE)

    def locate(self, position: int) -> tuple[int, int]:
        """Return object index and chunk number at a position."""
        place = bisect_right(self._starts, position) - 1
        return self._objects[place], position - self._starts[place]

    def extent(self, position: int) -> tuple[int, int]:
        """Return the object at a position, and how many of its chunks lie from there on."""
        object_index, chunk = self.locate(position)
        return object_index, chunk_count(self._sizes[object_index]) - chunk

    def size_at(self, position: int) -> int:
        """Return the bytes of the chunk at a position."""
        object_index, chunk = self.locate(position)
        return chunk_length(self._sizes[object_index], chunk)

    def spread(self, object_index: int, bitmap: bytes | None) -> Iterable[tuple[int, int]]:
        """Return (block, set) for those chunks of an object that a bitmap names.

        None names all of them. Bits beyond the object's end are ignored, and
        bits that a short bitmap lacks count as unset.
        """
        if not 0 <= object_index < len(self._sizes):
            raise BadInput(f"there is no object {object_index}")
        count = (self._sizes[object_index] + CHUNK_SIZE - 1) // CHUNK_SIZE
        first = self._first[object_index]
        block, offset = divmod(first, BLOCK_CHUNKS)
        if offset + count > BLOCK_CHUNKS:
            return self._spread_far(first, count, bitmap)
        mask = (1 << count) - 1
        if bitmap is not None:
            mask &= int.from_bytes(bitmap[: (count + 7) // 8], "little")
        return ((block, mask << offset),) if mask else ()

    def _spread_far(
        self, first: int, count: int, bitmap: bytes | None
    ) -> Iterator[tuple[int, int]]:
        """Spread an object over several blocks."""
        done = 0
        while done < count:
            block, offset = divmod(first + done, BLOCK_CHUNKS)
            width = min(BLOCK_CHUNKS - offset, count - done)
            mask = (1 << width) - 1
            if bitmap is not None:
                cut = bitmap[done // 8 : (done + width + 7) // 8]
                mask &= int.from_bytes(cut, "little") >> done % 8
            if mask:
                yield block, mask << offset
            done += width

    def spread_whole(self, object_indices: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yield (block, set) for whole objects, those in one block together."""
        if isinstance(object_indices, range) and object_indices and self._is_in_order:
            first, last = object_indices[0], object_indices[-1]
            if last - first == len(object_indices) - 1:  # side by side, whatever their number
                self._size_of(first)
                yield from _cut(
                    self._first[first], self._first[last] + chunk_count(self._size_of(last))
                )
                return
        start = stop = 0
        scattered: dict[int, int] = {}
        for object_index in object_indices:
            count = chunk_count(self._size_of(object_index))
            first = self._first[object_index]
            if count and first == stop:  # next to the one before: one run
                stop += count
            elif count == 1:
                block, offset = divmod(first, BLOCK_CHUNKS)
                scattered[block] = scattered.get(block, 0) | 1 << offset
            elif count:
                yield from _cut(start, stop)
                start, stop = first, first + count
        yield from _cut(start, stop)
        yield from scattered.items()

    def fit(
        self, position: int, width: int, room_bytes: int, max_spans: int
    ) -> tuple[list[Span], int, int]:
        """Cut as much as fits from a run of positions, as spans.

        Returns
        -------
        spans : list of Span
            The chunks, in order of position.
        count : int
            Number of positions used.
        size_bytes : int
            Their bytes, at most `room_bytes`.
        """
        place = bisect_right(self._starts, position) - 1
        if fitted := self._fit_single(place, position, min(width, max_spans), room_bytes):
            return fitted
        spans: list[Span] = []
        size_bytes = used = 0
        while used < width and len(spans) < max_spans:
            object_index = self._objects[place]
            chunk = position + used - self._starts[place]
            object_size = self._sizes[object_index]
            available = min(width - used, chunk_count(object_size) - chunk)
            left_bytes = object_size - chunk * CHUNK_SIZE
            room = room_bytes - size_bytes
            is_cut = min(available * CHUNK_SIZE, left_bytes) > room
            if is_cut:
                available = min(available, room // CHUNK_SIZE)
            if available:
                spans.append(Span(object_index, chunk, available))
                size_bytes += min(available * CHUNK_SIZE, left_bytes)
                used += available
            if is_cut:
                break
            place += 1
        return spans, used, size_bytes

    def _fit_single(
        self, place: int, position: int, width: int, room_bytes: int
    ) -> tuple[list[Span], int, int] | None:
        """Cut what fits from a run of objects of one chunk each; None if it is no such run."""
        stop = place + width
        if width < 2 or self._starts[place] != position or stop >= len(self._starts):
            return None
        if self._starts[stop] - position != width:
            return None  # one of them has several chunks
        objects = self._objects[place:stop]
        if objects[-1] - objects[0] == width - 1:
            sizes = self._sizes[objects[0] : objects[-1] + 1]
        else:
            sizes = array("q", [self._sizes[index] for index in objects])
        ends = list(accumulate(sizes))
        count = bisect_right(ends, room_bytes)
        if not count:
            return [], 0, 0
        return list(map(Span, objects[:count], repeat(0), repeat(1))), count, ends[count - 1]

    # free, in flight, proved

    def is_proved(self, position: int) -> bool:
        """Tell whether the chunk at a position is proved."""
        return bool(self.proved[position // BLOCK_CHUNKS] >> position % BLOCK_CHUNKS & 1)

    def take(self, block: int, mask: int, size_bytes: int) -> None:
        """Note that free chunks are asked for now."""
        self.free[block] &= ~mask
        self.free_bytes -= size_bytes

    def put_back(self, position: int) -> None:
        """Note that nobody is asked for a chunk any more."""
        self.free[position // BLOCK_CHUNKS] |= 1 << position % BLOCK_CHUNKS
        self.free_bytes += self.size_at(position)

    def make_ready(self, object_indices: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Let unready objects be asked for; yield (block, set) of what is free now."""
        for block, mask in self.spread_whole(object_indices):
            now_ready = self.unready.get(block, 0) & mask
            if now_ready:
                self._end_unready(block, now_ready)
                self.free[block] |= now_ready
                yield block, now_ready

    def _end_unready(self, block: int, mask: int) -> None:
        self.unready_chunks -= mask.bit_count()
        self.unready[block] ^= mask
        if not self.unready[block]:
            del self.unready[block]

    def prove(self, position: int, size: int) -> bool:
        """Note a chunk of `size` bytes as proved; return whether it was missing until now."""
        block, bit = position // BLOCK_CHUNKS, 1 << position % BLOCK_CHUNKS
        if self.proved[block] & bit:
            return False
        self.proved[block] |= bit
        self.missing_chunks -= 1
        self.missing_bytes -= size
        if self.free[block] & bit:
            self.take(block, bit, size)
        elif self.unready and self.unready.get(block, 0) & bit:
            self._end_unready(block, bit)
            self.free_bytes -= size
        return True

    def prove_small(self, object_indices: Iterable[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Note objects of one chunk each as proved.

        Returns
        -------
        proved : dict of int to int
            Position and bytes of those that were missing until now.
        known : dict of int to int
            Index and bytes of the others.

        Raises
        ------
        BadInput
            An object is not of one chunk.
        """
        proved: dict[int, int] = {}
        known: dict[int, int] = {}
        indices = list(object_indices)
        one_by_one: list[int] = []
        for start, stop in runs_in(indices):
            if at_once := self._prove_run(indices[start:stop]):
                proved.update(at_once)
            else:
                one_by_one += indices[start:stop]
        first, sizes, count, prove = self._first, self._sizes, len(self._sizes), self.prove
        for object_index in one_by_one:
            if not 0 <= object_index < count or not 0 < (size := sizes[object_index]) <= CHUNK_SIZE:
                raise BadInput(f"object {object_index} is not of one chunk")
            position = first[object_index]
            if prove(position, size):
                proved[position] = size
            else:
                known[object_index] = size
        return proved, known

    def _prove_run(self, indices: list[int]) -> dict[int, int]:
        """Note a run of objects as proved, if they are of one chunk each, and all in flight.

        Returns positions and sizes; nothing is noted, and nothing returned, if they are not.
        """
        if len(indices) < 2 or indices[0] < 0 or indices[-1] >= len(self._sizes):
            return {}
        count, start = len(indices), self._first[indices[0]]
        sizes = self._sizes[indices[0] : indices[-1] + 1]
        positions = range(start, start + count)
        if min(sizes) < 1 or max(sizes) > CHUNK_SIZE:
            return {}
        if self._first[indices[0] : indices[-1] + 1] != array("q", positions):
            return {}
        cuts = list(_cut(start, start + count))
        if any(mask & (self.proved[b] | self.free[b] | self.unready.get(b, 0)) for b, mask in cuts):
            return {}
        for block, mask in cuts:
            self.proved[block] |= mask
        self.missing_chunks -= count
        self.missing_bytes -= sum(sizes)
        return dict(zip(positions, sizes, strict=True))

    # rarity

    def add_holder(self, block: int, mask: int) -> None:
        """Count one more source for a set of chunks."""
        if self.bared and block in self.bared:
            self.bared[block] &= ~mask
            if not self.bared[block]:
                del self.bared[block]
        planes = self._planes[block]
        self.counted_blocks += not planes
        for i, plane in enumerate(planes):
            planes[i] = plane ^ mask
            mask &= plane
            if not mask:
                return
        planes.append(mask)

    def remove_holder(self, block: int, mask: int) -> None:
        """Count one source less for a set of chunks it was counted for.

        Those that nobody else is counted for are noted in `bared`, until somebody is.
        """
        planes, bare = self._planes[block], mask & ~self.proved[block]
        for i, plane in enumerate(planes):
            planes[i] = plane ^ mask
            mask &= ~plane
            if not mask:
                break
        while planes and not planes[-1]:
            planes.pop()
        self.counted_blocks -= not planes
        for plane in planes:
            bare &= ~plane
        if bare:
            self.bared[block] = self.bared.get(block, 0) | bare

    def rarest(self, block: int, candidates: int, *, is_exact: bool = False) -> tuple[int, int]:
        """Return the smallest count among candidates, and those that have it.

        Unless it is to be exact, the count is cut to its two leading bits (0, 1, 2, 3,
        4–5, 6–7, 8–11 …): who tells 8 holders from 9 gets single chunks where runs
        would do.
        """
        planes = self._planes[block]
        rarity = 0
        lowest = 0
        for i in range(len(planes) - 1, -1, -1):
            if i < lowest:
                break
            fewer = candidates & ~planes[i]
            if fewer:
                candidates = fewer
            else:
                lowest = lowest if rarity or is_exact else max(i - 1, 0)
                rarity |= 1 << i
        return rarity, candidates

    def held_by(self, block: int, at_least: int) -> int:
        """Return the chunks of a block with at least so many counted holders.

        Counts are compared with the number bit by bit, the lowest first.
        """
        planes = self._planes[block]
        if at_least >> len(planes):
            return 0
        held = FULL_BLOCK
        for i, plane in enumerate(planes):
            held = held & plane if at_least >> i & 1 else held | plane
        return held

    def unheld_objects(self) -> list[int]:
        """Return the objects with a missing chunk that has no counted holder."""
        found: set[int] = set()
        for block in range(self.block_count):
            mask = FULL_BLOCK & ~self.proved[block] & ~self.held_by(block, 1)
            while mask:
                offset = (mask & -mask).bit_length() - 1
                object_index, chunk = self.locate(block * BLOCK_CHUNKS + offset)
                found.add(object_index)
                end = offset - chunk + chunk_count(self._sizes[object_index])
                mask = mask >> end << end
        return sorted(found)


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield (block, set) for the positions from `start` to before `stop`."""
    while start < stop:
        block, offset = divmod(start, BLOCK_CHUNKS)
        width = min(BLOCK_CHUNKS - offset, stop - start)
        yield block, (1 << width) - 1 << offset
        start += width
