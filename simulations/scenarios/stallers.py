"""Stallers: a share of the peers claims to have everything, takes requests and never answers.

Every honest node finishes: who is silent is dropped within seconds, and its chunks are asked
for elsewhere. The ratio is to the time without stallers.
"""

from __future__ import annotations

from dataclasses import replace

from ..scenario import Outcome, Parameters
from ..swarms import COMMON, run_world
from .liars import crowd

PARAMETERS = {**COMMON, "nodes": 24, "chunks": 64, "share": 0.3}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run without stallers, and with them."""
    plain = run_world(parameters, seed, crowd(parameters, seed, 0.0), 1.0)[1]
    natures = [
        replace(nature, is_liar=False, is_staller=nature.is_liar)
        for nature in crowd(parameters, seed, parameters.number("share"))
    ]
    plain_s = float(str(plain.summary["last_s"]))
    outcome = run_world(parameters, seed, natures, plain_s, bound="without stallers")[1]
    outcome.failures = [*plain.failures, *outcome.failures]
    return outcome
