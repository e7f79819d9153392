"""What each rule is worth: the broadcast with one rule at a time switched off.

Rarest-first against random choice, shared origin duty against everybody for himself, and
offered uploads against queues at whoever has a chunk.
"""

from __future__ import annotations

from ..measure import broadcast_optimum_s, finish_curve
from ..scenario import Curve, Outcome, Parameters, Plot
from ..swarms import COMMON, receivers, run_world

PARAMETERS = {**COMMON, "nodes": 32, "chunks": 128}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run the broadcast once for each rule."""
    nodes, chunks = parameters.integer("nodes"), parameters.integer("chunks")
    optimum_s = broadcast_optimum_s(nodes, chunks, parameters.number("chunk_s"))
    variants = {
        "all rules": parameters,
        "random, not rarest first": parameters.but(rarest_first=False),
        "no shared origin duty": parameters.but(shared_duty=False),
        "queues, not offers": parameters.but(offers=False),
    }
    curves, rows, failures = [], [], []
    summary = None
    for label, variant in variants.items():
        world, outcome = run_world(variant, seed, receivers(variant, seed), optimum_s)
        summary = summary or outcome.summary
        columns = ("last_s", "ratio", "origin_copies", "wasted_bytes")
        rows.append({"rules": label, **{name: outcome.summary[name] for name in columns}})
        curves.append(finish_curve(world, label))
        failures += [f"{label}: {failure}" for failure in outcome.failures]
    curves.append(Curve("optimum", [(optimum_s, 0.0), (optimum_s, nodes)], is_dashed=True))
    plot = Plot(
        "rules", "What each rule is worth", "time in s", "nodes finished", curves, is_stepped=True
    )
    return Outcome(summary or {}, {"rules": rows}, [plot], failures)
