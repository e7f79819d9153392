"""Whom a downloading node knows in its swarm, and whom it keeps as neighbours.

Members are heard of in three ways: they talk to us, a neighbour names them (peer
exchange), or discovery finds them. From these each node picks a few at random and dials
them; since others do the same, the neighbours form a random graph of nearly equal degree,
whose diameter grows with the logarithm of the swarm and which falls apart only when most
of it leaves. Now and then the neighbour that gave least is let go for somebody new: so a
node finds the best, without ever leaving the random graph.

Nobody vouches for names in peer exchange. What comes from hearsay is forgotten after
`hearsay_s`, no single neighbour can fill the table, and the table has a bound.

No I/O, no clock; the random generator is the caller's.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from .origin_duty import rank_of


@dataclass(frozen=True, slots=True)
class MembershipLimits:
    """The numbers, with their reasons."""

    dials: int = 6
    """Neighbours that we choose; as many choose us: 12 in all, of whom some are idle."""
    least_neighbours: int = 9
    """Whoever too few have chosen dials more: it would be the last to get everything."""
    max_neighbours: int = 16
    """Neighbours kept for one swarm: have-messages cost each node this many a chunk."""
    best: int = 2
    """Chosen neighbours that are never let go: those who gave most."""
    on_duty: int = 5
    """The first by rank keep each other as neighbours: those on origin duty, and the next."""
    exchange: int = 24
    """Members named in one answer: twice as many as anybody has neighbours."""
    exchange_first: int = 8
    """Of these, the first by rank: so everybody soon agrees who is on duty."""
    hearsay_s: float = 60.0
    """How long a member counts that we only heard of."""
    retry_s: float = 10.0
    """How long a member is not tried again that could not be reached, or that left."""
    max_members: int = 512
    """Members remembered: small beside the download itself. When it is full, only the first
    by rank are let in, so that ranks agree in a swarm of any size."""
    max_hearsay_per_teller: int = 256
    """Members believed on one neighbour's word: half of the table."""


WATCHED = 32
"""Members whose coming and going is noted, the first by rank: more than are ever on duty."""

RENEWED = 1 / 8
"""Part of `hearsay_s` after which it is noted that a member was named again."""


class _Place(NamedTuple):
    """What members of a swarm are sorted by: the lowest number ranks first."""

    order: int
    name: str


class _Told(NamedTuple):
    """When we heard of a member, and from whom."""

    at: float
    teller: str


@lru_cache(maxsize=1 << 14)
def _place_of(key: bytes, name: str) -> _Place:
    """Return a member's place; one object for all who look at it."""
    return _Place(-rank_of(key, name), name)


class Membership:
    """The members of one swarm as one node sees them.

    Parameters
    ----------
    key : bytes
        The swarm's key, from which ranks are made.
    me : str
        Our own name.
    rng : random.Random
        Chooses.
    limits : MembershipLimits, optional
        The numbers.
    """

    def __init__(
        self, key: bytes, me: str, rng: random.Random, limits: MembershipLimits | None = None
    ) -> None:
        self.key = key
        self.me = me
        self.limits = limits or MembershipLimits()
        self._rng = rng
        self._revision = 0
        self._my_place = _place_of(key, me)
        self._met: dict[str, None] = {}
        self._hearsay: dict[str, _Told] = {}
        self._tellers: dict[str, int] = {}
        self._failed: dict[str, float] = {}
        self._finished: dict[str, None] = {}
        self._ranked: list[_Place] = []  # all members, the first by rank first
        self._stale_at = math.inf  # no hearsay is older than it may be before this

    # who is there

    def met(self, name: str) -> None:
        """Note a member that we talk to."""
        if name != self.me:
            self._forget_hearsay(name)
            if name not in self._met:
                self._met[name] = None
                self._rank(name)
            self._failed.pop(name, None)

    def left(self, now: float, name: str) -> None:
        """Note a member that we could not reach, or that has gone."""
        self._forget_met(name)
        self._forget_hearsay(name)
        self._failed[name] = now
        if len(self._failed) > self.limits.max_members:
            del self._failed[next(iter(self._failed))]

    def let_go(self, now: float, name: str) -> None:
        """Note a member that is there, but no neighbour any more."""
        self._forget_met(name)
        self.heard(now, [name], name)

    def heard(self, now: float, names: Iterable[str], teller: str) -> None:
        """Note members that a neighbour, or discovery, names."""
        limits, hearsay = self.limits, self._hearsay
        self._stale_at = min(self._stale_at, now + limits.hearsay_s)
        told = _Told(now, teller)
        # What was said of late is not worth noting again: it is said often and by all.
        if now + limits.hearsay_s * (1 - RENEWED) > self._stale_at:
            names = list(names)
            renewed = [(name, hearsay[name].teller) for name in names if name in hearsay]
            hearsay.update({name: _Told(now, first_teller) for name, first_teller in renewed})
        met, failed = self._met, self._failed
        for name in [name for name in names if name not in hearsay and name not in met]:
            if name == self.me or name in failed and now < failed[name] + limits.retry_s:
                continue
            if self._tellers.get(teller, 0) >= limits.max_hearsay_per_teller:
                break
            if len(hearsay) < limits.max_members or self._make_room(name):
                hearsay[name] = told
                self._tellers[teller] = self._tellers.get(teller, 0) + 1
                self._rank(name)

    def _make_room(self, name: str) -> bool:
        """Forget hearsay for somebody who ranks among the first: all must know these."""
        first = self.limits.exchange_first
        if len(self._ranked) <= first or self._place(name) > self._ranked[first]:
            return False
        for _, last in reversed(self._ranked):
            if last in self._hearsay:
                self._forget_hearsay(last)
                return True
        return False

    def _place(self, name: str) -> _Place:
        """Return what members are sorted by."""
        return _place_of(self.key, name)

    def _forget_met(self, name: str) -> None:
        if name in self._finished:
            del self._finished[name]
            self._revision += 1
        if name in self._met:
            del self._met[name]
            self._unrank(name)

    def _forget_hearsay(self, name: str) -> None:
        known = self._hearsay.pop(name, None)
        if known is not None:
            self._unrank(name)
            self._tellers[known.teller] -= 1
            if not self._tellers[known.teller]:
                del self._tellers[known.teller]

    def _rank(self, name: str) -> None:
        bisect.insort(self._ranked, place := self._place(name))
        self._note_change(place)

    def _unrank(self, name: str) -> None:
        place = self._place(name)
        del self._ranked[bisect.bisect_left(self._ranked, place)]
        self._note_change(place)

    def _note_change(self, place: _Place) -> None:
        ranked = self._ranked
        if (
            len(ranked) <= WATCHED + len(self._finished)
            or place <= ranked[WATCHED + len(self._finished)]
        ):
            self._revision += 1

    def _forget_stale(self, now: float) -> None:
        """Forget what nobody has said for long."""
        if now <= self._stale_at:
            return
        oldest = now - self.limits.hearsay_s
        for name in [name for name, (at, _) in self._hearsay.items() if at < oldest]:
            self._forget_hearsay(name)
        kept = min((at for at, _ in self._hearsay.values()), default=math.inf)
        self._stale_at = kept + self.limits.hearsay_s

    def members(self, now: float) -> list[str]:
        """Return everybody who counts now, without us."""
        self._forget_stale(now)
        return [*self._met, *self._hearsay]

    def finished(self, name: str) -> None:
        """Note a member that has everything: it serves, but does no duty any more."""
        if name in self._met and name not in self._finished:
            self._finished[name] = None
            self._revision += 1

    def revision(self, now: float) -> int:
        """Return a number that changes when the first `WATCHED` of `on_call` do."""
        self._forget_stale(now)
        return self._revision

    def on_call(self, now: float) -> Iterator[str]:
        """Yield the members that still download, as far as we know, the first by rank first."""
        self._forget_stale(now)
        return (name for _, name in self._ranked if name not in self._finished)

    def first_on_call(self, now: float) -> list[str]:
        """Return the first `WATCHED` of them."""
        self._forget_stale(now)
        some = self._ranked[: WATCHED + len(self._finished)]
        return [name for _, name in some if name not in self._finished][:WATCHED]

    def to_tell(self, now: float) -> list[str]:
        """Return the members to name to neighbours: the first by rank, and a sample.

        One answer may be given to all who ask within a short while.
        """
        limits = self.limits
        self._forget_stale(now)
        ranked, first = self._ranked, limits.exchange_first
        if len(ranked) <= limits.exchange:
            return [name for _, name in ranked]
        places = self._rng.sample(range(first, len(ranked)), limits.exchange - first)
        return [name for _, name in (*ranked[:first], *[ranked[place] for place in places])]

    # whom to keep

    def _first(self, now: float) -> list[str]:
        """Return the first members by rank if we are one of them."""
        self._forget_stale(now)
        count, mine = self.limits.on_duty, self._my_place
        first: list[str] = []
        for place in self._ranked:
            if place > mine:
                break
            if place.name not in self._finished:
                first.append(place.name)
                if len(first) == count:
                    return []
        behind = islice(self._ranked, bisect.bisect(self._ranked, mine), None)
        others = (name for _, name in behind if name not in self._finished)
        return [*first, self.me, *islice(others, count - len(first) - 1)]

    def to_dial(
        self, now: float, neighbours: Collection[str], dialled: Collection[str]
    ) -> list[str]:
        """Return members to dial: as many as are lacking of those we choose ourselves.

        Members on duty at the origin also keep each other as neighbours, so that each
        knows at once what the others have fetched.
        """
        limits = self.limits
        colleagues = [
            name
            for name in self._first(now)
            if name != self.me and name not in neighbours and name not in dialled
        ]
        wanted = limits.dials - len(dialled)
        if wanted <= 0:
            wanted = limits.least_neighbours - len({*neighbours, *dialled})
        wanted = min(
            wanted - len(colleagues),
            limits.max_neighbours - len(neighbours),
        )
        if wanted <= 0:
            return colleagues
        known = {*neighbours, *dialled, *colleagues}
        strangers = [name for name in self.members(now) if name not in known]
        return colleagues + self._rng.sample(strangers, min(wanted, len(strangers)))

    def is_on_duty(self, now: float) -> bool:
        """Tell whether we are among the first by rank, as far as we know."""
        return bool(self._first(now))

    def is_colleague(self, now: float, name: str) -> bool:
        """Tell whether a member and we are both among the first by rank."""
        return name in self._first(now)

    def to_drop(
        self,
        now: float,
        neighbours: Collection[str],
        dialled: Collection[str],
        given: Mapping[str, int],
    ) -> str | None:
        """Return the chosen neighbour to exchange for somebody new, if any.

        Parameters
        ----------
        now : float
            The time.
        neighbours : collection of str
            All present ones.
        dialled : collection of str
            Those that we chose.
        given : mapping of str to int
            Bytes that each gave us since the last exchange.
        """
        chosen = [name for name in dialled if name in neighbours]
        if len(chosen) < self.limits.dials or len(neighbours) >= len(self._met) + len(
            self._hearsay
        ):
            return None
        chosen.sort(key=lambda name: -given.get(name, 0))
        colleagues = self._first(now)
        chosen = [name for name in chosen if name not in colleagues]
        return chosen[-1] if len(chosen) > self.limits.best else None
