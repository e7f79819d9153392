"""Every parser under hostile bytes: a short run of what `format_fuzz` does at length.

The log of a run of a million inputs for each format is in ``docs/fuzzing.md``.
"""

from __future__ import annotations

import pytest

from tests.support.format_fuzz import SEEDS, fuzz

INPUTS = 3000
WATCHED_INPUTS = 400
"""For each format, the second with an eye on memory; together they take some seconds."""


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files(name: str) -> None:
    accepted = fuzz(name, INPUTS)
    assert 0 < accepted < INPUTS  # otherwise it would not test one side or the other
    fuzz(name, WATCHED_INPUTS, seed=1, watch_memory=True)
