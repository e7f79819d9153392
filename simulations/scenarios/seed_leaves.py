"""The seed leaves after one copy: there is no origin, and one peer with everything.

As soon as its neighbours hold all chunks between them, it goes. If some chunk were rarer
than the others then, the swarm would be left without it.
"""

from __future__ import annotations

import math

from ..measure import broadcast_optimum_s
from ..peer import Nature, SimulatedPeer
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, rate_of, receivers, run_world
from ..world import World

PARAMETERS = {**COMMON, "origin": 0.0}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    seed_peer = Nature(rate_of(parameters), math.inf, has_everything=True)
    natures = [seed_peer, *receivers(parameters, seed)]
    optimum_s = broadcast_optimum_s(
        parameters.integer("nodes"), parameters.integer("chunks"), parameters.number("chunk_s")
    )
    world, outcome = run_world(parameters, seed, natures, optimum_s, watch)
    outcome.summary["seed_copies"] = round(world.peers[0].uplink.sent_bytes / world.size_bytes, 4)
    return outcome


def watch(world: World) -> None:
    """Let the seed go once the others have everything between them."""
    seed_peer: SimulatedPeer = world.peers[0]

    def look() -> None:
        spread = 0
        for peer in world.peers[1:]:
            spread |= peer.has
        if spread == world.everything:
            seed_peer.leave()
        else:
            world.engine.after(0.01, look)

    world.engine.after(0.01, look)
