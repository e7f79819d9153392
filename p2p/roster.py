"""Who else fetches the same now: with whom a download shares the origin, if it has one.

A neighbour that subscribed to the model's key wants the model, and says so to everybody
it meets, since that is how it asks who holds it. No message is needed besides.

Rules
- A neighbour is a member while it is subscribed and gets somewhere. Who tells us of
  nothing new for `PATIENCE_S`, while we get `PATIENCE_CHUNKS` ourselves, counts no more,
  and does not get its time anew by leaving and coming back. Its pace is measured by ours:
  on a slow line, or a busy machine, everybody is slow, and to take each other for gone
  would send everybody to the origin for everything.
- Where we get nothing ourselves, `LONGEST_PATIENCE_S` is the limit.
- Who cannot be reached or lied as a source is no member (the caller says who).
- The table has a bound; beyond it nobody new counts.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

PATIENCE_S = 10.0
"""How long a member may always have nothing new: a chunk in that time is 100 kB/s."""

PATIENCE_CHUNKS = 8
"""Chunks that we get in the time in which a member has nothing new, before it counts no
more: so much slower than we are is as good as gone."""

LONGEST_PATIENCE_S = 60.0
"""The same without chunks of ours: those who keep us waiting are not members for ever."""

MAX_MEMBERS = 512
"""Members remembered in one download, gone ones too: above the neighbours of one time."""


class Roster:
    """The members of one download, as far as they are neighbours and alive."""

    def __init__(self) -> None:
        self._alive: dict[str, tuple[float, int]] = {}
        self._chunks = 0
        self.members: frozenset[str] = frozenset()

    def heard(self, now: float, peer_id: str) -> None:
        """Note that a peer has told us of something new."""
        if peer_id in self._alive:
            self._alive[peer_id] = now, self._chunks

    def proved(self, count: int = 1) -> None:
        """Note chunks of our own: the measure of everybody's pace."""
        self._chunks += count

    def update(self, now: float, wanting: Iterable[str], without: Collection[str]) -> bool:
        """Note who wants the same, but for some; return whether the members have changed."""
        members = set()
        for peer_id in wanting:
            if peer_id not in self._alive and len(self._alive) < MAX_MEMBERS:
                self._alive[peer_id] = now, self._chunks
            if self._is_alive(now, peer_id) and peer_id not in without:
                members.add(peer_id)
        has_changed = members != self.members
        self.members = frozenset(members)
        return has_changed

    def _is_alive(self, now: float, peer_id: str) -> bool:
        if peer_id not in self._alive:
            return False
        alive_at, chunks = self._alive[peer_id]
        if now < alive_at + PATIENCE_S:
            return True
        is_left_behind = self._chunks >= chunks + PATIENCE_CHUNKS
        return not is_left_behind and now < alive_at + LONGEST_PATIENCE_S
