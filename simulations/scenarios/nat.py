"""Nodes behind NAT: they can dial, but nobody can dial them.

Two of them never meet, so they depend on those in the open, who serve them over the
connections that they opened themselves.
"""

from __future__ import annotations

import random
from dataclasses import replace

from ..measure import broadcast_optimum_s
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, receivers, run_world

PARAMETERS = {**COMMON, "share": 0.5}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    rng = random.Random(f"{seed}/nat")
    natures = receivers(parameters, seed)
    hidden = rng.sample(
        range(len(natures)), round(len(natures) * parameters.number("share", most=1.0))
    )
    for i in hidden:
        natures[i] = replace(natures[i], is_behind_nat=True)
    optimum_s = broadcast_optimum_s(
        parameters.integer("nodes"), parameters.integer("chunks"), parameters.number("chunk_s")
    )
    return run_world(parameters, seed, natures, optimum_s)[1]
