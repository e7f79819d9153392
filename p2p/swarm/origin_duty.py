"""Who of a swarm fetches which chunk from the origin, decided without a coordinator.

All members of a download that can reach the same origin take each of its bytes once:

1. Members are ranked by a rendezvous hash (Thaler & Ravishankar 1998) of their name and
   the swarm's key. Everybody who sees the same members sees the same ranks. The first
   `duty_members` are on duty; the others wait for what these pass on. Few are enough: an
   origin shares its uplink among those who ask, so with k askers each chunk takes k times
   as long to arrive and can be passed on that much later.
2. Each chunk belongs to the member on duty with the highest hash of member and chunk.
   Members take their own chunks from the front of one order that all share.
3. A hash alone leaves some with more than others. To give each the same number of every few
   chunks was tried: where members see different ones, nothing is left of the order, and
   behind NATs the origin gave 1.5 to 1.7 copies instead of 1.35. Whoever has
   finished its own relieves the others: of what nobody has announced it takes the chunks
   for which it ranks second, then third, from the end of the order, where the owner comes
   last; but not what should be on its way to the owner or to another that relieves it.
4. What a neighbour has announced is not fetched from the origin any more; not for long,
   though, if it never gave anything, and not at all once somebody has lied to us.
5. Who gets nothing and hears of nothing new for `duty_patience_s`, and longer the lower
   it ranks, takes a turn whatever its rank: members that are gone, silent or slow hold up
   nobody for long. Whose origin is `duty_gain` times as fast as all its peers together
   asks it freely.
6. At the very start only the first `duty_first` ask, one after the other, until something
   has come or was heard of: the first chunk is there the sooner.

No I/O, no clock. The order and the owners cost the same for a thousand chunks as for a
million, apart from one pass over the blocks when the members on duty change, or somebody is
not believed any more. Of a holder that goes only those blocks are looked at again that then
have chunks which nobody else holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache

from tensorswarm.store.digest import digest_of

from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .picker import Draft
from .source_state import SourceState
from .types import PlannerLimits, SourceKind

_MASK = (1 << 64) - 1

IN_FLIGHT = 2
"""Requests that a member on duty has open at an origin at most."""

_MOST_BEHIND = 100  # keeps the power finite; its result has reached its limit long before

MAX_RANKED_BLOCKS = 4096
"""Blocks whose chunks' owners are remembered: a million chunks, in some 10 MB if all are
looked at. With fewer than there are, each member that goes has them worked out anew."""


@lru_cache(maxsize=1 << 14)
def rank_of(key: bytes, name: str) -> int:
    """Return the rendezvous hash of a member in a swarm; the highest ranks first."""
    return int.from_bytes(digest_of(key + name.encode())[:8], "little")


def _mix(number: int) -> int:
    """Scramble 64 bits (the finalizer of splitmix64: Steele, Lea, Flood 2014)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31


class OriginDuty:
    """One member's part in fetching from origins.

    Parameters
    ----------
    chunks : ChunkMap
        The download.
    keys : sequence of bytes
        What each object is called in the whole swarm: its digest.
    limits : PlannerLimits
        The numbers.
    sources : mapping of str to SourceState
        Everybody who can be asked: origins among them have announced nothing.

    Attributes
    ----------
    is_shared : bool
        Whether there is anybody to share with.
    rank : int
        Our own place among the members; 0 is the first.
    was_lied_to : bool
        Whether a peer has sent wrong bytes.
    steps : int
        Blocks, sources and chunks' owners looked at so far.
    """

    def __init__(
        self,
        chunks: ChunkMap,
        keys: Sequence[bytes],
        limits: PlannerLimits,
        sources: Mapping[str, SourceState],
    ) -> None:
        self._chunks = chunks
        self._sources = sources
        self._counted_origins = 0
        self._names = keys
        self._limits = limits
        self._on_duty: tuple[int, ...] = ()
        self._me = 0
        self._front = 0
        self._backs = [chunks.block_count] * (limits.duty_members + 1)
        # Blocks passed already, of which something is left once more: for each turn.
        self._again: list[dict[int, None]] = [{} for _ in self._backs]
        self._turns: dict[int, list[dict[int, int]]] = {}
        self._doubtful: frozenset[str] = frozenset()
        self._is_all_announced = False  # by one: who holds all is in no count of holders
        self.is_shared = False
        self.rank = 0
        self.was_lied_to = False
        self.steps = 0

    def set_members(self, key: bytes, me: str, others: Collection[str]) -> None:
        """Note the members that can be seen besides us; nobody for no sharing."""
        self.is_shared = bool(others)
        self._me = rank_of(key, me)
        ranked = sorted({self._me, *[rank_of(key, name) for name in others]}, reverse=True)
        self.rank = ranked.index(self._me)
        on_duty = ranked[: self._limits.duty_members]
        if self._me not in on_duty:
            on_duty.append(self._me)  # for its turns out of patience
        if tuple(on_duty) != self._on_duty:
            self._on_duty = tuple(on_duty)
            self._turns.clear()
            self.look_again()

    def turn_at(self, hungry_since: float, known_since: float, *, is_first: bool = False) -> float:
        """Return from when we may ask the origin, if nothing comes from anybody before.

        The origin is `known_since`. The start of the swarm `is_first`: nothing has come
        from anybody yet.
        """
        limits = self._limits
        if is_first and self.rank < limits.duty_first:
            return known_since + self.rank * limits.duty_stagger_s
        if not is_first and self.rank < limits.duty_members:
            return 0.0
        behind = min(max(self.rank - limits.duty_members, 0), _MOST_BEHIND)
        patience_s = limits.duty_patience_s * limits.duty_growth**behind
        return hungry_since + min(patience_s, limits.duty_longest_s)

    def draft(self, now: float, origin: SourceState, room_bytes: int) -> Draft:
        """Choose what to ask an origin for: our own chunks, then what seems left over."""
        draft = Draft(room_bytes, self._limits.max_request_spans)
        self._sort_out(now)
        if self._is_all_announced:
            return draft
        self._count_origins()
        self._note_bared()
        again = self._again[0]
        while again:
            block = next(iter(again))
            if not self._fill(origin, block, draft):
                return draft
            del again[block]
        while self._front < self._chunks.block_count:
            if not self._fill(origin, self._front, draft):
                return draft
            self._front += 1
        for turn in range(1, len(self._on_duty)):
            again = self._again[turn]
            while not draft.positions and again:
                block = next(reversed(again))
                self._relieve(origin, block, turn, draft)
                if not draft.positions:
                    del again[block]
            while not draft.positions and self._backs[turn] > 0:
                self._relieve(origin, self._backs[turn] - 1, turn, draft)
                self._backs[turn] -= not draft.positions
        return draft

    def look_again(self) -> None:
        """Go through everything once more."""
        self._front = 0
        self._backs = [self._chunks.block_count] * (self._limits.duty_members + 1)
        for again in self._again:
            again.clear()
        self._chunks.bared.clear()

    def look_again_at(self, block: int) -> None:
        """Look at a block once more: chunks of it have become free, or are held by nobody."""
        self.steps += 1
        if block < self._front:
            self._again[0][block] = None
        for turn, back in enumerate(self._backs):
            if turn and block >= back:
                self._again[turn][block] = None

    def holder_gone(self) -> None:
        """Note that somebody who held something has gone.

        Only what nobody is counted for now need be looked at again, if all that are counted
        are peers who are believed.
        """
        self._count_origins()
        if not self.is_shared or self._doubtful or self._counted_origins:
            self.look_again()

    def _note_bared(self) -> None:
        bared = self._chunks.bared
        for block in bared:
            self.look_again_at(block)
        bared.clear()

    def _count_origins(self) -> None:
        self._counted_origins = sum(
            state.kind is SourceKind.ORIGIN and not state.holds_all
            for state in self._sources.values()
        )

    def _sort_out(self, now: float) -> None:
        """Find out who is not believed: its word alone keeps us from no chunk."""
        self.steps += len(self._sources)
        believed_since = now - self._limits.duty_patience_s
        doubtful = frozenset(
            name
            for name, state in self._sources.items()
            if state.kind is SourceKind.PEER
            and not state.record.proved_bytes
            and (self.was_lied_to or state.joined_at <= believed_since)
        )
        if doubtful - self._doubtful:
            self.look_again()
        self._doubtful = doubtful
        self._is_all_announced = any(
            state.holds_all and state.kind is SourceKind.PEER and name not in doubtful
            for name, state in self._sources.items()
        )

    def _left(self, origin: SourceState, block: int) -> int:
        """Return the chunks of a block that nobody who is believed has announced."""
        chunks = self._chunks
        self.steps += 1
        announced = chunks.held_by(block, 1 + self._counted_origins)
        if announced and self._doubtful:
            self.steps += len(self._sources)
            announced = 0
            for name, state in self._sources.items():
                if state.kind is SourceKind.PEER and name not in self._doubtful:
                    announced |= state.held[block]
        return chunks.free[block] & origin.held[block] & ~announced

    def _fill(self, origin: SourceState, block: int, draft: Draft) -> bool:
        """Take our own chunks of a block; return whether there is room for more."""
        left = self._left(origin, block)
        ours = left and left & self._in_turn(block)[0].get(self._me, 0)
        while ours:
            bit = ours & -ours
            ours ^= bit
            if not self._take(block * BLOCK_CHUNKS + bit.bit_length() - 1, draft):
                return False
        return True

    def _relieve(self, origin: SourceState, block: int, turn: int, draft: Draft) -> None:
        """Take the last chunk of a block that is ours in a turn, and on nobody's way to it.

        What is on its way is guessed by the same rules: each owner fetches its first two; who
        has none of its own fetches the last that is its in the first turn, or the next.
        """
        left = self._left(origin, block)
        if not left:
            return
        turns = self._in_turn(block)
        idle = []
        taken = 0
        for member in self._on_duty:
            own = left & turns[0].get(member, 0)
            for _ in range(IN_FLIGHT):
                first = own & ~taken
                taken |= first & -first
            if not own:
                idle.append(member)
        for each in range(1, turn + 1):
            for member in tuple(idle):
                rest = left & turns[each].get(member, 0) & ~taken
                if not rest:
                    continue
                last = rest.bit_length() - 1
                if member == self._me:
                    self._take(block * BLOCK_CHUNKS + last, draft)
                    return
                taken |= 1 << last
                idle.remove(member)

    def _in_turn(self, block: int) -> list[dict[int, int]]:
        """Return, for each turn and member, the chunks of a block that are its then."""
        turns = self._turns.get(block)
        if turns is None:
            if len(self._turns) >= MAX_RANKED_BLOCKS:
                self._turns.clear()
            turns = self._turns[block] = [{} for _ in self._on_duty]
            self.steps += BLOCK_CHUNKS
            for offset in range(BLOCK_CHUNKS):
                position = block * BLOCK_CHUNKS + offset
                if not self._chunks.proved[block] >> offset & 1:
                    for owners, member in zip(turns, self._order(position), strict=True):
                        owners[member] = owners.get(member, 0) | 1 << offset
        return turns

    def _take(self, position: int, draft: Draft) -> bool:
        block, offset = divmod(position, BLOCK_CHUNKS)
        before_bytes = draft.size_bytes
        if not draft.add(self._chunks, position, 1):
            return False
        self._chunks.take(block, 1 << offset, draft.size_bytes - before_bytes)
        return draft.room_bytes > 0

    @cached_property
    def _keys(self) -> array[int]:
        """The objects' names as numbers; most downloads never share, and need none."""
        return array(
            "Q", [int.from_bytes(key[:8].ljust(8, b"\0"), "little") for key in self._names]
        )

    def _order(self, position: int) -> list[int]:
        """Return the members on duty in the order in which a chunk is theirs."""
        object_index, chunk = self._chunks.locate(position)
        return sorted(self._on_duty, key=self._hash_of(object_index, chunk), reverse=True)

    def _hash_of(self, object_index: int, chunk: int) -> Callable[[int], int]:
        """Return what a member is ranked by for a chunk."""
        place = self._keys[object_index] + chunk * 0x9E3779B97F4A7C15
        return lambda member: _mix((place ^ member) & _MASK)
