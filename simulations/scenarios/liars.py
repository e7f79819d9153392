"""Liars: a share of the peers claims to have everything and sends wrong bytes.

Every honest node finishes, every liar met is banned by whoever it lied to, and no honest
one is. With `sweep` the share goes from 0 to 60 %; the ratio is to the time without liars.
With `seeds` it is run for so many seeds, and the summary is of the slowest.
"""

from __future__ import annotations

import math

from tensorswarm.store.errors import BadInput

from ..peer import Nature
from ..scenario import Curve, Outcome, Parameters, Plot, Row
from ..swarms import COMMON, check_size, rate_of, run_world, starts

PARAMETERS = {**COMMON, "nodes": 24, "chunks": 64, "share": 0.3, "sweep": False, "seeds": 1}

SWEEP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run without liars, and with them, once for each seed."""
    outcomes = [run_one(parameters, seed + i) for i in range(parameters.integer("seeds"))]
    worst = max(outcomes, key=lambda outcome: float(str(outcome.summary["ratio"])))
    if len(outcomes) > 1:
        rows = [{"seed": seed + i, **each.tables["liars"][-1]} for i, each in enumerate(outcomes)]
        worst.tables = {"liars": rows}
        worst.failures = [
            f"seed {seed + i}: {text}" for i, each in enumerate(outcomes) for text in each.failures
        ]
    return worst


def run_one(parameters: Parameters, seed: int) -> Outcome:
    """Run without liars, and with them."""
    share = parameters.number("share")
    rows: list[Row] = []
    failures: list[str] = []
    plain_s = 0.0
    outcome = Outcome({})
    for each in SWEEP if parameters.flag("sweep") else (0.0, share):
        natures = crowd(parameters, seed, each)
        world, outcome = run_world(parameters, seed, natures, plain_s or 1.0, bound="")
        last_s = max(peer.finished_at or math.inf for peer in world.finishers)
        plain_s = plain_s or last_s
        met = {name for peer in world.peers for name in peer.lied_to_by}
        tick_s = world.setup.tick_s  # after it the planner acts, unless all is here by then
        unbanned = {
            name
            for peer in world.finishers
            for name, at in peer.lied_to_by.items()
            if name not in peer.banned and at + tick_s < (peer.finished_at or math.inf)
        }
        failures += [f"share {each}: {failure}" for failure in outcome.failures]
        failures += [f"share {each}: {name} lied and was not banned" for name in sorted(unbanned)]
        rows.append(
            {
                "share": each,
                "last_s": round(last_s, 6),
                "ratio": round(last_s / plain_s, 4),
                "liars_met": len(met),
                "bans": world.checker.bans,
                "wasted_bytes": outcome.summary["wasted_bytes"],
            }
        )
    points = [(100.0 * float(str(row["share"])), float(str(row["ratio"]))) for row in rows]
    plot = Plot(
        "liars",
        "Time of the last honest node, with liars",
        "liars in %",
        "time / time without liars",
        [Curve("simulated", points)],
    )
    outcome.summary["ratio"] = rows[-1]["ratio"]
    return Outcome(outcome.summary, {"liars": rows}, [*outcome.plots, plot], failures)


def crowd(parameters: Parameters, seed: int, share: float) -> list[Nature]:
    """Return the honest nodes, as many whatever the share, and the liars besides."""
    rate, times = rate_of(parameters), starts(parameters, seed)
    honest = [Nature(rate, math.inf, starts_at=at) for at in times]
    if not 0 <= share < 1:
        raise BadInput("share: from 0 to below 1, for somebody has to be honest")
    count = round(len(honest) * share / (1 - share))
    check_size(len(honest) + count, parameters.integer("chunks"))
    return honest + [
        Nature(rate, math.inf, starts_at=times[i % len(times)], is_liar=True) for i in range(count)
    ]
