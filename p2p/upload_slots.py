"""Which request is served next: few at a time, and what the swarm needs most.

A peer that sends to everybody at once delivers every chunk late, and nobody can pass on
what is not whole. With few slots a chunk leaves at the full rate of the uplink, and its
receiver doubles the number of those who can give it.

Rules
- At most `slots` requests are served at a time.
- Of those that wait, the one whose chunk we have served least often goes first: so a
  seed gives every chunk once before any twice. Then the chunk that the fewest neighbours
  have, as far as we know; then the peer that has had the least from us; then the first.
- Whoever has waited for `max_wait_s` goes before all that, in the order they came: so
  nobody starves, and nobody takes us for stalled.
- A peer has at most `max_waiting_per_peer` requests here; more are refused.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

MAX_WAITING_PER_PEER = 16
"""Requests of one peer that wait: four times what a planner of ours asks of one source."""

MAX_WAIT_S = 1.5
"""Longest wait before a request goes ahead of rarer ones: half of what a planner takes
for a stall."""

MAX_COUNTED_CHUNKS = 1 << 20
"""Chunks whose servings are counted: 1 TiB of chunks, some 100 MB at the very worst."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for a slot."""

    peer: str
    ticket: int
    chunk: Hashable
    since: float


class UploadSlots:
    """The queue before the uplink.

    Parameters
    ----------
    slots : int
        Requests served at a time.
    holders_of : callable
        Tells how many neighbours are known to have a chunk.
    """

    def __init__(self, slots: int, holders_of: Callable[[Hashable], int]) -> None:
        self._slots = slots
        self._holders_of = holders_of
        self._waiting: dict[tuple[str, int], Waiting] = {}
        self._served: dict[Hashable, int] = {}
        self._given: dict[str, int] = {}
        self._per_peer: dict[str, int] = {}
        self.active: dict[tuple[str, int], Waiting] = {}

    def ask(self, now: float, peer: str, ticket: int, chunk: Hashable) -> bool:
        """Queue a request, known by peer and ticket; return False when it has too many."""
        count = self._per_peer.get(peer, 0)
        if count >= MAX_WAITING_PER_PEER:
            return False
        self._per_peer[peer] = count + 1
        self._waiting[peer, ticket] = Waiting(peer, ticket, chunk, now)
        return True

    def withdraw(self, peer: str, ticket: int) -> bool:
        """Forget a request that is not wanted any more; return whether it was waiting."""
        if self._waiting.pop((peer, ticket), None) is None:
            return False
        self._left(peer)
        return True

    def forget(self, peer: str) -> list[Waiting]:
        """Forget a peer that has gone; return those of its requests that were served."""
        for key in [key for key in self._waiting if key[0] == peer]:
            self.withdraw(*key)
        stopped = [self.active.pop(key) for key in list(self.active) if key[0] == peer]
        self._given.pop(peer, None)
        return stopped

    def begin(self, now: float) -> list[Waiting]:
        """Return the requests to serve from now on."""
        begun = []
        while self._waiting and len(self.active) < self._slots:
            chosen = min(self._waiting.values(), key=lambda each: self._urgency(now, each))
            key = chosen.peer, chosen.ticket
            del self._waiting[key]
            self._left(chosen.peer)
            self.active[key] = chosen
            if chosen.chunk in self._served or len(self._served) < MAX_COUNTED_CHUNKS:
                self._served[chosen.chunk] = self._served.get(chosen.chunk, 0) + 1
            self._given[chosen.peer] = self._given.get(chosen.peer, 0) + 1
            begun.append(chosen)
        return begun

    def end(self, peer: str, ticket: int) -> None:
        """Note that a request was served, or given up."""
        self.active.pop((peer, ticket), None)

    def served(self, chunk: Hashable) -> int:
        """Return how often a chunk was served."""
        return self._served.get(chunk, 0)

    def _left(self, peer: str) -> None:
        self._per_peer[peer] -= 1
        if not self._per_peer[peer]:
            del self._per_peer[peer]

    def _urgency(self, now: float, each: Waiting) -> tuple[float, int, int, int]:
        if now - each.since >= MAX_WAIT_S:
            return each.since - now - 1, 0, 0, 0
        return (
            0.0,
            self._served.get(each.chunk, 0),
            self._holders_of(each.chunk),
            self._given.get(each.peer, 0),
        )
