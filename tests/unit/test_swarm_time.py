"""The planner in time: deadlines, the end of a download, and many sources together."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from tensorswarm.p2p.swarm.planner import Cancel, SourceKind
from tensorswarm.p2p.swarm.source import Failure, Request
from tests.support.swarm_driver import Driver, chunks_of
from tests.support.swarm_world import MIB, SimulatedSource, SwarmWorld

ORIGIN = SourceKind.ORIGIN

# deadlines


def test_nothing_in_flight_is_without_a_deadline() -> None:
    driver = Driver(10)
    assert driver.planner.next_deadline(0.0) is None
    driver.join("a")
    driver.act()
    assert driver.planner.next_deadline(0.0) == pytest.approx(3.0)


def test_a_silent_source_is_dropped_and_its_chunks_go_to_others_at_once() -> None:
    driver = Driver(4)
    driver.join("silent")
    asked = chunks_of(*driver.act())
    driver.now = 2.9
    assert driver.act() == []
    assert driver.drops == []
    driver.now = 3.0
    driver.join("other")
    given = chunks_of(*driver.act())
    assert [drop.failure for drop in driver.drops] == [Failure.STALLED]
    assert len(given) == 2
    driver.warm_up("other", 1.0)
    driver.act()
    assert set(asked) <= set(given) | set(chunks_of(*driver.requests["other"]))


def test_a_peer_that_stops_in_the_middle_is_replaced_within_five_seconds() -> None:
    sources = [
        SimulatedSource("stops", 50 * MIB, stalls_at=2.0),
        SimulatedSource("goes-on", 5 * MIB),
    ]
    world = SwarmWorld([400 * MIB], sources, seed=3)
    world.run(until=12.0)
    at, drop = world.drops[0]
    assert (drop.source, drop.failure) == ("stops", Failure.STALLED)
    assert at <= 2.0 + 5.0
    world.run()
    assert world.planner.is_done()


def test_silence_is_forgiven_longer_the_more_often_a_source_was_silent_before() -> None:
    driver = Driver(1)
    waits = []
    for _ in range(5):
        driver.join("cold")
        start = driver.now
        driver.act()
        while driver.source("cold").is_present:
            deadline = driver.planner.next_deadline(driver.now)
            assert deadline is not None
            driver.now = deadline
            driver.act()
        waits.append(driver.now - start)
    assert waits == pytest.approx([3.0, 6.0, 12.0, 24.0, 24.0])


def test_an_origin_that_always_needs_long_for_its_first_byte_is_used_in_the_end() -> None:
    world = SwarmWorld([50 * MIB], [SimulatedSource("cold", 20 * MIB, latency_s=4.5, kind=ORIGIN)])
    world.run(until=60.0)
    assert world.planner.is_done()


def test_a_slow_source_is_dropped_when_others_hold_what_it_holds() -> None:
    sources = [
        SimulatedSource("slow", MIB / 40, holds={0: frozenset(range(2000))}),
        SimulatedSource("fast", 20 * MIB),
    ]
    world = SwarmWorld([3000 * MIB], sources, progress_bytes=32 << 10)
    world.run(until=30.0)
    ((at, drop),) = world.drops
    assert (drop.source, drop.failure) == ("slow", Failure.STALLED)
    assert at == pytest.approx(20.0)


@pytest.mark.parametrize("holds", [None, {0: frozenset(range(3))}])
def test_the_only_holder_is_never_dropped_for_being_slow(
    holds: Mapping[int, frozenset[int]] | None,
) -> None:
    sources = [
        SimulatedSource("slow", MIB / 40, holds=holds),
        SimulatedSource("fast", 20 * MIB, holds={0: frozenset(range(1, 3000))}),
    ]
    world = SwarmWorld([3000 * MIB], sources, progress_bytes=32 << 10)
    world.run()
    assert world.planner.is_done()
    assert world.drops == []


def test_nobody_is_dropped_for_being_slow_when_all_are() -> None:
    sources = [SimulatedSource(name, MIB / 30) for name in "abc"]
    world = SwarmWorld([4 * MIB], sources, progress_bytes=32 << 10)
    world.run()
    assert world.planner.is_done()
    assert world.drops == []


def test_the_rest_of_a_cancelled_request_is_not_taken_for_silence() -> None:
    driver = Driver(40)
    driver.join("a")
    driver.act()
    driver.warm_up("a", 4.0)
    first, second = driver.act()[:2]
    for chunk in chunks_of(first):
        driver.prove(None, chunk)
    driver.act()
    assert driver.cancels == [Cancel("a", first.request_id)]
    for _ in range(8):  # what was on its way still comes, for 8 s
        driver.now += 1.0
        driver.planner.progress(driver.now, "a", first.request_id, MIB)
        driver.act()
    assert driver.drops == []
    driver.answer(second)
    assert driver.source("a").is_present


# the end-game


def test_idle_sources_copy_what_a_slow_one_holds_back_and_the_loser_is_cancelled() -> None:
    sources = [SimulatedSource("slow", 0.2 * MIB), SimulatedSource("fast", 50 * MIB)]
    world = SwarmWorld([40 * MIB], sources, seed=5)
    took_s = world.run()
    assert took_s < 1.2
    assert {cancel.source for cancel in world.cancels} == {"slow"}


def test_a_request_is_cancelled_only_when_nothing_of_it_is_wanted() -> None:
    driver = Driver(40)
    driver.join("a")
    driver.act()
    driver.warm_up("a", 10.0)
    request = driver.act()[0]
    first, *others = chunks_of(request)
    for chunk in others:
        driver.prove(None, chunk)
        assert [a for a in driver.planner.actions(driver.now) if isinstance(a, Cancel)] == []
    driver.prove(None, first)
    actions = driver.planner.actions(driver.now)
    assert Cancel("a", request.request_id) in actions


def test_a_source_that_answered_everything_is_not_cancelled() -> None:
    driver = Driver(10)
    driver.join("a")
    for request in driver.act():
        driver.answer(request)
    driver.act()
    assert driver.cancels == []


def test_there_are_never_more_than_two_copies_of_a_chunk() -> None:
    sources = [SimulatedSource(f"s{i}", 5 * MIB, stalls_at=0.5 + i / 10) for i in range(6)]
    world = SwarmWorld([12 * MIB], [*sources, SimulatedSource("good", 0.5 * MIB)], seed=2)
    world.run()  # the world checks every request
    assert world.planner.is_done()


def test_a_copy_is_not_taken_back_for_a_third_source() -> None:
    sources = [
        SimulatedSource("slow", 0.1 * MIB),
        SimulatedSource("slower", 0.08 * MIB),
        SimulatedSource("fast", 50 * MIB, joins_at=4.0),
    ]
    world = SwarmWorld([1 * MIB], sources, progress_bytes=16 << 10)
    world.run()  # the world counts what is on its way, cancelled or not
    assert {request.source for _, request in world.asks} == {"slow", "slower"}
    assert world.planner.is_done()


def test_near_the_end_a_slow_source_leaves_the_rest_to_a_fast_one() -> None:
    sources = [SimulatedSource("slow", 0.5 * MIB), SimulatedSource("fast", 10 * MIB)]
    world = SwarmWorld([100 * MIB], sources)
    took_s = world.run()
    last_asked_s = max(at for at, request in world.asks if request.source == "slow")
    assert 2.0 <= last_asked_s <= took_s - 2.0
    assert world.planner.statistics().duplicate_bytes == 0


def test_who_left_the_rest_to_another_does_it_when_the_other_goes() -> None:
    slow = SimulatedSource("slow", 0.5 * MIB)
    fast = SimulatedSource("fast", 10 * MIB, leaves_at=9.0)
    world = SwarmWorld([100 * MIB], [slow, fast])
    took_s = world.run()
    assert world.planner.is_done()
    assert 10.0 < took_s < 30.0


# together


@pytest.mark.parametrize("unit", [1.0, 10.0])
def test_sources_of_different_speed_finish_together(unit: float) -> None:
    rates = [unit, 2 * unit, 4 * unit, 8 * unit]
    sources = [SimulatedSource(f"s{rate}", rate * MIB) for rate in rates]
    world = SwarmWorld([300 * MIB, 300 * MIB], sources, seed=4)
    ideal_s = 600 / sum(rates)
    assert world.run() <= 1.1 * ideal_s
    for source in sources:
        share = source.rate_bytes_per_s / (sum(rates) * MIB) * 600 * MIB
        assert world.given[source.name] == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("slow", [20.0, 5.0, 1.0, 0.2, 0.02])
@pytest.mark.parametrize("chunks", [60, 300])
def test_a_slow_source_never_costs_time(slow: float, chunks: int) -> None:
    fast = SimulatedSource("fast", 50 * MIB)
    alone_s = SwarmWorld([chunks * MIB], [fast]).run()
    for seed in range(5):
        both = SwarmWorld([chunks * MIB], [SimulatedSource("slow", slow * MIB), fast], seed=seed)
        assert both.run() <= 1.05 * alone_s


def test_several_slow_sources_never_cost_time_either() -> None:
    rng = random.Random(7)
    for seed in range(15):
        rates = [rng.choice([0.2, 1.0, 5.0, 20.0, 100.0]) for _ in range(rng.randint(2, 6))]
        sources = [
            SimulatedSource(f"s{i}", rate * MIB, rng.uniform(0.0, 0.3))
            for i, rate in enumerate(rates)
        ]
        best_s = min(SwarmWorld([100 * MIB], [source]).run() for source in sources)
        round_trip_s = max(source.latency_s for source in sources)
        took_s = SwarmWorld([100 * MIB], sources, seed=seed).run()
        assert took_s <= max(1.05 * best_s, best_s + round_trip_s)


def test_partial_peers_are_used_for_what_they_have_and_the_seed_for_the_rest() -> None:
    halves = [
        SimulatedSource("low", 10 * MIB, holds={0: frozenset(range(150))}),
        SimulatedSource("high", 10 * MIB, holds={0: frozenset(range(100, 250))}),
    ]
    seed = SimulatedSource("seed", 10 * MIB, kind=ORIGIN)
    world = SwarmWorld([300 * MIB], [*halves, seed], seed=9)
    assert world.run() <= 1.1 * 10.0
    assert world.planner.statistics().duplicate_bytes <= 6 * MIB


def test_the_same_events_give_the_same_actions() -> None:
    def asks() -> list[tuple[float, Request]]:
        sources = [
            SimulatedSource("a", 3 * MIB, holds={0: frozenset(range(0, 90, 2))}),
            SimulatedSource("b", 9 * MIB, stalls_at=2.0),
            SimulatedSource("c", 1 * MIB, kind=ORIGIN),
        ]
        world = SwarmWorld([90 * MIB], sources, seed=11)
        world.run()
        return world.asks

    assert asks() == asks()


def test_the_cost_of_a_chunk_does_not_grow_with_their_number() -> None:
    def cost(chunk_count: int) -> tuple[float, float]:
        odd = int.from_bytes(b"\xaa" * (chunk_count // 8), "little").to_bytes(
            chunk_count // 8, "little"
        )
        driver = Driver(chunk_count)
        driver.join("a")
        driver.join("b")
        driver.join("c", ORIGIN)
        driver.planner.source_lacks(0.0, "c", 0)
        driver.planner.source_holds(0.0, "c", 0, odd)
        calls = 0
        while not driver.planner.is_done():
            driver.act()
            calls += 1
            driver.now += 0.01
            for requests in driver.requests.values():
                if requests:
                    driver.answer(requests.pop(0))
        steps = driver.planner.decision_steps
        return steps / chunk_count, calls / chunk_count

    small, large = cost(1_000), cost(100_000)
    assert large[0] <= 2 * small[0] + 1
    assert large[1] <= 2 * small[1]
    assert large[0] < 10
