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
from typing import Any

Event = Callable[..., None]

SLOTS_PER_S = 1024
"""Slots of time in a second. Only the events of the present slot stand in a heap, which so
stays small however many nodes there are; those of later slots wait in plain lists."""


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
        self._is_stopped = False
        self._number = 0
        self._slot = 0
        self._present: list[tuple[float, int, Event, tuple[Any, ...]]] = []
        self._later: dict[int, list[tuple[float, int, Event, tuple[Any, ...]]]] = {}
        self._later_slots: list[int] = []

    def at(self, time: float, event: Event, *args: Any) -> None:
        """Let something happen at a time; at once if that has passed."""
        self._number += 1
        if time < self.now:
            time = self.now
        entry = (time, self._number, event, args)
        slot = int(time * SLOTS_PER_S)
        if slot <= self._slot:
            heapq.heappush(self._present, entry)
            return
        waiting = self._later.get(slot)
        if waiting is not None:
            waiting.append(entry)
        else:
            self._later[slot] = [entry]
            heapq.heappush(self._later_slots, slot)

    def after(self, delay_s: float, event: Event, *args: Any) -> None:
        """Let something happen after a delay."""
        self._number += 1
        time = self.now + delay_s
        entry = (time, self._number, event, args)
        slot = int(time * SLOTS_PER_S)
        if slot <= self._slot:
            heapq.heappush(self._present, entry)
        elif slot in self._later:
            self._later[slot].append(entry)
        else:
            self._later[slot] = [entry]
            heapq.heappush(self._later_slots, slot)

    def stop(self) -> None:
        """Let no event happen after the present one."""
        self._is_stopped = True

    def run(self, until: float, is_over: Callable[[], bool] | None = None) -> None:
        """Let events happen until it is over or stopped, none is left, or a time has come."""
        present, pop = self._present, heapq.heappop
        self._is_stopped = False
        while not self._is_stopped:
            if is_over is not None and is_over():
                return
            if not present:
                if not self._later_slots:
                    return
                self._slot = pop(self._later_slots)
                present += self._later.pop(self._slot)
                heapq.heapify(present)
            if present[0][0] > until:
                self.now = until
                return
            self.now, _, event, args = pop(present)
            self.event_count += 1
            event(*args)


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
