"""What the planner knows of one source: holdings, requests in flight, speed.

Pure bookkeeping without decisions. Times are seconds of whatever clock the
caller uses; nothing here reads one.

A source's holdings are one set per block of the chunk map, and all sources
that hold everything share one list. Its *live* blocks are those where it may
hold something free; exhausted ones are struck off when a search meets them
and come back when a chunk of theirs is free again, so that a search costs the
same however many chunks there are.
"""

from __future__ import annotations

import math
from array import array

from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .source import Failure
from .types import SourceKind, SourceStatistics

RATE_WINDOW_S = 0.25
"""Bytes are gathered for this long before they count as a measurement of speed."""

RATE_MEMORY_S = 1.0
"""Time after which a falling speed is mostly believed."""

FIRST_RATE_S = 0.01
"""Shortest first measurement: bytes that came in one gulp say nothing about speed."""

FIRST_RATE_BYTES = 64 << 10
"""Fewest bytes for a first measurement, unless they took a second: fewer measure
latency."""


class RateEstimate:
    """Speed of a source while it has work, and its latency when it had none.

    The time up to the first byte counts as latency, not as speed. A rising speed is
    believed by half at once, since asking too little of a source would make the low
    figure come true; a falling one is averaged over about `RATE_MEMORY_S`.

    Attributes
    ----------
    bytes_per_s : float or None
        None until it is known.
    latency_s : float
        Last time from a request to its first byte; 0 until known.
    first_chunk_s : float or None
        Time from the first request to the first chunk; None until it came.
    vain_s : float
        Longest time that it was asked without a chunk before the request was closed.
    """

    __slots__ = (
        "_asked_at", "_busy_bytes", "_gathered_bytes", "_since", "bytes_per_s",
        "first_chunk_s", "latency_s", "vain_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self.latency_s = 0.0
        self.first_chunk_s: float | None = None
        self.vain_s = 0.0
        self._busy_bytes = self._gathered_bytes = 0
        self._asked_at = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """Note that the source gets work after it had none."""
        self._asked_at = now
        self._since = None
        self._busy_bytes = 0

    def note(self, now: float, byte_count: int) -> None:
        """Count bytes that arrived."""
        self._busy_bytes += byte_count
        if self._since is None:
            self.latency_s = now - self._asked_at
            self._since = now
            self._gathered_bytes = 0
            return
        self._gathered_bytes += byte_count
        if now >= self._since + RATE_WINDOW_S:
            self.settle(now)

    def end(self, now: float) -> None:
        """Note that the source has no work any more.

        It is at least as fast as it was over all, latency included. That is all there
        is to know of one whose bytes come in gulps, as the caller hears of them.
        """
        self.settle(now)
        if self._busy_bytes >= FIRST_RATE_BYTES:
            least = self._busy_bytes / max(now - self._asked_at, FIRST_RATE_S)
            self.bytes_per_s = max(self.bytes_per_s or 0.0, least)
        if self.first_chunk_s is None:
            self.vain_s = max(self.vain_s, now - self._asked_at)

    def note_chunk(self, now: float) -> None:
        """Note that a chunk is complete."""
        if self.first_chunk_s is None:
            self.first_chunk_s = now - self._asked_at
        if self.bytes_per_s is None:
            self.settle(now)

    def settle(self, now: float) -> None:
        """Take what was gathered as a measurement, if it says enough."""
        if self._since is None or now < self._since + FIRST_RATE_S or not self._gathered_bytes:
            return
        elapsed_s = now - self._since
        sample = self._gathered_bytes / elapsed_s
        if self.bytes_per_s is None:
            if self._gathered_bytes < FIRST_RATE_BYTES and elapsed_s < RATE_MEMORY_S:
                return
            self.bytes_per_s = sample
        else:
            weight = elapsed_s / (elapsed_s + RATE_MEMORY_S)
            if sample > self.bytes_per_s:
                weight = max(weight, 0.5)
            self.bytes_per_s += weight * (sample - self.bytes_per_s)
        self._since = now
        self._gathered_bytes = 0


class SteadyRate:
    """Bytes per second over the last while, the older the less.

    Parameters
    ----------
    memory_s : float
        Time after which bytes count for 1/e.
    """

    __slots__ = ("_at", "_bytes", "_memory_s")

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._bytes = 0.0
        self._at = 0.0

    def note(self, now: float, byte_count: int) -> None:
        """Count bytes."""
        self._bytes = self._bytes * math.exp((self._at - now) / self._memory_s) + byte_count
        self._at = now

    def at(self, now: float) -> float:
        """Return the rate now."""
        return self._bytes * math.exp((self._at - now) / self._memory_s) / self._memory_s


class SourceRecord:
    """What is remembered of a name, also while it is away."""

    __slots__ = (
        "dropped", "duplicate_bytes", "is_liar", "kind", "proved_bytes", "refused_bytes",
        "refused_positions", "stalls",
    )  # fmt: skip

    def __init__(self, kind: SourceKind) -> None:
        self.kind = kind
        self.proved_bytes = 0
        self.duplicate_bytes = 0
        self.refused_bytes = 0
        self.refused_positions: frozenset[int] = frozenset()
        self.stalls = 0
        self.is_liar = False
        self.dropped: Failure | None = None


class OpenRequest:
    """A request in flight.

    Attributes
    ----------
    left : dict of int to None
        Positions still expected of it, in the order asked.
    skipped : dict of int to None
        Positions that somebody else proved before this request brought them.
    pending_bytes : int
        Bytes that have not arrived yet.
    asked_at : float
        When it was asked.
    active_at : float
        When it was asked or last gave bytes.
    was_refused : bool
        Whether a chunk of it did not match its hash.
    """

    __slots__ = (
        "active_at", "answered_bytes", "asked_at", "left", "pending_bytes", "request_id",
        "size_bytes", "skipped", "source", "was_refused",
    )  # fmt: skip

    def __init__(
        self,
        source: SourceState,
        request_id: int,
        positions: list[int],
        size_bytes: int,
        now: float,
    ) -> None:
        self.source = source
        self.request_id = request_id
        self.left: dict[int, None] = dict.fromkeys(positions)
        self.skipped: dict[int, None] = {}
        self.size_bytes = size_bytes
        self.pending_bytes = size_bytes
        self.answered_bytes = 0
        self.asked_at = self.active_at = now
        self.was_refused = False


class SourceState:
    """A source that is present.

    Attributes
    ----------
    holds_all : bool
        It holds every chunk, and is not counted in the rarity of any.
    held : list of int
        The chunks it holds, per block; shared while `holds_all`.
    live : list of array
        Per priority level, the blocks where it may hold something free.
    level : int
        No level before this one has live blocks.
    requests : dict of int to OpenRequest
        By id, oldest first.
    queued_bytes : int
        Bytes asked of it that have not arrived.
    home : int
        Block it works in, or -1.
    cursor : int
        Position after the last one asked.
    head_since : float
        When the oldest request became the oldest, or bytes came that belong to no
        request known.
    answered_at : float
        When it last answered a chunk, or got work after it had none.
    has_spoken : bool
        Whether any byte came from it since it is here.
    empty_answers : int
        Requests in a row that it called done without what was asked.
    parked_until : float or None
        It found no work, and need not look again before.
    joined_at : float
        When it came.
    makes_offers : bool
        Whether it says when it can be asked.
    offered_at : float
        When it last made an offer, or was asked.
    offers : list of int
        The positions it offers, oldest first.
    distance : int
        How far it is; 0 is nearest. It matters only to `nearness`.
    took_s : float or None
        Time from asking to the end of the request that ended last.
    counted_rate : float
        What it adds to the planner's sum of speeds.
    """

    __slots__ = (
        "answered_at", "counted_rate", "cursor", "distance", "empty_answers", "has_spoken",
        "head_since", "held", "holds_all", "home", "joined_at", "kind", "level", "listed", "live",
        "makes_offers", "name", "offered_at", "offers", "parked_until", "queued_bytes",
        "rate", "record", "requests", "took_s",
    )  # fmt: skip

    def __init__(self, name: str, record: SourceRecord, chunks: ChunkMap) -> None:
        self.name = name
        self.kind = record.kind
        self.record = record
        self.holds_all = False
        self.held = [0] * chunks.block_count
        self.live = [array("I") for _ in range(chunks.level_count)]
        self.listed = bytearray(chunks.block_count)
        self.level = chunks.level_count
        self.requests: dict[int, OpenRequest] = {}
        self.queued_bytes = 0
        self.rate = RateEstimate()
        self.home = -1
        self.cursor = -1
        self.head_since = 0.0
        self.answered_at = 0.0
        self.has_spoken = False
        self.empty_answers = 0
        self.parked_until: float | None = None
        self.distance = 0
        self.counted_rate = 0.0
        self.makes_offers = False
        self.offered_at = 0.0
        self.joined_at = 0.0
        self.offers: list[int] = []
        self.took_s: float | None = None

    # holdings

    def holds(self, position: int) -> bool:
        """Tell whether the source holds the chunk at a position."""
        return bool(self.held[position // BLOCK_CHUNKS] >> position % BLOCK_CHUNKS & 1)

    def list_block(self, block: int, level: int) -> None:
        """Note that the source may hold something free in a block."""
        if not self.listed[block]:
            self.listed[block] = 1
            self.live[level].append(block)
        self.level = min(self.level, level)

    def gain(self, chunks: ChunkMap, block: int, mask: int) -> bool:
        """Note that the source holds some chunks of a block; return whether it is work.

        Of chunks that are proved already nothing is noted: nobody asks who holds them.
        """
        held = self.held
        new = mask & ~(held[block] | chunks.proved[block])
        if not new:
            return False
        held[block] |= new
        chunks.add_holder(block, new)
        if not new & chunks.free[block]:
            return False
        if not self.listed[block]:
            self.list_block(block, chunks.level_of[block])
        return True

    def gain_all(self, chunks: ChunkMap) -> None:
        """Note that the source holds every chunk."""
        if self.holds_all:
            return
        self.uncount(chunks)
        self.holds_all = True
        self.held = chunks.everything
        for block in range(chunks.block_count):
            if chunks.free[block]:
                self.list_block(block, chunks.level_of[block])

    def lose(self, chunks: ChunkMap, block: int, mask: int) -> None:
        """Note that the source does not hold some chunks of a block after all."""
        if self.holds_all:
            self.holds_all = False
            self.held = list(chunks.everything)
            for counted in range(chunks.block_count):
                chunks.add_holder(counted, self.held[counted])
        gone = mask & self.held[block]
        if gone:
            self.held[block] ^= gone
            chunks.remove_holder(block, gone)

    def bar(self, chunks: ChunkMap, position: int) -> None:
        """Note that the source is not to be asked for a single chunk."""
        if self.holds(position):
            self.lose(chunks, position // BLOCK_CHUNKS, 1 << position % BLOCK_CHUNKS)

    def bar_refused(self, chunks: ChunkMap) -> None:
        """Keep the source from the chunks that it gave wrongly before."""
        for position in self.record.refused_positions:
            self.bar(chunks, position)

    def uncount(self, chunks: ChunkMap) -> None:
        """Take the source's holdings out of the rarity of chunks."""
        if not self.holds_all:
            for block, mask in enumerate(self.held):
                if mask:
                    chunks.remove_holder(block, mask)

    # time

    def seconds_for(self, extra_bytes: int) -> float | None:
        """Return the time it needs for its queue and some more bytes; None if unknown."""
        rate = self.rate.bytes_per_s
        if rate is None:
            return None
        return max(self.rate.latency_s, self.queued_bytes / rate) + extra_bytes / rate

    def seconds_guessed(self, extra_bytes: int, untried_s: float) -> float:
        """Return `seconds_for`, or a guess.

        Before its speed is known, a source should need for each request what it needed
        for its first chunk. Before that one came: `untried_s` for its first request, or
        twice as long as it was tried in vain; of another one nothing can be expected.
        """
        seconds = self.seconds_for(extra_bytes)
        if seconds is not None:
            return seconds
        if self.rate.first_chunk_s is not None:
            return self.rate.first_chunk_s * (1 + len(self.requests))
        return math.inf if self.requests else max(untried_s, 2 * self.rate.vain_s)

    def silent_since(self) -> float:
        """Return when its oldest request last moved; there must be one."""
        oldest = next(iter(self.requests.values()))
        return max(oldest.active_at, self.head_since)


def speed_of(state: SourceState) -> float:
    """Return the bytes per second of a source, 0 until they are known."""
    return state.rate.bytes_per_s or 0.0


def statistics_of(name: str, record: SourceRecord, state: SourceState | None) -> SourceStatistics:
    """Return the public view of a source, present or not."""
    return SourceStatistics(
        source=name,
        kind=record.kind,
        proved_bytes=record.proved_bytes,
        duplicate_bytes=record.duplicate_bytes,
        refused_bytes=record.refused_bytes,
        rate_bytes_per_s=state.rate.bytes_per_s if state else None,
        in_flight_requests=len(state.requests) if state else 0,
        in_flight_bytes=state.queued_bytes if state else 0,
        is_present=state is not None,
        dropped=record.dropped,
    )
