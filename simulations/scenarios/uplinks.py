"""Heterogeneous uplinks: slow, middling and fast nodes, against the bound of Kumar & Ross.

A quarter of the nodes has a quarter of the usual uplink, a quarter four times as much; all
have a limited downlink, and rates are max-min fair.
"""

from __future__ import annotations

from tensorswarm.store.digest import CHUNK_SIZE

from ..measure import distribution_time_s
from ..peer import Nature
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, rate_of, run_world, starts

PARAMETERS = {**COMMON, "nodes": 24, "chunks": 96, "origin": 4.0, "downlink": 4.0}

SHARES = (0.25, 1.0, 1.0, 4.0)
"""Uplinks of every four nodes in a row, in usual ones."""


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    rate = rate_of(parameters)
    downlink = parameters.number("downlink") * rate
    uplinks = [SHARES[i % len(SHARES)] * rate for i in range(parameters.integer("nodes"))]
    natures = [
        Nature(uplink, downlink, starts_at=at)
        for uplink, at in zip(uplinks, starts(parameters, seed), strict=True)
    ]
    optimum_s = distribution_time_s(
        parameters.integer("chunks") * CHUNK_SIZE,
        parameters.number("origin") * rate,
        uplinks,
        downlink,
    )
    return run_world(parameters, seed, natures, optimum_s)[1]
