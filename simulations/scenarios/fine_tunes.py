"""Cross-model swarms: fine-tunes of one base arrive over a day, each wanted by some nodes.

A share of each model's tensors is the base's. In a tensor-keyed swarm whoever has the base
serves it to those who want a fine-tune; in a file-keyed one (BitTorrent, or any hash of
whole files) each model is a swarm of its own. The table shows what both take.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tensorswarm.store.digest import CHUNK_SIZE

from ..peer import Nature
from ..scenario import Curve, Outcome, Parameters, Plot, Row
from ..swarms import COMMON, check_size, rate_of, run_world
from ..world import World

PARAMETERS = {
    **COMMON,
    "nodes": 40,
    "chunks": 64,
    "models": 8,
    "shared": 0.75,
    "day_s": 60.0,
    "stays_s": 30.0,
}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run the day twice: keyed by tensor, and keyed by file."""
    rng = random.Random(f"{seed}/fine-tunes")
    models, size = parameters.integer("models"), parameters.integer("chunks")
    base = round(size * parameters.number("shared", most=1.0))
    choices = [rng.randrange(models) for _ in range(parameters.integer("nodes"))]
    times = sorted(rng.random() * parameters.number("day_s") for _ in choices)
    rows: list[Row] = []
    curves: list[Curve] = []
    failures: list[str] = []
    first: Outcome | None = None
    for label, common in (("by tensor", base), ("by file", 0)):
        own = size - common
        check_size(len(choices), common + models * own)
        natures = [
            Nature(
                rate_of(parameters), math.inf, starts_at=at,
                stays_s=parameters.number("stays_s"),
                wants=(1 << common) - 1 | (1 << own) - 1 << common + model * own,
            )
            for at, model in zip(times, choices, strict=True)
        ]  # fmt: skip
        keyed = parameters.but(chunks=common + models * own)
        world, outcome = run_world(keyed, seed, natures, parameters.number("day_s"))
        first = first or outcome
        rows.append({"keyed": label, **_figures(world, size, models)})
        curves.append(Curve(label, _origin_curve(world)))
        failures += [f"{label}: {failure}" for failure in outcome.failures]
    assert first is not None
    plot = Plot(
        "fine_tunes",
        "Downloads over the day",
        "time in s",
        "nodes finished",
        curves,
        is_stepped=True,
    )
    return Outcome(first.summary, {"fine_tunes": rows}, [plot], failures)


def _figures(world: World, size: int, models: int) -> Row:
    times = [(peer.finished_at or math.inf) - peer.nature.starts_at for peer in world.finishers]
    assert world.origin is not None
    return {
        "origin_models": round(world.origin.sent_bytes / (size * CHUNK_SIZE), 3),
        "distinct_models": round(world.setup.chunks / size, 3),
        "mean_download_s": round(sum(times) / len(times), 3),
        "longest_download_s": round(max(times), 3),
        "wanted": models,
    }


def _origin_curve(world: World) -> Sequence[tuple[float, float]]:
    times = sorted(peer.finished_at or math.inf for peer in world.finishers)
    return [(0.0, 0.0), *((time, i + 1.0) for i, time in enumerate(times))]
