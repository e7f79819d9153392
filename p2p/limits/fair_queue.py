"""Who may move bytes next when a rate is shared, and when: the rule alone.

Turns go by start-time fair queueing (Goyal, Vin, Cheng 1996): each key, such as a
neighbour, has a virtual clock that advances by the bytes it took, and the key that is
furthest behind goes next. So a neighbour with eight connections gets no more than one
with a single connection, and nobody starves. Turns of one key go in the order asked.

A key that was away for a moment, because it was busy sending what it took, may catch
up a little: without that, whoever has more connections would always find the gap.

No I/O, no clock, no threads: `rates.RateLimiter` is the shell.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import NamedTuple

BURST_S = 0.2
"""Idle time that may be caught up, in seconds of the rate. It hides a busy machine's
delays, and is 2 % of what a meter sees in ten seconds."""


MIN_REMEMBERED = 64
"""Keys remembered without asking whether they still matter."""


class Turn(NamedTuple):
    """A place in the queue; places compare by who goes first."""

    tag: float
    number: int
    key: str
    byte_count: int


class FairQueue:
    """Turns at a rate.

    Parameters
    ----------
    bytes_per_s : float
        The rate.
    now : float
        The time, in seconds of a clock that never goes back.
    lag_bytes : float, optional
        How far behind the others a key may be and still catch up; `BURST_S` of the rate
        by default. Whoever is new begins so far behind.
    """

    def __init__(self, bytes_per_s: float, now: float, lag_bytes: float | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lag_bytes = bytes_per_s * BURST_S if lag_bytes is None else lag_bytes
        self._forget_at = MIN_REMEMBERED
        self._free_at = now
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._turns: list[Turn] = []
        self._numbers = itertools.count()

    @property
    def keys_remembered(self) -> int:
        """Number of keys that something is kept of."""
        return len(self._finish)

    def enter(self, key: str, byte_count: int) -> Turn:
        """Queue for so many bytes."""
        tag = max(self._virtual - self._lag_bytes, self._finish.get(key, 0.0))
        self._finish[key] = tag + byte_count
        self._waiting[key] += 1
        turn = Turn(tag, next(self._numbers), key, byte_count)
        heapq.heappush(self._turns, turn)
        return turn

    def first(self) -> Turn | None:
        """Return whose turn it is."""
        return self._turns[0] if self._turns else None

    def wait_s(self, now: float) -> float:
        """Return how long the first has to wait; 0 or less when it may go."""
        return self._free_at - now

    def grant(self, now: float) -> Turn:
        """Let the first go; return it."""
        turn = heapq.heappop(self._turns)
        self._virtual = max(self._virtual, turn.tag)
        self._free_at = max(self._free_at, now - BURST_S) + turn.byte_count / self._bytes_per_s
        self._waiting[turn.key] -= 1
        if not self._waiting[turn.key]:
            del self._waiting[turn.key]
        if len(self._finish) > self._forget_at:
            self._forget()
            self._forget_at = max(MIN_REMEMBERED, 2 * len(self._finish))
        return turn

    def _forget(self) -> None:
        """Drop keys that wait for nothing and have no more than anybody new."""
        floor = self._virtual - self._lag_bytes
        self._finish = {
            key: finish
            for key, finish in self._finish.items()
            if key in self._waiting or finish > floor
        }
