"""Who else fetches the same now: with whom a download shares the origin, if it has one.

A neighbour that subscribed to the model's key wants the model, and says so to everybody
it meets, since that is how it asks who holds it. No message is needed besides.

Rules
- A neighbour is a member while it is subscribed, and tells us of something new, or came,
  within `PATIENCE_S`. Who only says that it wants the same soon counts no more, and does
  not get its time anew by leaving and coming back.
- Who failed or lied as a source is no member (the caller says who).
- The table has a bound; beyond it nobody new counts.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PATIENCE_S = 10.0
"""How long a member may have nothing new: a chunk in that time is 100 kB/s."""

MAX_MEMBERS = 512
"""Members remembered in one download, gone ones too: above the neighbours of one time."""


class Roster:
    """The members of one download, as far as they are neighbours and alive."""

    def __init__(self) -> None:
        self._alive_at: dict[str, float] = {}
        self.members: frozenset[str] = frozenset()

    def heard(self, now: float, peer_id: str) -> None:
        """Note that a peer has told us of something new."""
        if peer_id in self._alive_at:
            self._alive_at[peer_id] = now

    def update(self, now: float, wanting: Iterable[str], without: Collection[str]) -> bool:
        """Note who wants the same, but for some; return whether the members have changed."""
        members = set()
        for peer_id in wanting:
            if peer_id not in self._alive_at and len(self._alive_at) < MAX_MEMBERS:
                self._alive_at[peer_id] = now
            alive_at = self._alive_at.get(peer_id)
            if alive_at is not None and now < alive_at + PATIENCE_S and peer_id not in without:
                members.add(peer_id)
        has_changed = members != self.members
        self.members = frozenset(members)
        return has_changed
