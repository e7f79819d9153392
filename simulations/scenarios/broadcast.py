"""Broadcast: a limited origin and N receivers with equal uplinks, against the optimum.

All receivers start within `start_s`, and nobody but the origin has anything. The optimum
is `M + floor(log2 N)` rounds of one chunk each (Mundinger, Weber, Weiss 2008).
"""

from __future__ import annotations

from ..measure import broadcast_optimum_s
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, receivers, run_world

PARAMETERS = {**COMMON, "nodes": 64, "chunks": 256}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    optimum_s = broadcast_optimum_s(
        parameters.integer("nodes"), parameters.integer("chunks"), parameters.number("chunk_s")
    )
    return run_world(parameters, seed, receivers(parameters, seed), optimum_s)[1]
