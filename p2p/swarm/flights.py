"""What is in flight: which request of which source covers which chunk.

Pure bookkeeping for the planner. A request is open from `open` until every chunk of it
was answered, or it is closed; what comes for it afterwards is news of nobody. A chunk
is covered by one request, or by two near the end of a download.
"""

from __future__ import annotations

from collections.abc import Mapping

from .chunk_map import ChunkMap
from .picker import Draft
from .source import Request
from .source_state import OpenRequest, SourceState


class Flights:
    """The open requests of all sources.

    Attributes
    ----------
    by_position : dict of int to tuple of OpenRequest
        Who is to bring the chunk at a position.
    total_rate : float
        Sum of the speeds of the sources that have work, in bytes per second.
    """

    def __init__(self, chunks: ChunkMap) -> None:
        self.by_position: dict[int, tuple[OpenRequest, ...]] = {}
        self.total_rate = 0.0
        self._chunks = chunks
        self._last_id = 0

    def open(self, now: float, source: SourceState, draft: Draft) -> Request:
        """Ask a source for what a draft names."""
        self._last_id += 1
        request = OpenRequest(source, self._last_id, draft.positions, draft.size_bytes, now)
        if not source.requests:
            source.rate.begin(now)
            source.head_since = source.answered_at = now
        source.requests[request.request_id] = request
        source.queued_bytes += draft.size_bytes
        alone = (request,)
        if self.by_position.keys().isdisjoint(draft.positions):
            self.by_position.update(dict.fromkeys(draft.positions, alone))
        else:
            for position in draft.positions:
                self.by_position[position] = self.by_position.get(position, ()) + alone
        self._count_rate(source)
        return Request(source.name, request.request_id, tuple(draft.spans))

    def note_bytes(self, now: float, source: SourceState, byte_count: int) -> None:
        """Count bytes that arrived from a source, for whatever request."""
        source.has_spoken = True
        source.rate.note(now, byte_count)
        self._count_rate(source)

    def advance(self, now: float, request: OpenRequest, byte_count: int) -> None:
        """Count bytes that arrived for an open request."""
        request.active_at = now
        arrived = min(byte_count, request.pending_bytes)
        request.pending_bytes -= arrived
        request.source.queued_bytes -= arrived
        self.note_bytes(now, request.source, byte_count)

    def prove(
        self, now: float, proved: Mapping[int, int], giver: SourceState | None
    ) -> list[OpenRequest]:
        """Note chunks as proved; return the requests that were to bring them, each once.

        `proved` are their positions and sizes in bytes.
        """
        touched: dict[OpenRequest, None] = {}
        for position, size in proved.items():
            for request in self.by_position.pop(position, ()):
                del request.left[position]
                touched[request] = None
                if request.source is giver:
                    request.answered_bytes += size
                else:
                    request.skipped[position] = None
        for request in touched:
            if request.source is giver:
                self._credit(now, request)
        return list(touched)

    def answer_in_vain(
        self, now: float, source: SourceState, position: int
    ) -> tuple[OpenRequest | None, bool]:
        """Note a chunk that came and was of no use.

        Returns
        -------
        request : OpenRequest or None
            The one that asked for it.
        is_uncovered : bool
            Whether the chunk was still expected of it, and of nobody else.
        """
        for request in source.requests.values():
            if position in request.left:
                del request.left[position]
                is_uncovered = self._uncover(request, position)
                self._answer(now, request, position)
                return request, is_uncovered
            if position in request.skipped:
                del request.skipped[position]
                self._answer(now, request, position)
                return request, False
        return None, False

    def close(self, now: float, request: OpenRequest) -> list[int]:
        """Forget a request; return the positions that nobody is to bring now."""
        source = request.source
        del source.requests[request.request_id]
        source.queued_bytes -= request.pending_bytes
        source.head_since = now
        source.took_s = now - request.asked_at
        if not source.requests:
            source.rate.end(now)
        self._count_rate(source)
        return [position for position in request.left if self._uncover(request, position)]

    def _uncover(self, request: OpenRequest, position: int) -> bool:
        others = tuple(other for other in self.by_position[position] if other is not request)
        if others:
            self.by_position[position] = others
            return False
        del self.by_position[position]
        return True

    def _answer(self, now: float, request: OpenRequest, position: int) -> None:
        """Credit a chunk; its bytes may have been reported as progress, or not."""
        request.answered_bytes += self._chunks.size_at(position)
        self._credit(now, request)

    def _credit(self, now: float, request: OpenRequest) -> None:
        """Take what a request was answered into account."""
        source = request.source
        source.answered_at = now
        unreported = request.answered_bytes - (request.size_bytes - request.pending_bytes)
        if unreported > 0:
            self.advance(now, request, unreported)
        source.rate.note_chunk(now)
        self._count_rate(source)

    def _count_rate(self, source: SourceState) -> None:
        """Keep the sum of speeds; a source without work counts as 0."""
        rate = (source.rate.bytes_per_s or 0.0) if source.requests else 0.0
        self.total_rate = max(0.0, self.total_rate + rate - source.counted_rate)
        source.counted_rate = rate
