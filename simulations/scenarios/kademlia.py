"""Kademlia: how many nodes a look-up asks, in networks of up to a million nodes.

Ideal routing tables, one query at a time; 1,000 to `nodes` nodes in powers of ten, for
k = 1, 8, 20 and the given `k`. Where an independent simulation has published the mean,
it stands beside it, and a run of 5,000 look-ups and more fails if it differs by over 5 %.
"""

from __future__ import annotations

import hashlib

from ..kademlia import Lookups, run_many, sizes_up_to
from ..scenario import Curve, Outcome, Parameters, Plot, Row

PARAMETERS = {"nodes": 1_000_000, "k": 20, "lookups": 10_000}

COMPARED_K = (1, 8, 20)

TOLERANCE = 0.05
"""How far from the published mean a mean may be."""

ENOUGH_LOOKUPS = 5_000
"""With as many, chance alone moves a mean by less than half a per cent."""


def run(parameters: Parameters, seed: int) -> Outcome:
    """Run it once."""
    nodes, k = parameters.integer("nodes"), parameters.integer("k")
    lookups = parameters.integer("lookups")
    bucket_sizes = sorted({*COMPARED_K, k})
    found = [
        each
        for size in sizes_up_to(nodes)
        for each in run_many(size, seed, bucket_sizes=bucket_sizes, lookups=lookups)
    ]
    main = next(each for each in found if (each.nodes, each.bucket_size) == (nodes, k))
    summary: Row = {
        "nodes": nodes,
        "k": k,
        "lookups": lookups,
        "mean_hops": main.mean,
        "published_hops": main.published,
        "mean_hops_to_closest": main.mean_to_closest,
        "max_hops": int(main.hops_to_closest.max()),
        "worst_deviation": max((abs(_deviation(each) or 0) for each in found), default=0.0),
        "trace_digest": hashlib.sha256("".join(e.digest() for e in found).encode()).hexdigest(),
    }
    return Outcome(
        summary,
        {"hops": [_row(each) for each in found], "distribution": _distribution(main)},
        [_plot(found, bucket_sizes)],
        _failures(found, lookups),
    )


def _deviation(found: Lookups) -> float | None:
    return None if found.published is None else found.mean / found.published - 1


def _row(found: Lookups) -> Row:
    return {
        "nodes": found.nodes,
        "k": found.bucket_size,
        "mean_hops": found.mean,
        "standard_error": found.standard_error,
        "published_hops": found.published,
        "deviation": _deviation(found),
        "mean_hops_to_closest": found.mean_to_closest,
    }


def _distribution(found: Lookups) -> list[Row]:
    return [{"hops": hops, "share": share} for hops, share in enumerate(found.share_by_hops())]


def _failures(found: list[Lookups], lookups: int) -> list[str]:
    if lookups < ENOUGH_LOOKUPS:
        return []
    return [
        f"{each.nodes} nodes, k = {each.bucket_size}: {each.mean:.3f} hops, published"
        f" {each.published}"
        for each in found
        if abs(_deviation(each) or 0) > TOLERANCE
    ]


def _plot(found: list[Lookups], bucket_sizes: list[int]) -> Plot:
    curves = []
    for k in bucket_sizes:
        of_k = [each for each in found if each.bucket_size == k]
        curves.append(Curve(f"k = {k}", [(each.nodes, each.mean) for each in of_k]))
        published = [(e.nodes, e.published) for e in of_k if e.published is not None]
        if published:
            curves.append(Curve(f"k = {k}, published", published, is_dashed=True))
    return Plot("hops", "Hops of a look-up", "nodes", "mean hops", curves, is_log_x=True)
