"""Churn: most nodes come and go, with sessions of a heavy tail.

Sessions last as a Weibull distribution of shape 0.5 says (Stutzbach & Rejaie 2006 measured
0.34 to 0.59); whoever leaves goes without a word. Those who stay must all finish.
"""

from __future__ import annotations

import math
import random

from ..measure import broadcast_optimum_s
from ..peer import Nature
from ..scenario import Outcome, Parameters
from ..swarms import COMMON, check_size, rate_of, receivers, run_world

PARAMETERS = {**COMMON, "passing": 48, "session_s": 4.0, "shape": 0.5, "span_s": 20.0}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    rng = random.Random(f"{seed}/churn")
    rate = rate_of(parameters)
    natures = receivers(parameters, seed)
    check_size(len(natures) + parameters.integer("passing"), parameters.integer("chunks"))
    shape = parameters.number("shape", least=0.1)  # a session could be endless below
    for _ in range(parameters.integer("passing")):
        at = rng.random() * parameters.number("span_s")
        session_s = rng.weibullvariate(parameters.number("session_s"), shape)
        natures.append(Nature(rate, math.inf, starts_at=at, leaves_at=at + session_s))
    optimum_s = broadcast_optimum_s(
        parameters.integer("nodes"), parameters.integer("chunks"), parameters.number("chunk_s")
    )
    return run_world(parameters, seed, natures, optimum_s)[1]
