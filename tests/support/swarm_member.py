"""A node that fetches a model at a word, in a process of its own, and counts what it asks.

Its planner is watched: every chunk that it asks of an origin while it knows of others who
want the same is held against what its neighbours had told until then. (The last one, of whom
nobody else wants anything any more, takes from all who have it.) Decisions by the clock are
put off for good (`PATIENT`), so that what is counted does not depend on how fast the machine
is.

Writes lines of JSON: ``{"ready": true}``, then, after a line on standard input,
``{"knows": n}`` once it knows so many others that want the same, and its counts once it has
everything. It gives to the others until the next line comes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from tensorswarm.p2p import download
from tensorswarm.p2p.node import Node
from tensorswarm.p2p.swarm.planner import Action, Ask, Planner, PlannerLimits, SourceKind
from tensorswarm.store.cid import parse_reference
from tensorswarm.store.digest import chunk_count

NEVER_S = 3600.0

PATIENT = replace(
    PlannerLimits(),
    stall_s=NEVER_S,
    slow_chunk_s=NEVER_S,
    duty_patience_s=NEVER_S,
    duty_trial_s=NEVER_S,
)
"""Nobody is given up, and no turn at the origin taken, because time has gone by."""


class WatchedPlanner(Planner):
    """A planner that counts what it asks of origins though a neighbour had told of it."""

    asked_origin = 0
    asked_though_told = 0
    latest: WatchedPlanner

    def __init__(self, sizes_bytes: Any, **options: Any) -> None:
        super().__init__(sizes_bytes, **{**options, "limits": PATIENT})
        self._counts = [chunk_count(size) for size in sizes_bytes]
        self._told: dict[str, set[tuple[int, int]]] = {}
        self._is_peer: dict[str, bool] = {}
        self._others: frozenset[str] = frozenset()
        WatchedPlanner.latest = self

    def add_source(self, now: float, source: str, kind: SourceKind, **options: Any) -> None:
        self._is_peer[source] = kind is SourceKind.PEER
        self._told.setdefault(source, set())
        super().add_source(now, source, kind, **options)

    def set_members(self, now: float, key: bytes, me: str, others: Collection[str]) -> None:
        self._others = frozenset(others)
        super().set_members(now, key, me, others)

    def remove_source(self, now: float, source: str) -> None:
        self._told.pop(source, None)
        super().remove_source(now, source)

    def source_holds(
        self, now: float, source: str, object_index: int, bitmap: bytes | None
    ) -> None:
        if bitmap is None:
            self._note(source, [object_index])
        else:
            bits = int.from_bytes(bitmap, "little")
            chunks = range(self._counts[object_index])
            self._told[source] |= {(object_index, each) for each in chunks if bits >> each & 1}
        super().source_holds(now, source, object_index, bitmap)

    def source_holds_whole(self, now: float, source: str, object_indices: Iterable[int]) -> None:
        indices = list(object_indices)
        self._note(source, indices)
        super().source_holds_whole(now, source, indices)

    def source_holds_all(self, now: float, source: str) -> None:
        self._note(source, range(len(self._counts)))
        super().source_holds_all(now, source)

    def _note(self, source: str, indices: Iterable[int]) -> None:
        self._told[source] |= {(i, chunk) for i in indices for chunk in range(self._counts[i])}

    def actions(self, now: float) -> list[Action]:
        actions = super().actions(now)
        told = {place for name, held in self._told.items() if self._is_peer[name] for place in held}
        for action in actions:
            if isinstance(action, Ask) and not self._is_peer[action.request.source]:
                for span in action.request.spans:
                    for chunk in range(span.first_chunk, span.first_chunk + span.count):
                        self.asked_origin += 1
                        is_told = (span.object_index, chunk) in told
                        self.asked_though_told += is_told and bool(self._others)
        return actions


def say(**words: object) -> None:
    """Write a line for the test."""
    print(json.dumps(words), flush=True)


async def main(store: str, model: str, bootstrap: str, origin: str, others: int) -> None:
    """Be one member."""
    digest = parse_reference(model).digest
    async with Node(Path(store), listen=["127.0.0.1:0"], bootstrap=[bootstrap]) as node:
        has_said = False

        def look(_peer_id: str) -> None:
            nonlocal has_said
            known = len(node.neighbours.wanting(digest))
            if known >= others and not has_said:
                has_said = True
                say(knows=known)

        node.neighbours.want_listeners.append(look)
        await node.meet_bootstrap(60.0)
        say(ready=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        result = await node.fetch(model, origins=[origin])
        watched = WatchedPlanner.latest
        say(
            bytes_total=result.bytes_total,
            bytes_origin=result.bytes_origin,
            dropped=[source.id for source in result.sources if source.dropped],
            asked_origin=watched.asked_origin,
            asked_though_told=watched.asked_though_told,
        )
        await trio.to_thread.run_sync(sys.stdin.readline)


if __name__ == "__main__":
    download.Planner = WatchedPlanner  # type: ignore[misc]
    trio.run(main, *sys.argv[1:5], int(sys.argv[5]))
