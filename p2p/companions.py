"""Those who fetch the same from the same origin: who they are, and whom of them to meet.

With everybody knowing everybody, a swarm of N makes N²/2 handshakes before anything moves,
and each chunk is news to N. So a node meets a few, chosen at random by `swarm.membership`,
and those on duty at the origin meet each other.

Rules
- Whom a neighbour or the DHT names under the swarm's key counts as a member before it is
  met, so that those who start together know at once who asks the origin for what.
- Who was met counts while it wants the same. One that holds something and does not say so,
  or has not said so within `GRACE_S`, is a seeder, and no member: seeders are met without a
  bound. So is everybody where there is no origin to share.
- Who cannot be reached is no member, for a while.

The parts with I/O are the caller's: it dials whom `choose` and `after` return.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import trio

from .control.neighbours import Neighbours
from .host.addresses import PeerAddress
from .swarm.membership import Membership, MembershipLimits

LIMITS = MembershipLimits(dials=4, least_neighbours=4, max_neighbours=12)
"""Eight neighbours on average: a chunk reaches 64 nodes in two steps, and what each node
hears and says does not grow with the swarm."""

GRACE_S = 1.0
"""Time in which a member that was met says what it wants: some round trips."""


class Companions:
    """The members of one swarm, met and unmet.

    Parameters
    ----------
    key : bytes
        What they subscribe to.
    neighbours : Neighbours
        Who is met.
    rng : random.Random
        Chooses.
    """

    def __init__(self, key: bytes, neighbours: Neighbours, rng: random.Random) -> None:
        self._key = key
        self._neighbours = neighbours
        self._membership = Membership(key, neighbours.me, rng, LIMITS)
        self._addresses: dict[str, PeerAddress] = {}
        self._dialling: set[str] = set()
        self._chosen: set[str] = set()
        self._met_at: dict[str, float] = {}

    def choose(self, teller: str, peers: Sequence[PeerAddress]) -> list[PeerAddress]:
        """Note peers that somebody names; return whom to dial now."""
        now = trio.current_time()
        strangers = [peer for peer in peers if not self._neighbours.is_neighbour(peer.peer_id)]
        self._membership.heard(now, [peer.peer_id for peer in strangers], teller)
        known = set(self._membership.members(now))
        for peer in strangers:
            if peer.peer_id in known:
                self._addresses[peer.peer_id] = peer
        for name in self._addresses.keys() - known:
            del self._addresses[name]
        return self._due(now)

    def after(self, peer_id: str) -> list[PeerAddress]:
        """Note that a dial has ended, well or badly; return whom to dial now."""
        now = trio.current_time()
        self._dialling.discard(peer_id)
        if self._neighbours.is_neighbour(peer_id):
            self._met_at[peer_id] = now
        else:
            self._chosen.discard(peer_id)
            self._membership.left(now, peer_id)
        return self._due(now)

    def unmet(self, now: float) -> frozenset[str]:
        """Return the members that do not say themselves that they are: named, or just met."""
        self._update(now)
        wanting = self._neighbours.wanting(self._key)
        return frozenset(self._membership.members(now)).difference(wanting)

    def is_anybody_there(self) -> bool:
        """Tell whether any member is known."""
        now = trio.current_time()
        return bool(self._neighbours.wanting(self._key) or self.unmet(now))

    def are_enough(self) -> bool:
        """Tell whether so many are met that the swarm's news reaches us."""
        return len(self._neighbours.wanting(self._key)) >= LIMITS.least_neighbours

    def _update(self, now: float) -> None:
        wanting = set(self._neighbours.wanting(self._key))
        for name in wanting:
            self._membership.met(name)
        for name in self._membership.members(now):
            if name in wanting or not self._neighbours.is_neighbour(name):
                continue
            met_at = self._met_at.setdefault(name, now)
            if self._neighbours.holds_anything(name) or now >= met_at + GRACE_S:
                self._membership.left(now, name)  # until it says that it wants the same
        for name in [name for name in self._met_at if not self._neighbours.is_neighbour(name)]:
            del self._met_at[name]

    def _due(self, now: float) -> list[PeerAddress]:
        self._update(now)
        wanting = set(self._neighbours.wanting(self._key))
        fresh = {
            name
            for name, at in self._met_at.items()
            if now < at + GRACE_S and not self._neighbours.holds_anything(name)
        }
        here = wanting | fresh | self._dialling
        self._chosen &= here
        due = [
            self._addresses[name]
            for name in self._membership.to_dial(now, here, self._chosen)
            if name in self._addresses and not self._neighbours.is_neighbour(name)
        ]
        self._chosen.update(peer.peer_id for peer in due)
        self._dialling.update(peer.peer_id for peer in due)
        return due
