"""A flash crowd before a weak origin: everybody at once, one tenth of a node's uplink.

The least time is that of the origin giving one copy (Kumar & Ross 2006): all the crowd can
do is not to make it longer.
"""

from __future__ import annotations

from tensorswarm.store.digest import CHUNK_SIZE

from ..measure import distribution_time_s
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, rate_of, receivers, run_world

PARAMETERS = {**COMMON, "nodes": 64, "chunks": 64, "origin": 0.1, "start_s": 5.0}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    rate, nodes = rate_of(parameters), parameters.integer("nodes")
    optimum_s = distribution_time_s(
        parameters.integer("chunks") * CHUNK_SIZE,
        parameters.number("origin") * rate,
        [rate] * nodes,
        float("inf"),
    )
    return run_world(parameters, seed, receivers(parameters, seed), optimum_s)[1]
