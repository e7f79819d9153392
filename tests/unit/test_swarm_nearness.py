"""Near sources first: the farther ones are spared, but nothing waits for ever."""

from __future__ import annotations

import math

import pytest

from tensorswarm.p2p.swarm.planner import PlannerLimits, SourceKind
from tests.support.swarm_driver import Driver, chunks_of
from tests.support.swarm_world import MIB, SimulatedSource, SwarmWorld

NEAR_FIRST = PlannerLimits(near_first=True)
ORIGIN = SourceKind.ORIGIN


def world(*sources: SimulatedSource, chunks: int = 200, near_first: bool = True) -> SwarmWorld:
    limits = PlannerLimits(near_first=near_first)
    made = SwarmWorld([chunks * MIB], sources, seed=1, limits=limits)
    made.run()
    assert made.planner.is_done()
    return made


def lan(rate: float, **more: float) -> SimulatedSource:
    return SimulatedSource("lan", rate * MIB, **more)  # type: ignore[arg-type]


def wan(rate: float, **more: float) -> SimulatedSource:
    return SimulatedSource("wan", rate * MIB, distance=1, **more)  # type: ignore[arg-type]


def origin(rate: float) -> SimulatedSource:
    return SimulatedSource("origin", rate * MIB, distance=2, kind=ORIGIN)


def test_without_the_wish_all_give_what_they_can() -> None:
    given = world(lan(10), wan(10), origin(10), near_first=False).given
    assert min(given.values()) > 50 * MIB


def test_who_is_near_gives_everything() -> None:
    assert world(lan(5), wan(50), origin(100)).given == {"lan": 200 * MIB}
    assert world(wan(5), origin(100)).given == {"wan": 200 * MIB}
    assert world(origin(5)).given == {"origin": 200 * MIB}


def test_what_only_the_far_have_is_asked_of_them_at_once() -> None:
    driver = Driver(4, limits=NEAR_FIRST)
    driver.join("origin", ORIGIN, distance=2)
    driver.join("near", holds={0: "1010"})
    asked = driver.act()
    of_origin = {
        chunk for request in asked if request.source == "origin" for chunk in chunks_of(request)
    }
    of_near = {
        chunk for request in asked if request.source == "near" for chunk in chunks_of(request)
    }
    assert of_origin == {(0, 1), (0, 3)}
    assert of_near == {(0, 0), (0, 2)}


def test_who_comes_later_and_is_nearer_takes_over() -> None:
    given = world(origin(10), lan(10, joins_at=2.0)).given
    assert 15 * MIB <= given["origin"] <= 50 * MIB  # what it gave and was asked for by then


def test_when_the_near_one_goes_the_far_one_goes_on() -> None:
    given = world(lan(10, leaves_at=5.0), origin(10)).given
    assert given["lan"] == pytest.approx(50 * MIB, rel=0.1)
    assert given["origin"] == 200 * MIB - given["lan"]


def test_a_near_one_that_falls_silent_is_dropped_and_replaced() -> None:
    made = world(lan(10, stalls_at=1.0, wakes_at=math.inf), origin(10))
    assert made.given["origin"] > 180 * MIB
    assert made.now < 1 + 2 * 3 + 20 + 2


def test_a_near_one_that_trickles_is_helped() -> None:
    made = world(lan(0.2), origin(20), chunks=100)
    assert made.given["origin"] > 90 * MIB
    assert made.now < 3 + 100 / 20 + 6


def test_near_ones_that_are_slow_together_are_enough() -> None:
    many = [SimulatedSource(f"lan-{i}", 0.5 * MIB) for i in range(4)]
    assert "origin" not in world(*many, origin(20), chunks=60).given


def test_liars_nearby_do_not_stand_in_the_way() -> None:
    liar = SimulatedSource("lan", 20 * MIB, lies=frozenset((0, c) for c in range(200)))
    assert world(liar, origin(20)).given == {"origin": 200 * MIB}
