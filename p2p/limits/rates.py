"""Holding a rate, fairly: one limit in bytes per second for all that share it.

Whoever is about to move bytes takes them from the limiter first, and waits its turn,
which `fair_queue` decides. Take `slice_bytes` at a time: small enough that everybody's
bytes keep flowing, large enough to cost nothing.

Also reads rates as people write them. Threads wait here; nothing does I/O.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tensorswarm.store.errors import BadInput

from .fair_queue import FairQueue, Turn

MIN_BYTES_PER_S = 16 << 10
"""Lowest rate accepted. Each source or neighbour needs some 4 KiB/s, or the other side
takes it for one that hangs; this is enough for four of them."""

MAX_BYTES_PER_S = 1e12
"""Highest rate accepted: 8 Tbit/s. What is above was mistyped."""

MAX_RATE_TEXT = 40
"""Characters of a rate that are read."""

SLICE_S = 0.02
"""Seconds of the rate to take at a time: far below the burst that is let pass anyway, and few
enough turns: each wakes a thread here and one at the receiver."""

MIN_SLICE_BYTES = 4 << 10
"""Smallest slice: each costs a system call, and a TLS record's 22 bytes."""

MAX_SLICE_BYTES = 128 << 10
"""Largest slice: beyond, taking it costs nothing any more beside sending it."""

CATCH_UP_BYTES = 32 << 20
"""What a newcomer may get before it has its turns with the others: those of a crowd that
come a little later get even with the first, of whom each has two requests."""

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?)?(b|bit|bits|byte|bytes)?(/s|ps)?", re.I)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_FACTORS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_rate(text: str) -> float:
    """Read a rate: ``5MB/s``, ``500k``, ``1.5 MiB/s``, ``40Mbit``, ``100 Mbps``.

    A bare number is bytes per second; ``k``, ``M``, ``G``, ``T`` are powers of 1000,
    ``Ki`` and so on of 1024, in either case. ``B`` is bytes and ``bit`` bits; ``Mbps``
    is bits, as everywhere, and any other lower-case ``b`` is refused, because people
    mean either.

    Returns
    -------
    float
        Bytes per second.

    Raises
    ------
    BadInput
        It is no rate, or one that makes no sense.
    """
    match = _RATE.fullmatch(text.strip()[:MAX_RATE_TEXT])
    if match is None:
        raise BadInput(f"{text[:MAX_RATE_TEXT]!r} is not a rate such as 5MB/s, 500k or 40Mbit")
    number, prefix, unit, per_second = (part or "" for part in match.groups())
    if unit == "b" and per_second.lower() != "ps":
        raise BadInput(f"{text!r} could be bits or bytes: write {prefix}bit or {prefix}B")
    is_bits = unit == "b" or unit.lower().startswith("bit")
    factor = (_FACTORS | _BINARY_FACTORS)[prefix.lower()]
    return check_rate(float(number) * factor / (8 if is_bits else 1))


def check_rate(bytes_per_s: float) -> float:
    """Return a rate in bytes per second if it makes sense.

    Raises
    ------
    BadInput
        It is below `MIN_BYTES_PER_S`, above `MAX_BYTES_PER_S`, or no number.
    """
    if not MIN_BYTES_PER_S <= bytes_per_s <= MAX_BYTES_PER_S:
        raise BadInput(
            f"a rate limit of {bytes_per_s:.15g} bytes/s is not between {MIN_BYTES_PER_S} "
            f"and {MAX_BYTES_PER_S:.0e}; without the option there is no limit"
        )
    return bytes_per_s


def limiter_of(limit: float | str | None) -> RateLimiter | None:
    """Return the limiter of a limit as a caller may give it; None for none.

    Raises
    ------
    BadInput
        It is no rate.
    """
    if limit is None:
        return None
    return RateLimiter(parse_rate(limit) if isinstance(limit, str) else limit)


class FairGate:
    """Lets a few threads through at a time, those first whose key had least.

    There is no rate. It is for work that must not wait inside: many threads that send at
    once only take the interpreter's lock from each other, and who gets more is chance.

    Parameters
    ----------
    slots : int
        Threads let through at a time.
    """

    def __init__(self, slots: int) -> None:
        self._queue = FairQueue(MAX_BYTES_PER_S, 0.0, CATCH_UP_BYTES)
        self._free = slots
        self._lock = threading.Lock()
        self._waiters: dict[Turn, threading.Condition] = {}

    @contextmanager
    def turn(self, key: str, byte_count: int) -> Iterator[None]:
        """Wait for a turn to move `byte_count` bytes for `key`, and have it in the block."""
        with self._lock:
            turn = self._queue.enter(key, byte_count)
            if not self._is_next(turn):
                changed = self._waiters[turn] = threading.Condition(self._lock)
                while not self._is_next(turn):
                    changed.wait()
                del self._waiters[turn]
            self._free -= 1
            self._queue.grant(0.0)
            self._wake()
        try:
            yield
        finally:
            with self._lock:
                self._free += 1
                self._wake()

    def _is_next(self, turn: Turn) -> bool:
        return self._free > 0 and self._queue.first() == turn

    def _wake(self) -> None:
        following = self._queue.first()
        if self._free and following is not None and following in self._waiters:
            self._waiters[following].notify()


class RateLimiter:
    """A rate shared by threads.

    Parameters
    ----------
    bytes_per_s : float
        The rate, from `MIN_BYTES_PER_S` to `MAX_BYTES_PER_S`.
    clock : callable
        Gives seconds, never going back.

    Raises
    ------
    BadInput
        The rate makes no sense.
    """

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s = check_rate(bytes_per_s)
        self.slice_bytes = int(min(max(bytes_per_s * SLICE_S, MIN_SLICE_BYTES), MAX_SLICE_BYTES))
        self._clock = clock
        self._queue = FairQueue(bytes_per_s, clock())
        self._lock = threading.Lock()
        self._waiters: dict[Turn, threading.Condition] = {}
        self._closed = False

    def take(self, key: str, byte_count: int) -> None:
        """Wait until `byte_count` bytes may be moved for `key`.

        Returns at once after `close`.
        """
        with self._lock:
            if self._closed:
                return
            turn = self._queue.enter(key, byte_count)
            if not self._wait(turn):
                return
            self._queue.grant(self._clock())
            following = self._queue.first()
            if following is not None:
                self._waiters[following].notify()

    def _wait(self, turn: Turn) -> bool:
        """Wait for a turn; False when the limiter was closed. Only the first watches the clock."""
        changed = self._waiters[turn] = threading.Condition(self._lock)
        try:
            while not self._closed:
                if self._queue.first() != turn:
                    changed.wait()
                elif (wait_s := self._queue.wait_s(self._clock())) > 0:
                    changed.wait(wait_s)
                else:
                    return True
            return False
        finally:
            del self._waiters[turn]

    def close(self) -> None:
        """Let everybody through who waits, now and later."""
        with self._lock:
            self._closed = True
            for changed in self._waiters.values():
                changed.notify()
