"""What the scenarios of a swarm have in common: their parameters, and how they are run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from tensorswarm.p2p.swarm.membership import MembershipLimits
from tensorswarm.p2p.swarm.planner import PlannerLimits
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput

from .measure import finish_curve, summary
from .peer import Nature
from .scenario import MAX_NODE_CHUNKS, Curve, Outcome, Parameters, Plot, Value
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


MAX_SWARM_NODES = 100_000
"""Most nodes of a swarm, those that lie, stall or pass by included: each takes some 100 kB."""


def check_size(nodes: int, chunks: int) -> None:
    """Raise BadInput for a swarm that no machine would get done with."""
    if nodes > MAX_SWARM_NODES:
        raise BadInput(f"{nodes} nodes in a swarm: at most {MAX_SWARM_NODES}")
    if nodes * chunks > MAX_NODE_CHUNKS:
        raise BadInput(f"{nodes} nodes times {chunks} chunks: at most {MAX_NODE_CHUNKS}")


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
    check_size(parameters.integer("nodes"), parameters.integer("chunks"))
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
    *,
    bound: str = "least possible",
) -> tuple[World, Outcome]:
    """Run a world to its end; return it, with the figures that every swarm gives.

    `bound` is what the plot calls `optimum_s`; empty where that is no time of the whole run.
    """
    check_size(len(natures), parameters.integer("chunks"))
    world = World(setup_of(parameters), natures, seed)
    prepare(world)
    world.run()
    curves = [finish_curve(world, "simulated")]
    if bound:
        curves.append(Curve(bound, [(optimum_s, 0), (optimum_s, len(natures))], is_dashed=True))
    plot = Plot(
        "finished", "Nodes that have everything", "time in s", "nodes", curves, is_stepped=True
    )
    outcome = Outcome(
        summary(world, optimum_s), plots=[plot], failures=list(world.checker.failures)
    )
    return world, outcome
