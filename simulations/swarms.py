"""What the scenarios of a swarm have in common: their parameters, and how they are run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from tensorswarm.p2p.swarm.membership import MembershipLimits
from tensorswarm.p2p.swarm.planner import PlannerLimits
from tensorswarm.store.digest import CHUNK_SIZE

from .measure import finish_curve, summary
from .peer import Nature
from .scenario import Outcome, Parameters, Plot, Value
from .world import Setup, World

COMMON: dict[str, Value] = {
    "nodes": 32,
    "chunks": 128,
    "chunk_s": 0.1,
    "latency_s": 0.02,
    "start_s": 0.1,
    "origin": 1.0,
    "slots": 1,
    "ahead": 1,
    "offers": True,
    "shared_duty": True,
    "rarest_first": True,
    "duty_members": 4,
    "random_first": 4,
    "dials": 6,
}
"""Parameters of every swarm. `chunk_s` is what an uplink takes for a chunk, `origin` the
origin's uplink in uplinks of a node, `start_s` the time within which the nodes start;
`slots`, `ahead` and `offers` are how nodes serve; the rest are rules of the planner."""


def rate_of(parameters: Parameters) -> float:
    """Return a node's uplink in bytes per second."""
    return CHUNK_SIZE / parameters.number("chunk_s")


def setup_of(parameters: Parameters) -> Setup:
    """Return the swarm that the parameters describe."""
    dials = parameters.integer("dials")
    is_by_rarity = parameters.flag("rarest_first")
    return Setup(
        parameters.integer("chunks"),
        latency_s=parameters.number("latency_s"),
        origin_bytes_per_s=parameters.number("origin") * rate_of(parameters),
        slots=parameters.integer("slots"),
        ahead=parameters.integer("ahead"),
        makes_offers=parameters.flag("offers"),
        is_rarest_first=is_by_rarity,
        is_duty_shared=parameters.flag("shared_duty"),
        limits=PlannerLimits(
            random_first_chunks=parameters.integer("random_first") if is_by_rarity else 1 << 30,
            duty_members=parameters.integer("duty_members"),
        ),
        membership=MembershipLimits(
            dials=dials, least_neighbours=dials * 3 // 2, max_neighbours=dials * 5 // 2
        ),
    )


def starts(parameters: Parameters, seed: int) -> list[float]:
    """Return when each node starts: evenly at random within `start_s`."""
    rng = random.Random(f"{seed}/starts")
    spread_s = parameters.number("start_s")
    return [rng.random() * spread_s for _ in range(parameters.integer("nodes"))]


def receivers(parameters: Parameters, seed: int) -> list[Nature]:
    """Return nodes with equal uplinks and free downlinks."""
    rate = rate_of(parameters)
    return [Nature(rate, math.inf, starts_at=at) for at in starts(parameters, seed)]


def run_world(
    parameters: Parameters,
    seed: int,
    natures: Sequence[Nature],
    optimum_s: float,
    prepare: Callable[[World], None] = lambda world: None,
) -> tuple[World, Outcome]:
    """Run a world to its end; return it, with the figures that every swarm gives."""
    world = World(setup_of(parameters), natures, seed)
    prepare(world)
    world.run()
    plot = Plot(
        "finished",
        "Nodes that have everything",
        "time in s",
        "nodes",
        [finish_curve(world, "simulated")],
    )
    outcome = Outcome(
        summary(world, optimum_s), plots=[plot], failures=list(world.checker.failures)
    )
    return world, outcome
