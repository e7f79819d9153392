"""Virtual time: a queue of events, and a digest of everything worth comparing.

Events happen in the order of their time, and at one time in the order they were
scheduled; nothing here reads a clock. `Trace.digest` is equal for two runs exactly when
they did the same things at the same times.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable
from hashlib import blake2b

Event = Callable[[], None]


class Engine:
    """Virtual time, in seconds.

    Attributes
    ----------
    now : float
        The time.
    event_count : int
        Events that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.event_count = 0
        self._queue: list[tuple[float, int, Event]] = []
        self._number = 0

    def at(self, time: float, event: Event) -> None:
        """Let something happen at a time; at once if that has passed."""
        self._number += 1
        heapq.heappush(self._queue, (max(time, self.now), self._number, event))

    def after(self, delay_s: float, event: Event) -> None:
        """Let something happen after a delay."""
        self.at(self.now + delay_s, event)

    def run(self, until: float, is_over: Callable[[], bool]) -> None:
        """Let events happen until it is over, none is left, or a time has come."""
        queue = self._queue
        while queue and not is_over():
            time, _, event = heapq.heappop(queue)
            if time > until:
                self.now = until
                return
            self.now = time
            self.event_count += 1
            event()


class Trace:
    """A running hash over what happened: times, kinds, nodes and chunks."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self._pending = bytearray()

    def note(self, now: float, kind: int, first: int, second: int, third: int) -> None:
        """Add one happening."""
        self._pending += struct.pack("<dBqqq", now, kind, first, second, third)
        if len(self._pending) > 1 << 16:
            self._hash.update(self._pending)
            self._pending.clear()

    def digest(self) -> str:
        """Return the digest of everything so far, in hexadecimal."""
        self._hash.update(self._pending)
        self._pending.clear()
        return self._hash.hexdigest()
