"""The page of the planner's states says what happens: no change is missing, none made up."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from pathlib import Path

from tensorswarm.p2p.swarm.planner import Planner, PlannerLimits, SourceKind
from tests.support.planner_states import CHUNKS, SOURCES, Change, TracedWorld, chunk_state, page
from tests.support.swarm_world import MIB, SimulatedSource

PAGE = Path(__file__).resolve().parents[2] / "docs" / "planner-states.md"
WORLDS = 200


def random_world(seed: int) -> TracedWorld:
    rng = random.Random(seed)
    count = rng.randint(3, 25)
    chunks = [(0, chunk) for chunk in range(count)]

    def source(name: str) -> SimulatedSource:
        stalls_at = rng.choice([math.inf, math.inf, rng.uniform(0.0, 5.0)])
        half = frozenset(chunk for _, chunk in chunks if rng.random() < 0.5)
        return SimulatedSource(
            name,
            rng.choice([0.3, 1.0, 5.0, 20.0]) * MIB,
            latency_s=rng.uniform(0.0, 0.5),
            kind=rng.choice(list(SourceKind)),
            distance=rng.randint(0, 2),
            holds=rng.choice([None, {0: half}]),
            lies=frozenset(each for each in chunks if rng.random() < rng.choice([0.0, 0.0, 0.2])),
            joins_at=rng.choice([0.0, rng.uniform(0.0, 4.0)]),
            leaves_at=rng.choice([math.inf, math.inf, rng.uniform(0.0, 10.0)]),
            stalls_at=stalls_at,
            wakes_at=stalls_at + rng.choice([1.0, 4.0, math.inf]),
        )

    sources = [source(f"source-{i}") for i in range(rng.randint(0, 5))]
    sources.append(SimulatedSource("honest", 2.0 * MIB, joins_at=rng.choice([0.0, 3.0])))
    return TracedWorld(
        [count * MIB],
        sources,
        seed=seed,
        limits=PlannerLimits(near_first=rng.random() < 0.3),
        members=[(0.5, frozenset({"a", "b"}))] if rng.random() < 0.4 else [],
    )


def world_with_a_passer_by() -> TracedWorld:
    """Somebody who has nothing comes and goes before anybody else is there."""
    passer_by = SimulatedSource("passer-by", MIB, holds={0: frozenset()}, leaves_at=1.0)
    return TracedWorld([MIB], [passer_by, SimulatedSource("honest", MIB, joins_at=3.0)])


def changes_by_hand() -> set[Change]:
    """What no world does: chunks that come unasked, and objects that become ready."""
    planner = Planner([MIB, MIB, MIB], rng=random.Random(1), unready=[1, 2])
    seen = set()

    def note(index: int, act: str) -> None:
        position = planner._chunks.position(index, 0)
        before = chunk_state(planner, position)
        if act == "ready":
            planner.make_ready(0.0, [index])
        else:
            planner.chunk_proved(0.0, None, index, 0, MIB)
        seen.add((before, chunk_state(planner, position)))

    note(0, "prove")
    note(1, "ready")
    note(2, "prove")
    return seen


def single(seen: set[Change], listed: Collection[Change]) -> set[Change]:
    """Take apart what are two listed changes: one call may ask for a chunk and for a copy."""
    found: set[Change] = set()
    for old, new in seen:
        between = [state for first, state in listed if first == old and (state, new) in listed]
        is_double = (old, new) not in listed and bool(between)
        found |= {(old, between[0]), (between[0], new)} if is_double else {(old, new)}
    return found


def test_every_change_is_listed_and_every_listed_one_happens() -> None:
    chunks, sources = changes_by_hand(), set()
    for world in (world_with_a_passer_by(), *map(random_world, range(WORLDS))):
        of_chunks, of_sources = world.trace()
        chunks |= of_chunks
        sources |= of_sources
    assert single(chunks, CHUNKS) == CHUNKS.keys()
    assert single(sources, SOURCES) == SOURCES.keys()


def test_the_page_is_made_of_the_lists() -> None:
    made = page()
    assert PAGE.read_text() == made, "run python -m tests.support.planner_states > docs/…"
