"""Steady arrivals: nodes come one after the other and stay a while, against the fluid model.

In the steady state a download takes `T = max(1/c, (1/η)(1/μ − 1/γ))` (Qiu & Srikant 2004),
with files per second of uplink μ and downlink c, seeds leaving at the rate γ, and the
effectiveness η taken as 1. One seed is there all the time, and the model knows of none.
"""

from __future__ import annotations

import math
import random

from ..peer import Nature
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, check_size, rate_of, run_world

PARAMETERS = {
    **COMMON,
    "nodes": 120,
    "chunks": 64,
    "origin": 0.0,
    "every_s": 0.5,
    "stays_s": 2.0,
    "downlink": 4.0,
}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    check_size(parameters.integer("nodes"), parameters.integer("chunks"))
    rng = random.Random(f"{seed}/arrivals")
    rate = rate_of(parameters)
    stays_s = parameters.number("stays_s")
    downlink = parameters.number("downlink") * rate
    natures = [Nature(rate, math.inf, has_everything=True)]
    at = 0.0
    for _ in range(parameters.integer("nodes")):
        at += rng.expovariate(1 / parameters.number("every_s"))
        stay_s = rng.expovariate(1 / stays_s) if stays_s else 0.0
        natures.append(Nature(rate, downlink, starts_at=at, stays_s=stay_s))
    file_s = parameters.integer("chunks") * parameters.number("chunk_s")
    model_s = max(file_s / parameters.number("downlink"), file_s - stays_s)
    world, outcome = run_world(parameters, seed, natures, model_s, bound="")
    later = world.finishers[len(world.finishers) // 3 :]  # the first ones meet an empty swarm
    times = [(peer.finished_at or math.inf) - peer.nature.starts_at for peer in later]
    mean_s = sum(times) / len(times)
    outcome.summary |= {
        "model_s": round(model_s, 4),
        "mean_download_s": round(mean_s, 4),
        "ratio": round(mean_s / model_s, 4),
    }
    return outcome
