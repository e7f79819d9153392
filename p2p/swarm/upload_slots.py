"""Whom a node lets ask next, and for what: few at a time, and what the swarm lacks most.

A peer that sends to everybody at once delivers every chunk late, and nobody can pass on
what is not whole. And a receiver that queues for a chunk at one peer cannot take it from
those who get it meanwhile: queues undo the doubling by which a chunk spreads. So a node
with an upload to spare *offers* it: to one neighbour, naming one chunk. The neighbour
asks for that chunk, or for another if that one is on its way to it already, or passes.

Rules
- At most `slots` requests are served at a time; `ahead` more are offered, so that the
  next one is here when the uplink falls free. If eager, one more while it lies idle,
  because some pass; and one more for a chunk that no neighbour has yet: it goes first.
- Offered is the chunk that the fewest neighbours have or are about to get from us, ties
  at random, to a neighbour at random of those that lack it.
- An offer that nobody takes up within `OFFER_S` lapses.
- Requests that were not offered wait behind those that were, and do not keep us from
  offering: who hears an offer asks at its own will no more. Nobody is refused for asking,
  but a peer has at most `MAX_WAITING_PER_PEER` requests here.

What neighbours have is a set of positions as an integer, as in `chunk_map`. No I/O, no
clock; the random generator is the caller's.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

MAX_WAITING_PER_PEER = 16
"""Requests of one peer that wait: four times what a planner of ours asks of one source."""

OFFER_S = 1.0
"""Time in which an offer is to be answered: several round trips of any link."""

PASSED_S = 0.1
"""A neighbour that passed is left alone for so long: its hands are full."""


COMPARED_TAKERS = 3
"""Neighbours drawn, of whom the one with the fewest chunks gets the offer."""


class Waiting(NamedTuple):
    """A request that waits for a slot."""

    peer: str
    ticket: int
    chunk: int


class UploadSlots:
    """The gate before the uplink.

    Parameters
    ----------
    slots : int
        Requests served at a time.
    ahead : int
        Offers open besides.
    rng : random.Random
        Breaks ties.
    is_rarest_first : bool
        False for experiments: any chunk that somebody lacks is as good as another.
    is_eager : bool
        Whether to offer more while the uplink is idle, and for what nobody has.

    Attributes
    ----------
    held : int
        The positions that we can give.
    ahead : int
        Offers open besides.
    active : dict
        The requests being served, by peer and ticket.
    """

    def __init__(
        self,
        slots: int,
        ahead: int,
        rng: random.Random,
        *,
        is_rarest_first: bool = True,
        is_eager: bool = False,
    ) -> None:
        self._slots = slots
        self.ahead = ahead
        self._rng = rng
        self._is_rarest_first = is_rarest_first
        self._is_eager = is_eager
        self._peers: dict[str, int] = {}
        self._known = 0  # what any of them holds; -1 when that is to be found out
        self._offered: dict[str, tuple[int, float]] = {}  # those that lapse first, first
        self._passed: dict[str, float] = {}  # until when each is left alone
        self._passed_until = math.inf  # the first of these
        self._due_at = math.inf  # nothing lapses before
        self._waiting: dict[tuple[str, int], Waiting] = {}
        self._invited: set[tuple[str, int]] = set()  # of those that wait, who had an offer
        self._per_peer: dict[str, int] = {}
        self.active: dict[tuple[str, int], Waiting] = {}
        self.held = 0

    # ---- what there is

    def peer_has(self, peer: str, held: int) -> bool:
        """Note what a neighbour holds, also when it is nothing yet.

        Returns whether an offer to it has become pointless: there may be another to make.
        """
        held |= self._peers.get(peer, 0)
        self._peers[peer] = held
        self._known |= held
        return (
            peer in self._offered
            and not self.held & ~held
            and self._offered.pop(peer, None) is not None
        )

    def set_peer(self, peer: str, held: int) -> None:
        """Note all that a neighbour holds or does not want, in place of what was noted."""
        self._peers[peer] = held
        self._known = -1

    def forget(self, peer: str) -> list[Waiting]:
        """Forget a neighbour that has gone; return those of its requests being served."""
        if self._peers.pop(peer, 0):
            self._known = -1
        self._offered.pop(peer, None)
        if self._passed.pop(peer, None) is not None:
            self._passed_until = min(self._passed.values(), default=math.inf)
        for key in [key for key in self._waiting if key[0] == peer]:
            self.withdraw(*key)
        return [self.active.pop(key) for key in list(self.active) if key[0] == peer]

    # ---- offers

    def offers(self, now: float) -> list[tuple[str, int]]:
        """Return the offers to make now: neighbour and position."""
        if self._due_at <= now:
            self._settle(now)
        made: list[tuple[str, int]] = []
        spare = self._slots + self.ahead
        spare -= len(self._offered) + len(self._invited) + len(self.active)
        if self._is_eager and not self.active and not self._waiting:
            spare += 1
        while spare > 0 or not spare and self._is_eager and self._has_fresh():
            choice = self._choose()
            if choice is None:
                break
            spare -= 1
            made.append(choice)
            self._offered[choice[0]] = choice[1], now + OFFER_S
            self._due_at = min(self._due_at, now + OFFER_S)
        return made

    def _settle(self, now: float) -> None:
        """Let offers lapse that nobody took up, and forgive those that passed."""
        while self._offered:
            peer, (_, until) = next(iter(self._offered.items()))
            if until > now:
                break
            del self._offered[peer]
            self._leave_alone(peer, now + OFFER_S)
        if self._passed_until <= now:
            self._passed = {peer: until for peer, until in self._passed.items() if until > now}
            self._passed_until = min(self._passed.values(), default=math.inf)
        self._due_at = self._passed_until
        for _, until in self._offered.values():
            self._due_at = min(self._due_at, until)
            break

    def _leave_alone(self, peer: str, until: float) -> None:
        self._passed[peer] = until
        self._passed_until = min(self._passed_until, until)
        self._due_at = min(self._due_at, until)

    def next_deadline(self, now: float) -> float:
        """Return when to look for offers again if nothing happens before."""
        if self._due_at <= now:
            self._settle(now)
        for _, until in self._offered.values():
            return min(until, self._passed_until)
        return self._passed_until

    def _has_fresh(self) -> bool:
        """Tell whether we hold something that no neighbour has or is about to get from us."""
        if self._known < 0:
            self._known = 0
            for has in self._peers.values():
                self._known |= has
        fresh = self.held & ~self._known
        if not fresh or not self._peers:
            return False
        for each in (*self.active.values(), *self._waiting.values()):
            fresh &= ~(1 << each.chunk)
        for chunk, _ in self._offered.values():
            fresh &= ~(1 << chunk)
        return bool(fresh)

    def _choose(self) -> tuple[str, int] | None:
        free: dict[str, int] = {}
        lacked = 0
        held, offered, passed = self.held, self._offered, self._passed
        for peer, has in self._peers.items():
            lacks = held & ~has
            if lacks and peer not in offered and peer not in passed:
                free[peer] = lacks
                lacked |= lacks
        if not lacked:
            return None
        for requests in (self.active, self._waiting):
            for key, each in requests.items():
                if key[0] in free:
                    free[key[0]] &= ~(1 << each.chunk)
        rarest = self._rarest(lacked)
        while rarest:
            position = _random_bit(rarest, self._rng)
            bit = 1 << position
            takers = [peer for peer, lacks in free.items() if lacks & bit]
            if takers:
                return self._neediest(takers), position
            lacked ^= bit
            rarest = self._rarest(lacked)
        return None

    def _neediest(self, takers: list[str]) -> str:
        """Return the one with least of a few: stragglers catch up, and nobody takes all."""
        random, peers, count = self._rng.random, self._peers, len(takers)
        best, fewest = "", -1
        for _ in range(COMPARED_TAKERS):
            peer = takers[int(random() * count)]
            has = peers[peer].bit_count()
            if has < fewest or fewest < 0:
                best, fewest = peer, has
        return best

    def _rarest(self, candidates: int) -> int:
        """Return those candidates that the fewest neighbours have, or get from us."""
        if not candidates or not self._is_rarest_first:
            return candidates
        masks = [*self._peers.values()]
        for each in (*self.active.values(), *self._waiting.values()):
            masks.append(1 << each.chunk)
        for chunk, _ in self._offered.values():
            masks.append(1 << chunk)
        planes = [0] * len(masks).bit_length()  # plane i holds bit i of each position's count
        for mask in masks:
            i, carry = 0, mask & candidates
            while carry:
                plane = planes[i]
                planes[i] = plane ^ carry
                carry &= plane
                i += 1
        for plane in reversed(planes):
            candidates = candidates & ~plane or candidates
        return candidates

    # ---- requests

    def ask(self, peer: str, ticket: int, chunk: int) -> bool:
        """Queue a request, known by peer and ticket; return False when it has too many."""
        count = self._per_peer.get(peer, 0)
        if count >= MAX_WAITING_PER_PEER:
            return False
        self._per_peer[peer] = count + 1
        was_offered = self._offered.pop(peer, None) is not None
        waiting = Waiting(peer, ticket, chunk)
        if was_offered:
            self._invited.add((peer, ticket))
            self._waiting = {(peer, ticket): waiting, **self._waiting}
        else:
            self._waiting[peer, ticket] = waiting
        return True

    def gave(self, peer: str, chunks: int) -> None:
        """Note positions that a neighbour got without waiting for a slot, as it was offered."""
        self._offered.pop(peer, None)
        if peer in self._peers:
            self._peers[peer] |= chunks
            self._known |= chunks

    def passed(self, now: float, peer: str) -> None:
        """Note that a neighbour does not take up our offer."""
        if self._offered.pop(peer, None) is not None:
            self._leave_alone(peer, now + PASSED_S)

    def withdraw(self, peer: str, ticket: int) -> bool:
        """Forget a request that is not wanted any more; return whether it was waiting."""
        if self._waiting.pop((peer, ticket), None) is None:
            return False
        self._invited.discard((peer, ticket))
        self._left(peer)
        return True

    def begin(self) -> list[Waiting]:
        """Return the requests to serve from now on."""
        begun: list[Waiting] = []
        while self._waiting and len(self.active) < self._slots:
            key = next(iter(self._waiting))
            self.active[key] = self._waiting.pop(key)
            self._invited.discard(key)
            self._left(key[0])
            begun.append(self.active[key])
        return begun

    def end(self, peer: str, ticket: int) -> None:
        """Note that a request was served, or given up."""
        done = self.active.pop((peer, ticket), None)
        if done is not None and peer in self._peers:
            self._peers[peer] |= 1 << done.chunk  # it will say so itself a moment later
            self._known |= 1 << done.chunk

    def _left(self, peer: str) -> None:
        self._per_peer[peer] -= 1
        if not self._per_peer[peer]:
            del self._per_peer[peer]


def _random_bit(mask: int, rng: random.Random) -> int:
    """Return the place of a one, chosen at random."""
    turn = int(rng.random() * mask.bit_length())
    later = mask >> turn
    if later:
        return turn + (later & -later).bit_length() - 1
    return (mask & -mask).bit_length() - 1
