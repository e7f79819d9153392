"""Provider records under churn: the share of keys that can be found, over the hours.

Weibull sessions, k copies, expiry after 48 h; with announcing again every 22 h and
without, on the same nodes, keys and churn. `forgets` is the probability that a node that
goes offline loses its records: 1 where it never comes back, 0 where it keeps them on disk.
"""

from __future__ import annotations

import hashlib
import math

from ..provider_records import Churn, Decay, Policy
from ..provider_records import run as simulate
from ..scenario import Curve, Outcome, Parameters, Plot, Row

PARAMETERS = {
    "nodes": 10_000,
    "keys": 2_000,
    "hours": 96.0,
    "step_h": 0.5,
    "shape": 0.38,
    "scale_min": 42.4,
    "online_share": 0.5,
    "forgets": 1.0,
    "k": 20,
    "republish_h": 22.0,
    "expire_h": 48.0,
}


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    churn = Churn(
        parameters.number("shape"),
        parameters.number("scale_min") / 60,
        parameters.number("online_share"),
        parameters.number("forgets"),
    )
    policy = Policy(
        parameters.integer("k"), parameters.number("republish_h"), parameters.number("expire_h")
    )
    again, once = simulate(
        parameters.integer("nodes"),
        seed,
        keys=parameters.integer("keys"),
        hours=parameters.number("hours"),
        step_h=parameters.number("step_h"),
        churn=churn,
        policies=(policy, policy.once()),
    )
    last_before_renewal = math.nextafter(policy.republish_h, 0)
    summary: Row = {
        "nodes": parameters.integer("nodes"),
        "keys": parameters.integer("keys"),
        "k": policy.copies,
        "mean_session_h": churn.mean_session_h,
        "findable_before_republish": once.at(last_before_renewal),
        "copies_before_republish": float(once.copies[once.hours <= last_before_renewal][-1]),
        "lowest_with_republish": float(again.findable.min()),
        "findable_at_end_with_republish": float(again.findable[-1]),
        "findable_at_end_without": float(once.findable[-1]),
        "trace_digest": hashlib.sha256((again.digest() + once.digest()).encode()).hexdigest(),
    }
    return Outcome(
        summary, {"decay": _rows(again, once)}, _plots(again, once), _failures(again, once, policy)
    )


def _rows(again: Decay, once: Decay) -> list[Row]:
    return [
        {
            "hour": float(hour),
            "findable_with_republish": float(again.findable[index]),
            "findable_without": float(once.findable[index]),
            "copies_with_republish": float(again.copies[index]),
            "copies_without": float(once.copies[index]),
        }
        for index, hour in enumerate(again.hours)
    ]


def _plots(again: Decay, once: Decay) -> list[Plot]:
    def curve(label: str, decay: Decay, values: str) -> Curve:
        heights = getattr(decay, values)
        return Curve(
            label, [(float(x), float(y)) for x, y in zip(decay.hours, heights, strict=True)]
        )

    return [
        Plot(
            name,
            title,
            "hours since the first announcement",
            label,
            [curve("announced again", again, values), curve("announced once", once, values)],
        )
        for name, title, label, values in (
            ("findable", "Keys that can be found", "share of keys", "findable"),
            ("copies", "Records that a look-up meets", "records", "copies"),
        )
    ]


def _failures(again: Decay, once: Decay, policy: Policy) -> list[str]:
    """Hold the run against what must be so whatever the churn."""
    failures = []
    if (again.findable < once.findable).any():
        failures.append("a key was found that announcing again had made unfindable")
    if once.findable[once.hours >= policy.expire_h].any():
        failures.append("a record was found after it had expired")
    if again.findable[0] < again.announced:
        failures.append("a key that was just announced was not found")
    return failures
