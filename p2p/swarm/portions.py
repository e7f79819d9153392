"""How much one request to a source may hold while nobody else downloads the same.

A second of work at its speed, in at least two requests so that its pipe never runs dry;
near the end its share of what is left, so that all sources are done together.

No I/O, no clock.
"""

from __future__ import annotations

from tensorswarm.store.digest import CHUNK_SIZE

from .source_state import SourceState
from .types import PlannerLimits


def room_bytes(
    state: SourceState, free_bytes: int, total_rate: float, limits: PlannerLimits
) -> int:
    """Return how many bytes the next request to a source may hold; 0 for no request.

    Parameters
    ----------
    state : SourceState
        The source.
    free_bytes : int
        Bytes that nobody has been asked for yet.
    total_rate : float
        Bytes per second of all sources together.
    limits : PlannerLimits
        The numbers.
    """
    count = len(state.requests)
    rate = state.rate.bytes_per_s
    if rate is None:
        return CHUNK_SIZE if count < limits.min_requests_per_source else 0
    target_bytes = rate * limits.queue_s
    if count >= limits.max_requests_per_source:
        return 0
    if count >= limits.min_requests_per_source and state.queued_bytes >= target_bytes:
        return 0
    size_bytes = int(target_bytes / limits.min_requests_per_source)
    if free_bytes:
        size_bytes = min(size_bytes, int(rate / max(rate, total_rate) * free_bytes))
    return max(CHUNK_SIZE, min(size_bytes, limits.max_request_chunks * CHUNK_SIZE))
