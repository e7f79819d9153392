"""Planning while others download the same: what helps the swarm helps us.

A lone downloader asks for long runs, well ahead. Among others that only delays what they
could pass on. So here requests are a chunk, or a tenth of a second of a fast line; few are
open at one source; the rarest chunks come first, counted exactly, ties at random; a peer
that offers uploads is asked when it offers; and an origin is asked for what is our duty
(`origin_duty`). Copies of what is in flight only when nothing is free any more.

No I/O, no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from tensorswarm.store.digest import CHUNK_SIZE

from .chunk_map import ChunkMap
from .endgame import EndGame
from .flights import Flights
from .origin_duty import OriginDuty
from .picker import Draft, Picker
from .source_state import SourceState, SteadyRate
from .types import PlannerLimits, SourceKind


class Choice(NamedTuple):
    """What to do with a source: ask it, or pass on its offer.

    And when to look at it again if nothing happens before; None for at once.
    """

    draft: Draft
    look_at: float | None = None
    passed: int | None = None


_NOTHING = Draft(0, 0)


class Crowd:
    """The other members of a swarm, and what they change.

    Parameters
    ----------
    chunks, picker, flights, endgame
        The planner's parts.
    duty : OriginDuty
        Our part in fetching from origins.
    limits : PlannerLimits
        The numbers.

    Attributes
    ----------
    is_here : bool
        Whether there is anybody else.
    """

    def __init__(
        self,
        chunks: ChunkMap,
        picker: Picker,
        flights: Flights,
        endgame: EndGame,
        duty: OriginDuty,
        limits: PlannerLimits,
    ) -> None:
        self._chunks = chunks
        self._picker = picker
        self._flights = flights
        self._endgame = endgame
        self._duty = duty
        self._limits = limits
        self.is_here = False
        self._since = 0.0
        self._moved_at: float | None = None
        self._heard_at: float | None = None
        self._came_at = 0.0
        self._proved_chunks = 0
        self._latest: deque[bool] = deque(maxlen=limits.duty_trial_chunks)  # from peers or not
        self._peer_rate = SteadyRate(limits.duty_memory_s)
        self._was_last_call = False

    @property
    def steps(self) -> int:
        """Elementary steps of origin duty so far."""
        return self._duty.steps

    def set_members(self, now: float, key: bytes, me: str, others: Collection[str]) -> None:
        """Note who else is there."""
        was_here = self.is_here
        self._duty.set_members(key, me, others)
        self.is_here = self._duty.is_shared
        if not was_here:
            self._since = now
            self._latest.clear()

    def proved(self, now: float, kind: SourceKind | None, byte_count: int) -> bool:
        """Note a chunk that was proved, and what sort of source gave it.

        Returns whether the swarm has shown no life before.
        """
        is_first = self._is_first()
        self._moved_at = now
        self._proved_chunks += 1
        if kind is not None:
            self._latest.append(kind is SourceKind.PEER)
        if kind is SourceKind.PEER:
            self._peer_rate.note(now, byte_count)
        return is_first

    def progressed(self, now: float, kind: SourceKind) -> None:
        """Note bytes that came: a chunk may take long, and is on its way."""
        if kind is SourceKind.PEER:
            self._came_at = now

    def heard(self, now: float) -> bool:
        """Note that a source has something new for us: the swarm is alive.

        Returns whether it has shown no life before.
        """
        is_first = self._heard_at is None and self._moved_at is None
        self._heard_at = now
        return is_first

    def _is_first(self) -> bool:
        return self._moved_at is None and self._heard_at is None

    def awaits_offer(self, state: SourceState) -> bool:
        """Tell whether a source need not be looked at before it offers, or a time has come."""
        parked_until = state.parked_until
        return (
            state.makes_offers
            and parked_until is not None
            and parked_until < math.inf
            and self.is_here
        )

    def lied_to(self) -> None:
        """Note that a peer has sent wrong bytes."""
        self._duty.was_lied_to = True

    def holder_gone(self) -> None:
        """Note that somebody who held something has gone."""
        self._duty.holder_gone()

    def look_again(self) -> None:
        """Note that there is more that can be asked for."""
        self._duty.look_again()

    def set_free(self, block: int) -> None:
        """Note that chunks of a block have become free."""
        self._duty.look_again_at(block)

    def is_last_call(self) -> bool:
        """Tell, once, when the last free chunk has been asked for."""
        is_last_call = not self._chunks.free_bytes
        is_new = is_last_call and not self._was_last_call
        self._was_last_call = is_last_call
        return is_new

    # decisions

    def room_bytes(self, state: SourceState, source_count: int) -> int:
        """Return how much the next request to a source may hold; 0 for no request."""
        limits = self._limits
        if state.makes_offers:
            most = limits.max_requests_per_source
        elif state.kind is SourceKind.ORIGIN:
            most = limits.min_requests_per_source
        elif source_count >= limits.crowd_sources:
            most = limits.crowd_requests
        else:
            most = limits.min_requests_per_source
        if len(state.requests) >= most:
            return 0
        size_bytes = int((state.rate.bytes_per_s or 0.0) * limits.crowd_queue_s)
        return max(CHUNK_SIZE, min(size_bytes, limits.max_request_chunks * CHUNK_SIZE))

    def choose(self, now: float, state: SourceState, room_bytes: int) -> Choice:
        """Choose what to ask a source for."""
        moved_at = self._moved_at
        if moved_at is None:  # the first chunk has a long way
            moved_at = self._since + self._limits.duty_patience_s
        if state.kind is SourceKind.ORIGIN and not self._is_far_ahead(now, state):
            return self._of_origin(now, state, room_bytes, moved_at)
        if state.kind is SourceKind.PEER and state.makes_offers:
            unasked_at = max(state.offered_at, moved_at) + self._limits.offer_patience_s
            if state.offers:
                return self._of_offer(now, state, room_bytes, unasked_at)
            if now < unasked_at or self._flights.by_position:
                return Choice(_NOTHING, max(unasked_at, now + self._limits.max_relook_s))
            state.offered_at = now
        return self._of_all(now, state, room_bytes)

    def _of_origin(
        self, now: float, state: SourceState, room_bytes: int, moved_at: float
    ) -> Choice:
        hungry_since = max(moved_at, self._heard_at or 0.0)
        turn_at = self._duty.turn_at(hungry_since, state.joined_at, is_first=self._is_first())
        if now < turn_at:
            return Choice(_NOTHING, turn_at)
        ahead_at = self._ahead_at(state)
        if now < ahead_at:
            return Choice(_NOTHING, ahead_at)
        draft = self._duty.draft(now, state, room_bytes)
        if draft.positions:
            return Choice(draft)
        patience_s = self._limits.duty_patience_s
        held_at = max(moved_at, self._came_at) + 2 * patience_s
        if now < held_at:  # and before, whoever has given nothing may be believed no more
            return Choice(_NOTHING, min(held_at, now + patience_s))
        # Peers hold all that is missing, and nothing comes of them.
        return self._of_all(now, state, CHUNK_SIZE)

    def _ahead_at(self, origin: SourceState) -> float:
        """Return when an origin that has a request of ours may get the next.

        Shortly before the answer should be whole. Members on duty that wait for the end
        fall into step, as equal chunks over a shared uplink end together; then it lies
        idle for a round trip. Two requests all the time would halve its speed for each; and
        beside a chunk that takes seconds a round trip is nothing.
        """
        if not origin.requests:
            return 0.0
        if origin.took_s is None or origin.took_s > self._limits.duty_patience_s:
            return math.inf
        latest = next(reversed(origin.requests.values()))
        return latest.asked_at + self._limits.origin_ahead * origin.took_s

    def _of_offer(
        self, now: float, state: SourceState, room_bytes: int, unasked_at: float
    ) -> Choice:
        state.offered_at = now
        offered = state.offers.pop(0)
        draft = self._picker.pick_at(state, offered, room_bytes)
        if not draft.positions:
            draft = self._scattered(state, room_bytes)
        if not draft.positions and not self._chunks.free_bytes:
            draft = self._endgame.draft_copies(now, state, CHUNK_SIZE)
        look_at = None if state.offers else unasked_at
        if draft.positions:
            return Choice(draft, look_at)
        return Choice(draft, look_at, self._chunks.locate(offered)[0])

    def _of_all(self, now: float, state: SourceState, room_bytes: int) -> Choice:
        draft = self._scattered(state, room_bytes)
        if draft.positions:
            return Choice(draft)
        if self._chunks.free_bytes or not self._flights.by_position:
            return Choice(draft, math.inf)  # nothing, until it holds something that is free
        limits = self._limits
        draft = self._endgame.draft_copies(now, state, CHUNK_SIZE)
        if draft.positions:
            return Choice(draft)
        pause_s = state.seconds_guessed(CHUNK_SIZE, limits.max_relook_s)
        pause_s = min(max(pause_s, limits.min_relook_s), limits.max_relook_s)
        return Choice(draft, now + pause_s)

    def _scattered(self, state: SourceState, room_bytes: int) -> Draft:
        by_rarity = self._proved_chunks >= self._limits.random_first_chunks
        return self._picker.pick_scattered(state, room_bytes, by_rarity=by_rarity)

    def _is_far_ahead(self, now: float, origin: SourceState) -> bool:
        """Tell whether an origin is so fast that waiting for peers would only lose time.

        The latest chunks must say so, too: where everything is slow, nothing has come of
        the peers for a moment again and again.
        """
        rate, limits = origin.rate.bytes_per_s, self._limits
        if rate is None or now < self._since + limits.duty_trial_s:
            return False
        if rate <= limits.duty_gain * self._peer_rate.at(now):
            return False
        of_peers = sum(self._latest)
        is_tried = len(self._latest) == limits.duty_trial_chunks
        return is_tried and len(self._latest) - of_peers > limits.duty_gain * of_peers
