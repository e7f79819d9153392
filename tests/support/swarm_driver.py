"""A planner with shorthand for tests that feed it events by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping

from tensorswarm.p2p.swarm.planner import (
    Ask,
    Cancel,
    Drop,
    Planner,
    PlannerLimits,
    SourceKind,
    SourceStatistics,
)
from tensorswarm.p2p.swarm.source import Request
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.swarm_world import MIB, Chunk


class Driver:
    """A planner, what it asked for so far, and the time. Chunks are 1 MiB."""

    def __init__(
        self,
        *chunk_counts: int,
        seed: int = 1,
        sizes: list[int] | None = None,
        proved: Mapping[int, bytes] | None = None,
        priorities: Mapping[int, int] | None = None,
        limits: PlannerLimits | None = None,
    ) -> None:
        self.now = 0.0
        self.planner = Planner(
            sizes if sizes is not None else [count * MIB for count in chunk_counts],
            rng=random.Random(seed),
            proved=proved or {},
            priorities=priorities or {},
            limits=limits,
        )
        self.requests: dict[str, list[Request]] = {}
        self.cancels: list[Cancel] = []
        self.drops: list[Drop] = []

    def join(
        self,
        name: str,
        kind: SourceKind = SourceKind.PEER,
        holds: Mapping[int, str] | None = None,
        distance: int = 0,
    ) -> None:
        """Add a source; per object the chunks it holds as "1" in a string, "*" for all."""
        self.planner.add_source(self.now, name, kind, distance=distance)
        if holds is None:
            self.planner.source_holds_all(self.now, name)
        for index, text in (holds or {}).items():
            bits = (
                int(text[::-1], 2).to_bytes(len(text) // 8 + 1, "little") if text != "*" else None
            )
            self.planner.source_holds(self.now, name, index, bits)

    def act(self) -> list[Request]:
        """Take the planner's actions; return the new requests."""
        new = []
        for action in self.planner.actions(self.now):
            if isinstance(action, Ask):
                new.append(action.request)
                self.requests.setdefault(action.request.source, []).append(action.request)
            elif isinstance(action, Cancel):
                self.cancels.append(action)
            else:
                self.drops.append(action)
        return new

    def prove(self, source: str | None, chunk: Chunk) -> None:
        self.planner.chunk_proved(self.now, source, *chunk, CHUNK_SIZE)

    def answer(self, request: Request) -> None:
        """Give all of a request."""
        for chunk in chunks_of(request):
            self.planner.progress(self.now, request.source, request.request_id, CHUNK_SIZE)
            self.prove(request.source, chunk)
        self.planner.request_done(self.now, request.source, request.request_id)

    def warm_up(self, name: str, rate_chunks_per_s: float) -> None:
        """Let a source give its first requests at a rate, so that its speed is known."""
        for request in self.requests.pop(name):
            for chunk in chunks_of(request):
                self.now += 1 / rate_chunks_per_s
                self.planner.progress(self.now, name, request.request_id, CHUNK_SIZE)
                self.prove(name, chunk)

    def source(self, name: str) -> SourceStatistics:
        return next(s for s in self.planner.statistics().sources if s.source == name)


def chunks_of(*requests: Request) -> list[Chunk]:
    return [
        (span.object_index, chunk)
        for request in requests
        for span in request.spans
        for chunk in range(span.first_chunk, span.first_chunk + span.count)
    ]
