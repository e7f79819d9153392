"""The rate limiter: it holds its rate, is fair between keys, and lets go when closed."""

from __future__ import annotations

import threading

import pytest

from tensorswarm.p2p.rates import MIN_BYTES_PER_S, RateLimiter


class SteppedClock:
    """A clock that a waiting thread moves on by itself: every look takes a millisecond."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            self.now_s += 0.001
            return self.now_s


def instant(limiter: RateLimiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a wait with a deadline return at once; time moves because the clock is read."""
    wait = limiter._changed.wait
    monkeypatch.setattr(
        limiter._changed, "wait", lambda timeout: wait(None if timeout is None else 0.0)
    )


def test_a_rate_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteppedClock()
    limiter = RateLimiter(1_000_000, clock=clock)
    instant(limiter, monkeypatch)
    begun = clock.now_s
    for _ in range(100):
        limiter.take("a", 100_000)
    assert 10_000_000 / (clock.now_s - begun) == pytest.approx(1_000_000, rel=0.05)


def test_a_key_with_many_threads_gets_no_more_than_one_with_one() -> None:
    taken: dict[str, int] = {"many": 0, "one": 0}
    limiter = RateLimiter(2_000_000)
    gate = threading.Barrier(9)
    lock = threading.Lock()
    finished = threading.Event()

    def run(key: str) -> None:
        gate.wait()
        while not finished.is_set():
            limiter.take(key, 10_000)
            with lock:
                taken[key] += 1
                if sum(taken.values()) >= 120:
                    finished.set()
                    limiter.close()

    threads = [threading.Thread(target=run, args=("many",)) for _ in range(8)]
    threads.append(threading.Thread(target=run, args=("one",)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    # "one" cannot always be back in the queue in time, but it comes close to its half.
    assert taken["one"] >= 0.3 * (taken["one"] + taken["many"])


def test_closing_lets_everybody_through() -> None:
    limiter = RateLimiter(MIN_BYTES_PER_S)
    limiter.take("a", 10**9)
    waiting = threading.Thread(target=limiter.take, args=("a", 1))
    waiting.start()
    limiter.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_nothing_is_remembered_of_those_who_have_left() -> None:
    limiter = RateLimiter(1e12)
    for number in range(1000):
        limiter.take(str(number), 1)
    assert len(limiter._finish) <= 1
    assert not limiter._waiters


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), MIN_BYTES_PER_S / 2])
def test_a_rate_that_makes_no_sense_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        RateLimiter(rate)
