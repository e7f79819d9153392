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

import heapq
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .origin_duty import rank_of


@dataclass(frozen=True, slots=True)
class MembershipLimits:
    """The numbers, with their reasons."""

    dials: int = 6
    """Neighbours that we choose; as many choose us: 12 in all, of whom some are idle."""
    max_neighbours: int = 16
    """Neighbours kept for one swarm: have-messages cost each node this many a chunk."""
    best: int = 2
    """Chosen neighbours that are never let go: those who gave most."""
    on_duty: int = 5
    """The first by rank keep each other as neighbours: those on origin duty, and the next."""
    exchange: int = 48
    """Members named in one answer: below the protocol's limit of 64."""
    exchange_first: int = 8
    """Of these, the first by rank: so everybody soon agrees who is on duty."""
    hearsay_s: float = 60.0
    """How long a member counts that we only heard of."""
    retry_s: float = 10.0
    """How long a member is not tried again that could not be reached, or that left."""
    max_members: int = 512
    """Members remembered: enough for ranks to agree, small beside the download itself."""
    max_hearsay_per_teller: int = 256
    """Members believed on one neighbour's word: half of the table."""


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
        self._met: dict[str, None] = {}
        self._hearsay: dict[str, tuple[float, str]] = {}
        self._tellers: dict[str, int] = {}
        self._failed: dict[str, float] = {}
        self._finished: dict[str, None] = {}
        self._ranks: dict[str, int] = {}

    # who is there

    def met(self, name: str) -> None:
        """Note a member that we talk to."""
        if name != self.me:
            self._forget_hearsay(name)
            self._met[name] = None
            self._failed.pop(name, None)

    def left(self, now: float, name: str) -> None:
        """Note a member that we could not reach, or that has gone."""
        self._met.pop(name, None)
        self._finished.pop(name, None)
        self._forget_hearsay(name)
        self._failed[name] = now
        if len(self._failed) > self.limits.max_members:
            del self._failed[next(iter(self._failed))]

    def let_go(self, now: float, name: str) -> None:
        """Note a member that is there, but no neighbour any more."""
        self._met.pop(name, None)
        self._finished.pop(name, None)
        self.heard(now, [name], name)

    def heard(self, now: float, names: Iterable[str], teller: str) -> None:
        """Note members that a neighbour, or discovery, names."""
        limits = self.limits
        for name in names:
            if name == self.me or name in self._met:
                continue
            if name in self._failed and now < self._failed[name] + limits.retry_s:
                continue
            known = self._hearsay.get(name)
            if known is not None:
                self._hearsay[name] = (now, known[1])
            elif (
                len(self._hearsay) < limits.max_members
                and self._tellers.get(teller, 0) < limits.max_hearsay_per_teller
            ):
                self._hearsay[name] = (now, teller)
                self._tellers[teller] = self._tellers.get(teller, 0) + 1

    def _forget_hearsay(self, name: str) -> None:
        known = self._hearsay.pop(name, None)
        if known is not None:
            self._tellers[known[1]] -= 1
            if not self._tellers[known[1]]:
                del self._tellers[known[1]]

    def members(self, now: float) -> list[str]:
        """Return everybody who counts now, without us."""
        oldest = now - self.limits.hearsay_s
        for name in [name for name, (at, _) in self._hearsay.items() if at < oldest]:
            self._forget_hearsay(name)
        return [*self._met, *self._hearsay]

    def finished(self, name: str) -> None:
        """Note a member that has everything: it serves, but does no duty any more."""
        if name in self._met:
            self._finished[name] = None

    def on_call(self, now: float) -> list[str]:
        """Return the members that still download, as far as we know."""
        return [name for name in self.members(now) if name not in self._finished]

    def to_tell(self, now: float, asker: str) -> list[str]:
        """Return the members to name to a neighbour: the first by rank, and a sample."""
        limits = self.limits
        others = [name for name in self.members(now) if name != asker]
        if len(others) <= limits.exchange:
            return others
        others.sort(key=self._rank, reverse=True)
        first = others[: limits.exchange_first]
        return first + self._rng.sample(
            others[limits.exchange_first :], limits.exchange - len(first)
        )

    def _rank(self, name: str) -> int:
        rank = self._ranks.get(name)
        if rank is None:
            if len(self._ranks) > 4 * self.limits.max_members:
                self._ranks.clear()
            rank = self._ranks[name] = rank_of(self.key, name)
        return rank

    # whom to keep

    def _first(self, now: float) -> list[str]:
        """Return the first members by rank if we are one of them."""
        ranked = heapq.nlargest(self.limits.on_duty, [self.me, *self.on_call(now)], key=self._rank)
        return ranked if self.me in ranked else []

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
        wanted = min(
            limits.dials - len(dialled) - len(colleagues),
            limits.max_neighbours - len(neighbours),
        )
        strangers = [
            name for name in self.members(now) if name not in neighbours and name not in dialled
        ]
        strangers = [name for name in strangers if name not in colleagues]
        if wanted <= 0 or not strangers:
            return colleagues
        return colleagues + self._rng.sample(strangers, min(wanted, len(strangers)))

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
