"""Broadcast: an origin and N receivers with equal uplinks, against the optimum.

All receivers start within `start_s`, and nobody but a limited origin has anything. The
optimum is `M + floor(log2 N)` rounds of one chunk each (Mundinger, Weber, Weiss 2008).
"""

from __future__ import annotations

from tensorswarm.p2p.swarm import PlannerLimits
from tensorswarm.store.digest import CHUNK_SIZE

from ..measure import broadcast_optimum_s, finish_curve, summary
from ..peer import Nature
from ..scenario import Outcome, Parameters, Plot
from ..world import Setup, World

PARAMETERS = {
    "nodes": 64,
    "chunks": 256,
    "chunk_s": 0.1,
    "latency_s": 0.02,
    "start_s": 0.1,
    "slots": 1,
    "ahead": 1,
    "offers": True,
    "shared_duty": True,
    "rarest_first": True,
    "duty_members": 4,
    "random_first": 4,
    "requests": 1,
    "dials": 6,
}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    world = build(parameters, seed)
    world.run()
    nodes, chunks = parameters.integer("nodes"), parameters.integer("chunks")
    optimum_s = broadcast_optimum_s(nodes, chunks, parameters.number("chunk_s"))
    plot = Plot(
        "finished",
        "Receivers that have everything",
        "time in s",
        "receivers",
        [finish_curve(world, "simulated")],
    )
    return Outcome(summary(world, optimum_s), plots=[plot], failures=world.checker.failures)


def build(parameters: Parameters, seed: int) -> World:
    """Return the world, ready to run."""
    import random

    from tensorswarm.p2p.membership import MembershipLimits

    nodes, chunks = parameters.integer("nodes"), parameters.integer("chunks")
    rate = CHUNK_SIZE / parameters.number("chunk_s")
    rng = random.Random(f"{seed}/broadcast")
    natures = [
        Nature(rate, float("inf"), starts_at=rng.random() * parameters.number("start_s"))
        for _ in range(nodes)
    ]
    limits = PlannerLimits(
        random_first_chunks=parameters.integer("random_first")
        if parameters.flag("rarest_first")
        else 1 << 30,
        duty_members=parameters.integer("duty_members"),
        crowd_requests=parameters.integer("requests"),
    )
    dials = parameters.integer("dials")
    setup = Setup(
        chunks,
        latency_s=parameters.number("latency_s"),
        origin_bytes_per_s=rate,
        slots=parameters.integer("slots"),
        ahead=parameters.integer("ahead"),
        makes_offers=parameters.flag("offers"),
        is_duty_shared=parameters.flag("shared_duty"),
        limits=limits,
        membership=MembershipLimits(dials=dials, max_neighbours=dials * 5 // 2),
    )
    return World(setup, natures, seed)
