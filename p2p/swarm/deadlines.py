"""Which sources are overdue: silent, or too slow for others to wait for.

Silence is counted from the last byte of a source's oldest request, because a source
answers in order; a request behind it has not begun. Slowness is counted from the last
chunk that was answered. Plain functions; no I/O, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tensorswarm.store.digest import CHUNK_SIZE

from .chunk_map import ChunkMap
from .source_state import SourceState
from .types import PlannerLimits


def find_overdue(
    now: float, sources: Mapping[str, SourceState], chunks: ChunkMap, limits: PlannerLimits
) -> tuple[str, str] | None:
    """Return the name of a source to drop, and why; None when all are in time."""
    for name, state in sources.items():
        if not state.requests:
            continue
        if now >= _silent_at(state, limits):
            return name, f"sent nothing for {_patience_s(state, limits):g} s"
        if now >= _slow_at(state, limits) and _is_dispensable(state, sources, chunks, limits):
            return name, f"took more than {limits.slow_chunk_s:g} s for a chunk"
    return None


def next_check(now: float, sources: Mapping[str, SourceState], limits: PlannerLimits) -> float:
    """Return when to look again, if no request is opened before; infinity for never."""
    check_at = math.inf
    for state in sources.values():
        if state.requests:
            slow_at = _slow_at(state, limits)
            if now >= slow_at:  # slow, but needed; that may change
                slow_at = now + limits.stall_s
            check_at = min(check_at, _silent_at(state, limits), slow_at)
    return check_at


def _patience_s(state: SourceState, limits: PlannerLimits) -> float:
    """Return how long a source may be silent.

    Longer before its first byte when it was silent there before, and always longer
    than it needs to answer at all.
    """
    longest_s = limits.stall_s * (1 << limits.max_stall_doublings)
    doublings = 0 if state.has_spoken else min(state.record.stalls, limits.max_stall_doublings)
    return min(max(limits.stall_s * (1 << doublings), 2 * state.rate.latency_s), longest_s)


def _silent_at(state: SourceState, limits: PlannerLimits) -> float:
    return state.silent_since() + _patience_s(state, limits)


def _slow_at(state: SourceState, limits: PlannerLimits) -> float:
    return state.answered_at + limits.slow_chunk_s


def _is_dispensable(
    state: SourceState,
    sources: Mapping[str, SourceState],
    chunks: ChunkMap,
    limits: PlannerLimits,
) -> bool:
    """Tell whether others hold all that a source holds, one of them being fast enough.

    Where nobody manages a chunk in `slow_chunk_s`, the fault is the line's.
    """
    others = [other for other in sources.values() if other is not state]
    enough = CHUNK_SIZE / limits.slow_chunk_s
    if all((other.rate.bytes_per_s or 0.0) < enough for other in others):
        return False
    if any(other.holds_all for other in others):
        return True
    counted = 1 if state.holds_all else 2
    return not any(
        held & ~chunks.proved[block] & ~chunks.held_by(block, counted)
        for block, held in enumerate(state.held)
    )
