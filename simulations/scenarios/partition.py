"""A partition in the middle of a download, healed later.

From `parts_at_s` to `heals_at_s` the network falls into two halves that cannot reach each
other; both still reach the origin. Each half finds out by itself who is on origin duty.
"""

from __future__ import annotations

from ..measure import broadcast_optimum_s
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, receivers, run_world
from ..world import World

PARAMETERS = {**COMMON, "parts_at_s": 3.0, "heals_at_s": 8.0}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""

    def prepare(world: World) -> None:
        world.engine.at(
            parameters.number("parts_at_s"), lambda: world.part(lambda peer: peer.index % 2)
        )
        world.engine.at(parameters.number("heals_at_s"), lambda: world.part(lambda peer: 0))

    optimum_s = broadcast_optimum_s(
        parameters.integer("nodes"), parameters.integer("chunks"), parameters.number("chunk_s")
    )
    return run_world(parameters, seed, receivers(parameters, seed), optimum_s, prepare)[1]
