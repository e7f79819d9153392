"""Holding a rate, fairly: one limit in bytes per second for all that share it.

Whoever is about to move bytes takes them from the limiter first, and waits its turn.
Turns go by start-time fair queueing (Goyal, Vin, Cheng 1996): each key, such as a
neighbour, has a virtual clock that advances by the bytes it took, and the key that is
furthest behind goes next. So a neighbour with eight connections gets no more than one
with a single connection, and nobody starves.

Threads wait here; nothing does I/O.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable

BURST_S = 0.02
"""Idle time that may be caught up, in seconds of the rate: hides the scheduler's delays,
and is far below what a neighbour or a meter would notice."""

MIN_BYTES_PER_S = 1024.0
"""Lowest rate accepted: below it, one slice takes longer than any deadline."""


class RateLimiter:
    """A rate shared by threads.

    Parameters
    ----------
    bytes_per_s : float
        The rate, at least `MIN_BYTES_PER_S`.
    clock : callable
        Gives seconds, never going back.
    """

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_s >= MIN_BYTES_PER_S:
            raise ValueError(f"a rate of {bytes_per_s} bytes/s is below {MIN_BYTES_PER_S:.0f}")
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = clock()
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._waiters: Counter[str] = Counter()
        self._queue: list[tuple[float, int]] = []
        self._tickets = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def take(self, key: str, byte_count: int) -> None:
        """Wait until `byte_count` bytes may be moved for `key`.

        Returns at once after `close`.
        """
        with self._changed:
            tag = max(self._virtual, self._finish.get(key, 0.0))
            self._finish[key] = tag + byte_count
            self._waiters[key] += 1
            turn = (tag, next(self._tickets))
            heapq.heappush(self._queue, turn)
            while not self._closed:
                wait_s = self._free_at - self._clock()
                if self._queue[0] == turn and wait_s <= 0:
                    break
                self._changed.wait(wait_s if self._queue[0] == turn else None)
            self._queue.remove(turn)
            heapq.heapify(self._queue)
            self._virtual = max(self._virtual, tag)
            self._free_at = (
                max(self._free_at, self._clock() - BURST_S) + byte_count / self.bytes_per_s
            )
            self._leave(key)
            self._changed.notify_all()

    def _leave(self, key: str) -> None:
        """Forget keys that wait for nothing and are not ahead of the others."""
        self._waiters[key] -= 1
        if not self._waiters[key]:
            del self._waiters[key]
            if self._finish[key] <= self._virtual:
                del self._finish[key]
        if not self._queue:
            self._finish.clear()
            self._virtual = 0.0

    def close(self) -> None:
        """Let everybody through who waits, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
