"""Recipes, stamps and sidecars from strangers: a short run of `claims_fuzz`.

The log of a run of a million inputs for each is in ``docs/fuzzing.md``.
"""

from __future__ import annotations

import pytest

from tests.support.claims_fuzz import CLAIMS, fuzz

INPUTS = {"recipe": 1000, "remote": 150, "sidecar": 500, "stamp": 1000}
"""For each kind; together they take some seconds."""


@pytest.mark.parametrize("name", CLAIMS)
def test_mutated_claims(name: str) -> None:
    accepted = fuzz(name, INPUTS[name], watch_memory=True)
    assert 0 < accepted < INPUTS[name]  # otherwise it would not test one side or the other
