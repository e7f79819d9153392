"""Rates: the rule in virtual time, the limiter with real threads, and how people write them."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from tensorswarm.p2p.limits.fair_queue import BURST_S, MIN_REMEMBERED, FairQueue
from tensorswarm.p2p.limits.rates import (
    CATCH_UP_BYTES,
    MAX_BYTES_PER_S,
    MAX_SLICE_BYTES,
    MIN_BYTES_PER_S,
    MIN_SLICE_BYTES,
    FairGate,
    RateLimiter,
    limiter_of,
    parse_rate,
)
from tensorswarm.store.errors import BadInput

RATE = 1_000_000.0
SLICE = 10_000
WAIT_S = 30.0


class Line:
    """Virtual threads that take slices of a shared rate, one after the other.

    Each is away for `away_s` between its turns: it sends what it took.
    """

    def __init__(self, away_s: float = 0.0) -> None:
        self.now = 0.0
        self.queue = FairQueue(RATE, 0.0)
        self.taken: Counter[str] = Counter()
        self._away_s = away_s
        self._back: list[tuple[float, str]] = []

    def add(self, key: str, threads: int) -> None:
        self._back += [(self.now, key)] * threads

    def run(self, until: float) -> None:
        while True:
            self._back.sort()
            first_at = self.now + self.queue.wait_s(self.now) if self.queue.first() else None
            if self._back and (first_at is None or self._back[0][0] <= first_at):
                at, key = self._back.pop(0)
                self.now = max(self.now, at)
                self.queue.enter(key, SLICE)
                continue
            assert first_at is not None
            self.now = max(self.now, first_at)
            if self.now > until:
                return
            key = self.queue.grant(self.now).key
            self.taken[key] += SLICE
            self._back.append((self.now + self._away_s, key))


def test_a_rate_is_held() -> None:
    line = Line()
    line.add("a", 3)
    line.run(until=10.0)
    assert line.taken.total() == pytest.approx(10 * RATE, rel=0.005)


def test_idle_time_is_caught_up_for_a_moment_only() -> None:
    line = Line()
    line.now = 100.0
    line.add("a", 1)
    line.run(until=101.0)
    assert line.taken.total() == pytest.approx((1.0 + BURST_S) * RATE, rel=0.02)


@pytest.mark.parametrize("away_s", [0.0, 0.008])
def test_many_connections_get_no_more_than_one(away_s: float) -> None:
    """Also when the one is away at each turn, and the many always have one in the queue."""
    line = Line(away_s)
    line.add("many", 8)
    line.add("one", 1)
    line.run(until=10.0)
    assert line.taken["one"] == pytest.approx(line.taken["many"], rel=0.05)


def test_a_newcomer_is_served_at_once_and_has_no_claim_on_the_past() -> None:
    line = Line()
    line.add("old", 1)
    line.run(until=10.0)
    before = line.taken["old"]
    line.add("new", 1)
    line.run(until=20.0)
    assert line.taken["new"] == pytest.approx(5 * RATE, rel=0.05)
    assert line.taken["old"] - before == pytest.approx(5 * RATE, rel=0.05)


def test_who_takes_less_than_its_share_leaves_it_to_others() -> None:
    line = Line(away_s=0.1)  # one thread alone takes 10 slices a second at most
    line.add("slow", 1)
    line.add("fast", 20)
    line.run(until=10.0)
    assert line.taken["slow"] == pytest.approx(10 * 10 * SLICE, rel=0.1)
    assert line.taken.total() == pytest.approx(10 * RATE, rel=0.03)


def test_nothing_is_remembered_of_those_who_have_left() -> None:
    queue = FairQueue(RATE, 0.0)
    queue.enter("stays", SLICE)
    for number in range(1000):
        queue.enter(str(number), SLICE)
        queue.enter("stays", SLICE)
        queue.grant(0.0)
        queue.grant(0.0)
    assert queue.keys_remembered <= 2 * (MIN_REMEMBERED + RATE * BURST_S / SLICE)


# ---- with threads


def test_threads_are_served_fairly() -> None:
    taken: Counter[str] = Counter()
    limiter = RateLimiter(4_000_000)
    gate = threading.Barrier(5)
    lock = threading.Lock()

    def run(key: str) -> None:
        gate.wait(WAIT_S)
        while True:
            limiter.take(key, limiter.slice_bytes)
            with lock:
                if taken.total() >= 80:
                    limiter.close()
                    return
                taken[key] += 1

    threads = [threading.Thread(target=run, args=("many",)) for _ in range(4)]
    threads.append(threading.Thread(target=run, args=("one",)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert abs(taken["one"] - taken["many"]) <= 10


def test_a_gate_lets_few_through_and_those_first_who_had_least() -> None:
    gate = FairGate(2)
    order: list[str] = []
    inside: list[str] = []
    lock = threading.Lock()
    release = threading.Event()
    entered = threading.Barrier(3)

    def hold() -> None:
        with gate.turn("rich", 2 * CATCH_UP_BYTES):
            entered.wait(WAIT_S)
            release.wait(WAIT_S)

    def run(key: str) -> None:
        with gate.turn(key, 1000), lock:
            inside.append(key)
            assert len(inside) <= 2
            order.append(key)
            inside.remove(key)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    entered.wait(WAIT_S)  # both slots are taken
    for number, key in enumerate(("rich", "rich", "new")):
        threads.append(threading.Thread(target=run, args=(key,)))
        threads[-1].start()
        while len(gate._waiters) <= number:
            time.sleep(0)
    release.set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert order[0] == "new"


def test_closing_lets_everybody_through() -> None:
    limiter = RateLimiter(MIN_BYTES_PER_S)
    limiter.take("a", 10**9)
    waiting = [threading.Thread(target=limiter.take, args=(key, 1)) for key in "abc"]
    for thread in waiting:
        thread.start()
    limiter.close()
    for thread in waiting:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    begun = time.monotonic()
    limiter.take("a", 10**9)
    assert time.monotonic() - begun < WAIT_S


def test_slices_fit_the_rate() -> None:
    assert RateLimiter(MIN_BYTES_PER_S).slice_bytes == MIN_SLICE_BYTES
    assert RateLimiter(5e6).slice_bytes == 100_000
    assert RateLimiter(MAX_BYTES_PER_S).slice_bytes == MAX_SLICE_BYTES


# ---- as people write them


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("5MB/s", 5e6),
        ("5 MB/s", 5e6),
        ("500k", 500e3),
        ("500K", 500e3),
        ("500kB", 500e3),
        ("40Mbit", 5e6),
        ("40 mbit/s", 5e6),
        ("100Mbps", 12.5e6),
        ("2MBps", 2e6),
        ("1.5MiB/s", 1.5 * (1 << 20)),
        ("1Gi", float(1 << 30)),
        ("65536", 65536.0),
        ("65536B", 65536.0),
        ("1g", 1e9),
        (" 1m ", 1e6),
    ],
)
def test_rates_are_read(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "-5M", "fast", "5MB/h", "nan", "inf", "1e9", "5 5", "5MX", "M", "MB/s", "5Mb",
        "5mb/s", "1B/s", "999T" * 20, "99999999999999T", "٥MB", "5,5MB", "\n", "5M\x00",
    ],
)  # fmt: skip
def test_what_is_no_rate_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_rate(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), MIN_BYTES_PER_S / 2, float("inf")])
def test_a_rate_that_makes_no_sense_is_refused(rate: float) -> None:
    with pytest.raises(BadInput, match="rate"):
        limiter_of(rate)


def test_a_limiter_is_made_of_what_a_caller_gives() -> None:
    assert limiter_of(None) is None
    for limit in ("5MB/s", 5e6):
        limiter = limiter_of(limit)
        assert limiter is not None and limiter.bytes_per_s == 5e6
