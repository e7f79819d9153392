"""Runs of numbers that follow each other: what lies side by side is handled in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise


def runs_in(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each slice of `numbers` in which every next one is one more.

    >>> list(runs_in([4, 5, 6, 9, 10, 2]))
    [(0, 3), (3, 5), (5, 6)]
    """
    start = 0
    for stop in [at for at, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]:
        yield start, stop
        start = stop
    if numbers:
        yield start, len(numbers)
