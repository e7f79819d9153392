"""Objects that cannot be asked for yet: none is, and they are made ready in a good order."""

from __future__ import annotations

import random

from tensorswarm.p2p.swarm import readiness
from tensorswarm.p2p.swarm.planner import Ask, Planner, SourceKind
from tensorswarm.store.digest import CHUNK_SIZE

CHUNKS = 10
SIZE = CHUNKS * CHUNK_SIZE


def planner_of(count: int, **options: object) -> Planner:
    return Planner(
        [SIZE] * count,
        rng=random.Random(1),
        unready=range(count),
        **options,  # type: ignore[arg-type]
    )


def asked(planner: Planner, now: float) -> set[int]:
    """Return the objects that are asked for."""
    return {
        span.object_index
        for action in planner.actions(now)
        if isinstance(action, Ask)
        for span in action.request.spans
    }


def test_nothing_is_asked_for_before_it_is_ready() -> None:
    planner = planner_of(5)
    planner.add_source(0.0, "a", SourceKind.PEER)
    planner.source_holds_whole(0.0, "a", range(5))
    assert not asked(planner, 0.0)
    assert planner.unobtainable() == [], "it is held by somebody"
    planner.make_ready(0.1, [3])
    assert asked(planner, 0.1) == {3}


def test_what_is_proved_meanwhile_is_not_asked_for() -> None:
    planner = planner_of(2)
    planner.add_source(0.0, "a", SourceKind.PEER)
    planner.source_holds_all(0.0, "a")
    for index in range(2):
        for chunk in range(CHUNKS):
            planner.chunk_proved(0.0, None, index, chunk, 0)
    assert planner.is_done()
    planner.make_ready(0.1, [0, 1])
    assert not asked(planner, 0.1)
    assert not planner.readiness.is_due()


def test_no_copies_are_asked_for_while_more_is_to_come() -> None:
    planner = planner_of(40)
    for name in ("a", "b"):
        planner.add_source(0.0, name, SourceKind.PEER)
        planner.source_holds_all(0.0, name)
    planner.make_ready(0.0, [7])
    positions = [
        (span.object_index, span.first_chunk + i)
        for now in (0.0, 0.5, 1.0, 1.5)
        for action in planner.actions(now)
        if isinstance(action, Ask)
        for span in action.request.spans
        for i in range(span.count)
    ]
    assert len(positions) == len(set(positions))


def test_portions_are_bounded_and_end() -> None:
    planner = planner_of(3000)
    planner.add_source(0.0, "a", SourceKind.PEER)
    planner.source_holds_all(0.0, "a")
    seen: list[int] = []
    while portion := planner.readiness.next_portion():
        assert len(portion) <= readiness.PORTION_OBJECTS
        seen += portion
        planner.make_ready(0.0, portion)
    assert sorted(seen) == list(range(3000))
    assert planner.readiness.next_portion() == []


def test_an_object_larger_than_a_portion_goes_alone() -> None:
    planner = Planner(
        [(readiness.PORTION_CHUNKS + 1) * CHUNK_SIZE] * 2, rng=random.Random(1), unready=range(2)
    )
    assert len(planner.readiness.next_portion()) == 1


def test_a_window_is_kept_and_no_more() -> None:
    planner = planner_of(5000)  # 50,000 chunks
    planner.add_source(0.0, "a", SourceKind.PEER)
    planner.source_holds_all(0.0, "a")
    portions = 0
    while planner.readiness.is_due():
        planner.make_ready(0.0, planner.readiness.next_portion())
        portions += 1
    assert 1 < portions <= 1 + readiness.WINDOW_CHUNKS // (CHUNKS * readiness.PORTION_OBJECTS // 2)


def test_a_source_without_work_gets_what_it_holds() -> None:
    planner = planner_of(20_000)
    planner.add_source(0.0, "all but the end", SourceKind.PEER)
    planner.source_holds_whole(0.0, "all but the end", range(19_900))
    while planner.readiness.is_due():
        planner.make_ready(0.0, planner.readiness.next_portion())
    planner.actions(0.0)
    assert not planner.readiness.is_due()
    planner.add_source(0.0, "the end", SourceKind.PEER)
    planner.source_holds_whole(0.0, "the end", range(19_900, 20_000))
    assert planner.readiness.is_due()
    portion = planner.readiness.next_portion()
    assert set(portion) & set(range(19_900, 20_000))
    planner.make_ready(1.0, portion)
    assert asked(planner, 1.0) & set(range(19_900, 20_000))


def test_the_urgent_and_then_the_rare_go_first() -> None:
    planner = planner_of(2000, priorities={1234: -1})
    planner.add_source(0.0, "most", SourceKind.PEER)
    planner.source_holds_whole(0.0, "most", range(2000))
    planner.add_source(0.0, "second", SourceKind.PEER)
    planner.source_holds_whole(0.0, "second", range(1500))
    first = planner.readiness.next_portion()
    assert first == [1234]
    planner.make_ready(0.0, first)
    rare = planner.readiness.next_portion()[:300]
    assert sum(index >= 1400 for index in rare) > 250
