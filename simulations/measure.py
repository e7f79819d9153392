"""Figures of a run, and the theory they are held against."""

from __future__ import annotations

from collections.abc import Sequence

from tensorswarm.store.digest import CHUNK_SIZE

from .scenario import Curve, Row
from .world import World


def broadcast_optimum_s(nodes: int, chunks: int, chunk_s: float) -> float:
    """Return the least time in which one source can give all chunks to all receivers.

    For equal uplinks that take `chunk_s` a chunk: `M + floor(log2 N)` rounds (Mundinger,
    Weber, Weiss 2008, theorem 1), without latency.
    """
    return (chunks + nodes.bit_length() - 1) * chunk_s


def distribution_time_s(
    size_bytes: float, source: float, uplinks: Sequence[float], slowest_downlink: float
) -> float:
    """Return the least time to give a file to all receivers (Kumar & Ross 2006, theorem 1).

    Rates are in bytes per second: of the source, of each receiver's uplink, and of the
    slowest downlink.
    """
    total = source + sum(uplinks)
    return max(
        size_bytes / source, size_bytes / slowest_downlink, len(uplinks) * size_bytes / total
    )


def summary(world: World, optimum_s: float) -> Row:
    """Return the figures that every scenario of a swarm gives."""
    finishers = world.finishers
    times = sorted(peer.finished_at or float("inf") for peer in finishers)
    last_s = times[-1] if times else 0.0
    origin_bytes = world.origin.sent_bytes if world.origin is not None else 0
    return {
        "nodes": len(world.peers),
        "chunks": world.setup.chunks,
        "optimum_s": round(optimum_s, 6),
        "last_s": round(last_s, 6),
        "ratio": round(last_s / optimum_s, 4),
        "median_s": round(times[len(times) // 2], 6) if times else 0.0,
        "origin_copies": round(origin_bytes / (world.setup.chunks * CHUNK_SIZE), 4),
        "wasted_bytes": sum(peer.wasted_bytes for peer in world.peers),
        "bans": world.checker.bans,
        "stalls": world.checker.stalls,
        "needless_origin_asks": world.checker.needless_origin_asks,
        "events": world.engine.event_count,
        "trace_digest": world.trace.digest(),
    }


def finish_curve(world: World, label: str) -> Curve:
    """Return how many nodes have finished, over time."""
    times = sorted(peer.finished_at for peer in world.peers if peer.finished_at is not None)
    return Curve(label, [(0.0, 0.0), *((time, i + 1.0) for i, time in enumerate(times))])
