"""The planner: which chunk to ask of which source, and when to give a source up.

Purpose: fetch a set of objects from many sources of different speed and honesty as
fast as they can together, and never slower than the best of them alone.

How it is driven. The planner does no I/O and reads no clock. Its owner tells it what
happens (`add_source`, `chunk_proved`, `request_failed`, ...), each time with the time
`now` on one clock that never goes back, then calls `actions` and carries out what it
returns; when nothing happens until `next_deadline`, it calls `actions` again. The same
calls with the same random generator give the same actions.

Rules
- A source gets work as soon as it holds something wanted: two requests of one chunk,
  and once its speed is known, about `queue_s` seconds of work in two to four requests.
- What to ask is `picker`'s rule: priority, then rarity, then long runs.
- Nearly at the end requests shrink, a slow source leaves the rest to a fast one, and
  chunks in flight are asked twice when the second copy should be sooner (`endgame`).
- A source is dropped when it is silent for `stall_s`, or slower than a chunk in
  `slow_chunk_s` while others hold all it holds. Its chunks are free at once.
- A peer whose bytes do not match their hash is dropped and never taken again; what it
  gave before was proved and stays. An origin is only not asked for that chunk again:
  its files may have changed, and which ones, the owner can tell better.
- A failed request drops its source, except when the source merely lacks something.
  The owner may bring back anyone but a liar, under the same name.
- With other members of a swarm in sight it plans for all of them: `crowd`, `origin_duty`.
- Every request in flight has a deadline. Every table has a limit (`PlannerLimits`).

Cost: what one chunk costs does not depend on the number of chunks (`chunk_map`,
`picker`). What does, a 256th of it each: a source that comes or goes, `unobtainable`.

Not here: connections, hashes, retries and back-off, what to tell neighbours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from tensorswarm.store.digest import CHUNK_SIZE

from . import deadlines, portions
from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .crowd import Crowd
from .endgame import EndGame
from .flights import Flights
from .nearness import Nearness
from .origin_duty import OriginDuty
from .picker import Draft, Picker
from .readiness import Readiness
from .source import Failure
from .source_state import OpenRequest, SourceState, speed_of
from .source_table import SourceTable
from .types import (
    Action,
    Ask,
    Cancel,
    Drop,
    PassOn,
    PlannerLimits,
    Priority,
    SourceKind,
    SourceStatistics,
    Statistics,
)
from .view import PlannerView

__all__ = [
    "Action", "Ask", "Cancel", "Drop", "PassOn", "Planner", "PlannerLimits", "Priority",
    "SourceKind", "SourceStatistics", "Statistics",
]  # fmt: skip

_NONE: Mapping[int, int] = MappingProxyType({})
_NO_BITMAPS: Mapping[int, bytes] = MappingProxyType({})


class Planner(PlannerView):
    """Decides what to ask of whom in one download.

    Parameters
    ----------
    sizes_bytes : sequence of int
        Sizes of the wanted objects; everywhere else an object is named by its index.
    rng : random.Random
        Breaks ties.
    proved : mapping of int to bytes, optional
        For objects that are there in part: bit i % 8 of byte i // 8 is set when chunk i
        is proved.
    priorities : mapping of int to int, optional
        For some objects a `Priority` other than 0.
    limits : PlannerLimits, optional
        The numbers that steer it.
    keys : sequence of bytes, optional
        What each object is called in the whole swarm (its digest); needed to share
        origin duty with members that want other objects besides.
    unready : iterable of int, optional
        Objects that nobody is asked for until `make_ready`.

    Raises
    ------
    BadInput
        Sizes are impossible or too many. Also raised by every event that names an
        object or chunk that does not exist.
    """

    def __init__(
        self,
        sizes_bytes: Sequence[int],
        *,
        rng: random.Random,
        proved: Mapping[int, bytes] = _NO_BITMAPS,
        priorities: Mapping[int, Priority] = _NONE,
        limits: PlannerLimits | None = None,
        keys: Sequence[bytes] | None = None,
        unready: Iterable[int] = (),
    ) -> None:
        self.limits = limits or PlannerLimits()
        self._chunks = ChunkMap(
            sizes_bytes,
            proved,
            priorities,
            max_chunks=self.limits.max_chunks,
            max_priorities=self.limits.max_priorities,
            unready=unready,
        )
        self._picker = Picker(self._chunks, rng, self.limits)
        self._table = SourceTable(self._chunks, self.limits)
        self._sources = self._table.present
        self.readiness = Readiness(self._chunks, self._sources, self._picker, rng)
        self._flights = Flights(self._chunks)
        self._hungry: dict[str, None] = {}
        self._outbox: list[Action] = []
        self._endgame = EndGame(
            self._sources, self._flights, self._chunks, self._picker, self.limits
        )
        if keys is None:
            keys = [i.to_bytes(8, "little") for i in range(len(sizes_bytes))]
        self._crowd = Crowd(
            self._chunks,
            self._picker,
            self._flights,
            self._endgame,
            OriginDuty(self._chunks, keys, self.limits, self._sources),
            self.limits,
        )
        self._nearness = Nearness(self._sources, self._chunks, self.limits)
        self._check_at = math.inf
        self._relook_at = math.inf
        self._proved_bytes = self._duplicate_bytes = self._refused_bytes = 0

    # events: sources

    def add_source(
        self,
        now: float,
        source: str,
        kind: SourceKind,
        *,
        makes_offers: bool = False,
        distance: int = 0,
    ) -> None:
        """Note a source that can be asked, once it is known what it holds.

        One that makes offers is asked, while others download the same, when it says so.
        Its distance matters where nearer sources come first; 0 is nearest.

        Known liars and sources beyond the limit are answered with a `Drop`. A source
        that is present already stays as it is.
        """
        if source in self._sources:
            return
        self._outbox = [  # without what was meant for it when it was here last
            action for action in self._outbox if isinstance(action, Ask) or action.source != source
        ]
        refusal = self._table.admit(source, kind)
        if refusal is not None:
            self._outbox.append(Drop(source, *refusal))
            return
        state = self._sources[source]
        state.distance, state.joined_at = distance, now
        if makes_offers:
            state.makes_offers = True
            state.offered_at = now

    def source_holds(
        self, now: float, source: str, object_index: int, bitmap: bytes | None
    ) -> None:
        """Note chunks of an object that a source holds, besides those known.

        Bit i % 8 of byte i // 8 of `bitmap` stands for chunk i; None for the whole object.
        Spare bits and missing bytes do no harm.
        """
        state = self._sources.get(source)
        if state is not None:
            self._hold(now, state, self._chunks.spread(object_index, bitmap))

    def source_holds_whole(self, now: float, source: str, object_indices: Iterable[int]) -> None:
        """Note objects that a source holds, whole; as `source_holds` for each, at once."""
        state = self._sources.get(source)
        if state is not None:
            self._hold(now, state, self._chunks.spread_whole(object_indices))

    def _hold(self, now: float, state: SourceState, held: Iterable[tuple[int, int]]) -> None:
        is_news = is_work = False
        known, proved = state.held, self._chunks.proved
        for block, mask in held:
            if mask & ~(known[block] | proved[block]):
                is_news = True
                is_work |= state.gain(self._chunks, block, mask)
        if not is_news:
            return
        if state.record.refused_positions:
            state.bar_refused(self._chunks)
        if is_work and self._crowd.heard(now):
            self._ask_origins()
        if is_work and not self._crowd.awaits_offer(state):
            self._make_hungry(state)
        elif state.parked_until is None:
            self._hungry[state.name] = None

    def source_holds_all(self, now: float, source: str) -> None:
        """Note that a source holds every wanted object."""
        state = self._sources.get(source)
        if state is not None:
            state.gain_all(self._chunks)
            state.bar_refused(self._chunks)
            self._make_hungry(state)

    def source_offers(self, now: float, source: str, object_index: int, chunk: int) -> None:
        """Note that a source has an upload to spare, best for this chunk.

        From the first offer on it is asked without one only when none comes for long.
        """
        state = self._sources.get(source)
        if state is None:
            return
        state.makes_offers = True
        state.offered_at = now
        state.offers.append(self._chunks.position(object_index, chunk))
        del state.offers[: -self.limits.max_offers]
        self._make_hungry(state)

    def source_lacks(self, now: float, source: str, object_index: int) -> None:
        """Note that a source does not have an object, whatever was said before.

        What it was asked for before stays in flight until it is answered.
        """
        state = self._sources.get(source)
        if state is not None:
            for block, mask in self._chunks.spread(object_index, None):
                state.lose(self._chunks, block, mask)

    def remove_source(self, now: float, source: str) -> None:
        """Note that a source has gone; what it was asked for is free again."""
        state = self._sources.pop(source, None)
        if state is None:
            return
        self._hungry.pop(source, None)
        self._picker.settle(state, -1)
        state.uncount(self._chunks)
        self._crowd.holder_gone()
        if self._crowd.is_here:
            self._ask_origins()
        for request in list(state.requests.values()):
            self._set_free(self._flights.close(now, request))

    def set_members(self, now: float, key: bytes, me: str, others: Collection[str]) -> None:
        """Note who else downloads the same and can reach the same origins.

        The swarm's key is `key`; `me` is our own name in it, and `others` are the members
        in sight besides: none ends the sharing.
        """
        was_here = self._crowd.is_here
        self._crowd.set_members(now, key, me, others)
        for state in self._sources.values():
            if state.kind is SourceKind.ORIGIN or was_here != self._crowd.is_here:
                self._make_hungry(state)

    def make_ready(self, now: float, object_indices: Iterable[int]) -> None:
        """Note objects that can be asked for from now on."""
        self._crowd.look_again()
        self._offer(self._chunks.make_ready(object_indices))

    # events: answers

    def unanswered(self, source: str, request_id: int) -> list[tuple[int, int]]:
        """Return the chunks, as object and number, that a request has still to bring."""
        state = self._sources.get(source)
        request = state.requests.get(request_id) if state is not None else None
        return [self._chunks.locate(position) for position in request.left] if request else []

    def progress(self, now: float, source: str, request_id: int, byte_count: int) -> None:
        """Note payload bytes that arrived for a request, not verified yet.

        None at all says that we keep the source waiting ourselves.
        """
        state = self._sources.get(source)
        if state is None or byte_count < 0:
            return
        request = state.requests.get(request_id)
        if not byte_count:
            state.head_since = now
            return
        self._crowd.progressed(now, state.kind)
        if not state.has_spoken:
            self._check_at = min(self._check_at, now + self.limits.stall_s)
        if request is None:
            # The tail of a cancelled request: it holds up those behind it.
            state.head_since = now
            self._flights.note_bytes(now, state, byte_count)
        else:
            self._flights.advance(now, request, byte_count)
        self._stir(state)

    def chunk_proved(
        self, now: float, source: str | None, object_index: int, chunk: int, byte_count: int
    ) -> None:
        """Note a chunk that matched its hash and is kept; from no source when that is None.

        It need not have been asked for: an origin that ignores Range sends all of a file.
        """
        position = self._chunks.position(object_index, chunk)
        size = self._chunks.size_of_chunk(object_index, chunk)
        if self._chunks.prove(position, size):
            self._note_proved(now, source, {position: size}, byte_count)
        else:
            self.chunk_duplicate(now, source, object_index, chunk, byte_count)

    def small_proved(self, now: float, source: str, object_indices: Sequence[int]) -> None:
        """Note objects of one chunk each that came together; as `chunk_proved` for each."""
        proved, known = self._chunks.prove_small(object_indices)
        for object_index, size in known.items():
            self.chunk_duplicate(now, source, object_index, 0, size)
        self._note_proved(now, source, proved, sum(proved.values()))

    def _note_proved(
        self, now: float, source: str | None, proved: Mapping[int, int], byte_count: int
    ) -> None:
        self._proved_bytes += byte_count
        record, state = self._table.who(source)
        if record is not None:
            record.proved_bytes += byte_count
        requests = self._flights.prove(now, proved, state)
        if self._crowd.proved(now, None if record is None else record.kind, byte_count):
            self._ask_origins()
        if state is not None:
            state.empty_answers = 0
            if all(request.source is not state for request in requests):
                state.head_since = state.answered_at = now
        for request in requests:
            self._close_if_useless(now, request)

    def chunk_duplicate(
        self, now: float, source: str | None, object_index: int, chunk: int, byte_count: int
    ) -> None:
        """Note a chunk that arrived although it was there already."""
        position = self._chunks.position(object_index, chunk)
        self._duplicate_bytes += byte_count
        record, state = self._table.who(source)
        if record is not None:
            record.duplicate_bytes += byte_count
        if state is not None:
            self._answer_in_vain(now, state, position)

    def chunk_refused(self, now: float, source: str, object_index: int, chunk: int) -> None:
        """Note a chunk that arrived and did not match its hash."""
        position = self._chunks.position(object_index, chunk)
        size = self._chunks.size_at(position)
        self._refused_bytes += size
        record, state = self._table.who(source)
        if record is None:
            return
        record.refused_bytes += size
        if record.kind is SourceKind.PEER:
            record.is_liar = True
            self._crowd.lied_to()
        elif state is not None:
            record.refused_positions |= {position}
            record.is_liar = len(record.refused_positions) >= self.limits.max_refused_chunks
            state.bar(self._chunks, position)
            request = self._answer_in_vain(now, state, position)
            if request is not None:
                request.was_refused = True
        if record.is_liar:
            record.dropped = Failure.BAD_BYTES
            where = f"chunk {chunk} of object {object_index}"
            self._drop(now, source, Failure.BAD_BYTES, f"sent wrong bytes for {where}")

    def request_done(self, now: float, source: str, request_id: int) -> None:
        """Note that a source has answered a request; what did not come is free again."""
        state = self._sources.get(source)
        request = state.requests.get(request_id) if state is not None else None
        if state is None or request is None:
            return
        state.empty_answers += 1
        if state.empty_answers >= self.limits.max_empty_answers:
            for position in request.left:
                state.bar(self._chunks, position)
        self._close(now, request)

    def request_failed(
        self, now: float, source: str, request_id: int | None, failure: Failure, detail: str = ""
    ) -> None:
        """Note that a request came to nothing, or (with None) its whole source.

        `Failure.LACKS` takes from the source the objects that the request still missed,
        and `Failure.BAD_BYTES` from an origin the chunk it was at. Anything else drops
        the source; `actions` then says so.
        """
        state = self._sources.get(source)
        if state is None:
            return
        request = None if request_id is None else state.requests.get(request_id)
        if request is None and request_id is not None:  # late news of what is settled
            return
        is_origin = state.kind is SourceKind.ORIGIN
        if request is not None and failure is Failure.LACKS:
            lacking = {self._chunks.locate(position)[0] for position in request.left}
            for object_index in sorted(lacking):
                self.source_lacks(now, source, object_index)
            self._close(now, request)
        elif request is not None and failure is Failure.BAD_BYTES and is_origin:
            if not request.was_refused:
                self.chunk_refused(now, source, *self._chunks.locate(next(iter(request.left))))
            if request.request_id in state.requests:
                self._close(now, request)
        else:
            state.record.is_liar |= failure is Failure.BAD_BYTES and not is_origin
            self._drop(now, source, failure, detail or failure.value)

    def _answer_in_vain(self, now: float, state: SourceState, position: int) -> OpenRequest | None:
        """Note a chunk that came and was of no use; return the request that asked for it."""
        request, is_uncovered = self._flights.answer_in_vain(now, state, position)
        if request is None:
            state.head_since = state.answered_at = now
            return None
        if is_uncovered:
            self._set_free([position])
        self._close_if_useless(now, request)
        return request

    def _close_if_useless(self, now: float, request: OpenRequest) -> None:
        """Forget a request that nothing is expected of any more."""
        if request.left:
            self._stir(request.source)
            return
        if request.skipped:
            self._outbox.append(Cancel(request.source.name, request.request_id))
        self._close(now, request)

    def _close(self, now: float, request: OpenRequest) -> None:
        self._set_free(self._flights.close(now, request))
        if self._crowd.is_here and request.source.kind is SourceKind.ORIGIN:
            self._make_hungry(request.source)  # sooner than it was expected
        else:
            self._stir(request.source)

    def _set_free(self, positions: list[int]) -> None:
        """Offer chunks to everybody who holds them."""
        returned: dict[int, int] = {}
        for position in positions:
            self._chunks.put_back(position)
            block, offset = divmod(position, BLOCK_CHUNKS)
            returned[block] = returned.get(block, 0) | 1 << offset
        for block in returned:
            self._crowd.set_free(block)
        self._offer(returned.items())

    def _offer(self, blocks: Iterable[tuple[int, int]]) -> None:
        for block, mask in blocks:
            level = self._chunks.level_of[block]
            for state in self._sources.values():
                if state.held[block] & mask:
                    state.list_block(block, level)
                    self._make_hungry(state)

    def _make_hungry(self, state: SourceState) -> None:
        """Note that there may be new work for a source."""
        state.parked_until = None
        self._hungry[state.name] = None

    def _ask_origins(self) -> None:
        for origin in self._table.origins():
            self._make_hungry(origin)

    def _stir(self, state: SourceState) -> None:
        """Note that a source may have time for more, unless it found nothing just now."""
        if state.parked_until is None:
            self._hungry[state.name] = None

    def _drop(self, now: float, source: str, failure: Failure, detail: str) -> None:
        state = self._sources.get(source)
        if state is None:
            return
        state.record.dropped = failure
        state.record.stalls += failure is Failure.STALLED
        self.remove_source(now, source)
        self._outbox.append(Drop(source, failure, detail))

    # decisions

    def actions(self, now: float) -> list[Action]:
        """Return what to do now, in order. Each action is returned once.

        Cancels and drops may name what the owner has closed meanwhile.
        """
        self._endgame.begin()
        if now >= self._check_at:
            self._check_deadlines(now)
        if now >= self._relook_at:
            self._wake(now)
        hungry = [self._sources[name] for name in self._hungry]
        if len(hungry) > 1:
            hungry.sort(key=speed_of, reverse=True)
        self._hungry.clear()
        while hungry and self._chunks.missing_chunks:
            hungry = [state for state in hungry if self._feed(now, state)]
        if self._crowd.is_here and self._crowd.is_last_call():
            for state in self._sources.values():
                self._make_hungry(state)
        actions, self._outbox = self._outbox, []
        return actions

    def next_deadline(self, now: float) -> float | None:
        """Return when to call `actions` if nothing happens before; None for never.

        It is never None while a request is in flight, and may lie in the past.
        """
        if self._hungry or self._outbox:
            return now
        deadline = min(self._check_at, self._relook_at)
        return None if deadline == math.inf else deadline

    def _feed(self, now: float, state: SourceState) -> bool:
        """Give a source one more request; return whether it might take another."""
        if self._crowd.is_here:
            room_bytes = self._crowd.room_bytes(state, len(self._sources))
            return bool(room_bytes) and self._feed_in_crowd(now, state, room_bytes)
        free_bytes, total_rate = self._chunks.free_bytes, self._flights.total_rate
        room_bytes = portions.room_bytes(state, free_bytes, total_rate, self.limits)
        if not room_bytes:
            return False
        if self._endgame.should_wait(now, state):
            self._park(now, state)
            return False
        if nearer := self._nearness.nearer(now, state):
            draft = self._nearness.draft(state, nearer, room_bytes)
        else:
            draft = self._picker.pick(state, room_bytes)
            if not draft.positions and self._flights.by_position:
                draft = self._endgame.draft_copies(now, state, room_bytes)
        if not draft.positions and (nearer or self._flights.by_position):
            self._park(now, state)
        if draft.positions:
            self._ask(now, state, draft)
        return bool(draft.positions)

    def _ask(self, now: float, state: SourceState, draft: Draft) -> None:
        self._outbox.append(Ask(self._flights.open(now, state, draft)))
        self._check_at = min(self._check_at, now + self.limits.stall_s)

    def _feed_in_crowd(self, now: float, state: SourceState, room_bytes: int) -> bool:
        choice = self._crowd.choose(now, state, room_bytes)
        if choice.passed is not None:
            self._outbox.append(PassOn(state.name, choice.passed))
        elif choice.draft.positions:
            self._ask(now, state, choice.draft)
        if choice.look_at is not None:
            self._park_until(state, choice.look_at)
        return choice.look_at is None

    # deadlines

    def _park_until(self, state: SourceState, until: float) -> None:
        state.parked_until = until
        self._relook_at = min(self._relook_at, until)

    def _park(self, now: float, state: SourceState) -> None:
        """Let a source without work look again after about a chunk's time."""
        limits = self.limits
        pause_s = state.seconds_guessed(CHUNK_SIZE, limits.max_relook_s)
        self._park_until(state, now + min(max(pause_s, limits.min_relook_s), limits.max_relook_s))

    def _wake(self, now: float) -> None:
        self._relook_at = math.inf
        for state in self._sources.values():
            if state.parked_until is None:
                continue
            if now >= state.parked_until:
                self._make_hungry(state)
            else:
                self._relook_at = min(self._relook_at, state.parked_until)

    def _check_deadlines(self, now: float) -> None:
        """Drop who is silent or too slow, and find out when to look again."""
        while overdue := deadlines.find_overdue(now, self._sources, self._chunks, self.limits):
            name, detail = overdue
            self._drop(now, name, Failure.STALLED, detail)
        self._check_at = deadlines.next_check(now, self._sources, self.limits)
