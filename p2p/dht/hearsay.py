"""Providers as nodes name them: whose word is passed on first. No I/O.

Rules
-----
- Each provider is passed on once, `limit` in all.
- At once, one of those that a node names; the others when all nodes have been heard, every
  node in its turn. So a node that invents providers by the dozen takes the place of none
  that others name, as long as fewer than `limit` nodes are asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..host.addresses import PeerAddress


class Hearsay:
    """What a search for providers is told.

    Parameters
    ----------
    own_id : str
        Our own peer id, never passed on.
    limit : int
        Providers passed on in all.
    """

    def __init__(self, own_id: str, limit: int) -> None:
        self._passed_on = {own_id}
        self._left = limit
        self._held: deque[deque[PeerAddress]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether no more are passed on."""
        return self._left <= 0

    def take(self, named: Iterable[PeerAddress]) -> list[PeerAddress]:
        """Take what one node names; return what to pass on at once."""
        held = deque(named)
        now = self._next_of(held)
        if held:
            self._held.append(held)
        return now

    def rest(self) -> list[PeerAddress]:
        """Return the others, when all nodes have been heard."""
        found: list[PeerAddress] = []
        while self._held and not self.is_full:
            held = self._held.popleft()
            found += self._next_of(held)
            if held:
                self._held.append(held)
        return found

    def _next_of(self, held: deque[PeerAddress]) -> list[PeerAddress]:
        while held and not self.is_full:
            peer = held.popleft()
            if peer.peer_id not in self._passed_on:
                self._passed_on.add(peer.peer_id)
                self._left -= 1
                return [peer]
        return []
