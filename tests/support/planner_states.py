"""The planner's states, told from its tables, and the changes between them.

`chunk_state` and `source_state` say in which state something is; `CHUNKS` and `SOURCES` list
every change there may be, with its reason. `TracedWorld` writes down the changes that really
happen, so that a test can hold both against each other: nothing happens that is not listed,
and everything listed happens. `page` draws the lists for docs/planner-states.md::

    python -m tests.support.planner_states > docs/planner-states.md
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from tensorswarm.p2p.swarm.chunk_map import BLOCK_CHUNKS
from tensorswarm.p2p.swarm.planner import Planner
from tensorswarm.store.digest import chunk_count
from tests.support.swarm_world import SwarmWorld

Key = TypeVar("Key")

Change = tuple[str, str]
"""From one state to another."""

CHUNKS: Mapping[Change, str] = {
    ("unready", "free"): "its object's chunk list is at hand",
    ("unready", "proved"): "it came unasked: an origin that ignores Range sends all of a file",
    ("free", "asked"): "it is chosen for a request",
    ("free", "proved"): "it came unasked",
    ("asked", "asked twice"): "near the end a second source should have it sooner",
    ("asked", "free"): "its request failed or ended without it, or its source has gone",
    ("asked", "proved"): "it came, and matched its hash",
    ("asked twice", "asked"): "one of its two requests failed, ended, or went with its source",
    ("asked twice", "proved"): "it came from one of the two; the other is cancelled",
}
"""Chunks: nothing is done with what is unready; what is proved stays proved."""

SOURCES: Mapping[Change, str] = {
    ("away", "idle"): "it has come",
    ("idle", "asked"): "it gets a request",
    ("idle", "waiting"): "there is nothing for it now; it is looked at again by a set time",
    ("idle", "away"): "it has gone",
    ("waiting", "idle"): "it has something new, a chunk became free, or the time has come",
    ("waiting", "asked"): "the same, and it gets a request",
    ("waiting", "away"): "it has gone",
    ("asked", "idle"): "it has answered all it was asked",
    ("asked", "waiting"): "the same, and there is nothing more for it now",
    ("asked", "away"): "it has gone; what it was asked for is free",
    ("asked", "dropped"): "it was silent or too slow; what it was asked for is free",
    ("asked", "banned"): "it sent wrong bytes: at once if a peer, an origin when it does so often",
    ("dropped", "idle"): "it is tried again after a pause",
}
"""Sources: nobody who is banned comes back in this download."""


def chunk_state(planner: Planner, position: int) -> str:
    """Return the state of a chunk."""
    chunks, block, bit = planner._chunks, *divmod(position, BLOCK_CHUNKS)
    if chunks.is_proved(position):
        return "proved"
    if chunks.unready.get(block, 0) >> bit & 1:
        return "unready"
    if chunks.free[block] >> bit & 1:
        return "free"
    copies = len(planner._flights.by_position.get(position, ()))
    return {1: "asked", 2: "asked twice"}[copies]


def source_state(planner: Planner, name: str) -> str:
    """Return the state of a source."""
    record, state = planner._table.who(name)
    if state is not None:
        if state.requests:
            return "asked"
        return "idle" if state.parked_until is None else "waiting"
    if record is None or record.dropped is None:
        return "away"
    return "banned" if record.is_liar else "dropped"


class TracedWorld(SwarmWorld):
    """A world that notes each change of state."""

    def trace(self) -> tuple[set[Change], set[Change]]:
        """Run to the end; return the changes of chunks and of sources."""
        self.chunk_changes: set[Change] = set()
        self.source_changes: set[Change] = set()
        self._look(is_first=True)
        self.run(until=5000.0)
        return self.chunk_changes, self.source_changes

    def at(self, time: float, event: Callable[[], None]) -> None:
        def seen() -> None:
            event()
            self._look()

        super().at(time, seen)

    def _act(self) -> None:
        super()._act()
        self._look()

    def _look(self, *, is_first: bool = False) -> None:
        every = (self.planner._chunks.position(i, c) for i, c in self._everything())
        chunks = {position: chunk_state(self.planner, position) for position in every}
        sources = {name: source_state(self.planner, name) for name in self.sources}
        if not is_first:
            self.chunk_changes |= _changes(self._chunks_before, chunks)
            self.source_changes |= _changes(self._sources_before, sources)
        self._chunks_before, self._sources_before = chunks, sources

    def _everything(self) -> Iterator[tuple[int, int]]:
        return ((i, c) for i, size in enumerate(self.sizes) for c in range(chunk_count(size)))


def _changes(before: Mapping[Key, str], after: Mapping[Key, str]) -> set[Change]:
    return {(old, after[key]) for key, old in before.items() if after[key] != old}


def page() -> str:
    """Return docs/planner-states.md."""
    lines = [
        "# States of the planner",
        "",
        "Made by `python -m tests.support.planner_states`; do not edit. A test drives random",
        "swarms and checks that these changes happen and no others.",
    ]
    for title, changes in (("A chunk", CHUNKS), ("A source", SOURCES)):
        lines += ["", f"## {title}", "", "```mermaid", "stateDiagram-v2"]
        names = sorted({name for change in changes for name in change if " " in name})
        lines += [f'    state "{name}" as {_word(name)}' for name in names]
        lines += [f"    {_word(old)} --> {_word(new)}" for old, new in changes]
        lines += ["```", "", "| from | to | when |", "|---|---|---|"]
        lines += [f"| {old} | {new} | {reason} |" for (old, new), reason in changes.items()]
    return "\n".join(lines) + "\n"


def _word(name: str) -> str:
    return name.replace(" ", "_")


if __name__ == "__main__":
    sys.stdout.write(page())
