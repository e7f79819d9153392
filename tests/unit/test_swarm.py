"""The planner's rules: what is asked of whom, and what becomes of it."""

from __future__ import annotations

import pytest

from tensorswarm.p2p.swarm.planner import Drop, PlannerLimits, SourceKind
from tensorswarm.p2p.swarm.source import Failure
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput
from tests.support.swarm_driver import Driver, chunks_of
from tests.support.swarm_world import MIB, SimulatedSource, SwarmWorld

ORIGIN = SourceKind.ORIGIN
PEER = SourceKind.PEER

# what is asked


def test_first_requests_come_at_once_and_are_small() -> None:
    driver = Driver(100)
    driver.join("a")
    requests = driver.act()
    assert [len(chunks_of(request)) for request in requests] == [1, 1]
    assert driver.act() == []


def test_nothing_is_asked_before_it_is_known_what_a_source_holds() -> None:
    driver = Driver(10)
    driver.planner.add_source(0.0, "a", PEER)
    assert driver.act() == []
    assert driver.planner.next_deadline(0.0) is None


def test_queue_holds_about_a_second_of_work_once_the_speed_is_known() -> None:
    driver = Driver(1000)
    driver.join("a")
    driver.act()
    driver.warm_up("a", rate_chunks_per_s=10)
    sizes = [len(chunks_of(request)) for request in driver.act()]
    assert len(sizes) >= 2
    assert 8 <= sum(sizes) <= 15


def test_a_fast_source_gets_long_runs_in_few_requests() -> None:
    driver = Driver(1000)
    driver.join("a")
    driver.act()
    driver.warm_up("a", rate_chunks_per_s=60)
    assert [len(chunks_of(request)) for request in driver.act()] == [16, 16, 16, 16]
    driver.answer(driver.requests["a"].pop(0))
    (request,) = driver.act()
    assert [span.count for span in request.spans] == [16]


def test_small_objects_share_a_request_up_to_its_limit_of_spans() -> None:
    driver = Driver(sizes=[100] * 3000)
    driver.join("a")
    first, second = driver.act()
    assert len(first.spans) == len(second.spans) == 1024
    assert {span.count for span in first.spans} == {1}
    assert not set(first.spans) & set(second.spans)


def test_a_request_may_go_on_in_the_next_object() -> None:
    driver = Driver(*[3] * 100)
    driver.join("a")
    driver.act()
    driver.warm_up("a", 60.0)
    request = driver.act()[0]
    assert len(request.spans) in (6, 7)
    objects = [span.object_index for span in request.spans]
    assert objects == list(range(objects[0], objects[0] + len(objects)))


def test_sources_start_in_different_places_and_go_on_from_there() -> None:
    driver = Driver(200)
    for name in "abcd":
        driver.join(name)
        driver.act()
    firsts = [chunks_of(*driver.requests[name]) for name in "abcd"]
    for (_, one), (_, two) in firsts:
        assert two == one + 1
    starts = sorted(chunks[0][1] for chunks in firsts)
    assert all(later - earlier >= 10 for earlier, later in zip(starts, starts[1:], strict=False))


def test_a_second_source_starts_in_the_middle_of_the_longest_run() -> None:
    driver = Driver(200)
    driver.join("a")
    (_, first), (_, last) = chunks_of(*driver.act())
    driver.join("b")
    middle = first // 2 if first > 199 - last else last + 1 + (199 - last) // 2
    assert chunks_of(*driver.act())[0] == (0, middle)


def test_two_downloads_of_the_same_model_begin_differently() -> None:
    starts = set()
    for seed in range(20):
        driver = Driver(100, seed=seed)
        driver.join("seeder")
        starts.add(chunks_of(*driver.act())[0])
    assert len(starts) > 10


def test_the_rarest_chunks_come_first() -> None:
    driver = Driver(12)
    for name in "xyz":
        driver.join(name, holds={0: "110101111111"})
    driver.join("all", holds={0: "*"})
    requests = [request for request in driver.act() if request.source == "all"]
    assert sorted(chunks_of(*requests)) == [(0, 2), (0, 4)]


def test_the_rarest_chunks_come_first_across_blocks() -> None:
    driver = Driver(1024, 100)
    for name in "xyz":
        driver.join(name, holds={0: "*"})
    driver.join("all", holds={0: "*", 1: "*"})
    requests = [request for request in driver.act() if request.source == "all"]
    assert {index for index, _ in chunks_of(*requests)} == {1}


def test_chunks_of_one_rarity_are_taken_in_runs() -> None:
    driver = Driver(64)
    driver.join("rare", holds={0: "1" * 20 + "0" * 44})
    driver.join("all", holds={0: "*"})
    driver.act()
    driver.warm_up("all", 10.0)
    (first, second) = [request for request in driver.act() if request.source == "all"]
    assert min(chunk for _, chunk in chunks_of(first, second)) >= 20
    assert len(first.spans) == 1


def test_priorities_come_in_order() -> None:
    sources = [SimulatedSource("all", 10 * MIB)]
    world = SwarmWorld([4 * MIB] * 3, sources, priorities={1: -1, 2: 5})
    world.run()
    order = [chunk[0] for _, request in world.asks for chunk in world.chunks_of(request)]
    assert order == [1] * 4 + [0] * 4 + [2] * 4


def test_priority_comes_before_rarity() -> None:
    driver = Driver(4, 40, priorities={0: 1})
    for name in "xyz":
        driver.join(name, holds={1: "*"})
    driver.join("both", holds={0: "*", 1: "*"})
    requests = [request for request in driver.act() if request.source == "both"]
    assert {index for index, _ in chunks_of(*requests)} == {1}


def test_only_what_a_source_holds_is_asked_of_it() -> None:
    driver = Driver(8, 8)
    driver.join("a", holds={0: "00000100"})
    assert chunks_of(*driver.act()) == [(0, 5)]
    driver.planner.source_holds(0.0, "a", 1, b"\x01\xff\xff\xff")  # spare bytes
    assert chunks_of(*driver.act()) == [(1, 0)]


def test_what_a_source_lacks_after_all_is_asked_elsewhere() -> None:
    driver = Driver(3, 3)
    driver.join("a")
    driver.planner.source_lacks(0.0, "a", 0)
    driver.act()
    assert {index for index, _ in chunks_of(*driver.requests["a"])} == {1}
    assert driver.planner.unobtainable() == [0]
    driver.join("b", holds={0: "*"})
    assert {index for index, _ in chunks_of(*driver.act())} == {0}
    assert driver.planner.unobtainable() == []


def test_unobtainable_objects() -> None:
    driver = Driver(3, 0, 300, 1, proved={3: b"\x01"})
    assert driver.planner.unobtainable() == [0, 2]
    driver.join("a", holds={0: "*", 2: "1" * 299})
    assert driver.planner.unobtainable() == [2]
    driver.join("b", holds={2: "0" * 299 + "1"})
    assert driver.planner.unobtainable() == []
    driver.planner.remove_source(0.0, "a")
    assert driver.planner.unobtainable() == [0, 2]


def test_a_resumed_download_asks_only_for_what_is_missing() -> None:
    driver = Driver(sizes=[3 * MIB + 5, 0], proved={0: b"\x0b"})
    assert (driver.planner.missing_chunks, driver.planner.missing_bytes) == (1, MIB)
    driver.join("a")
    assert chunks_of(*driver.act()) == [(0, 2)]
    driver.prove("a", (0, 2))
    assert driver.planner.is_done()
    assert driver.act() == []
    assert Driver(proved={}).planner.is_done()


# what becomes of it


def test_every_byte_is_counted_once() -> None:
    driver = Driver(2)
    driver.join("a")
    driver.act()
    driver.prove("a", (0, 0))
    driver.prove("b", (0, 0))  # of somebody long gone
    driver.planner.chunk_duplicate(0.0, "a", 0, 0, CHUNK_SIZE)
    driver.prove(None, (0, 1))
    statistics = driver.planner.statistics()
    assert (statistics.proved_bytes, statistics.duplicate_bytes) == (2 * MIB, 2 * MIB)
    assert driver.source("a").proved_bytes == MIB
    assert driver.source("a").duplicate_bytes == MIB
    assert driver.planner.missing_bytes == 0


def test_chunks_that_nobody_asked_for_are_welcome() -> None:
    driver = Driver(100)
    driver.join("origin", ORIGIN)
    asked = set(chunks_of(*driver.act()))
    for chunk in range(50):
        driver.now += 0.2  # the chunks asked for never come: it sends in its own order
        if (0, chunk) not in asked:
            driver.prove("origin", (0, chunk))
        driver.act()
    assert driver.drops == []
    assert driver.source("origin").proved_bytes >= 48 * MIB
    driver.join("other")
    later = set(chunks_of(*driver.act()))
    assert later
    assert min(later) >= (0, 50)


def test_chunks_alone_tell_the_speed_too() -> None:
    driver = Driver(1000)
    driver.join("a")
    for chunk in chunks_of(*driver.act()):
        driver.now += 0.1
        driver.prove("a", chunk)
    assert driver.source("a").rate_bytes_per_s == pytest.approx(10 * MIB)
    driver.act()
    before = driver.source("a").in_flight_bytes
    driver.prove("a", chunks_of(driver.requests["a"][2])[0])
    assert driver.source("a").in_flight_bytes == before - MIB


def test_a_source_heard_of_in_gulps_gets_larger_requests_too() -> None:
    driver = Driver(1000)
    driver.join("a")
    asked = 0
    for _ in range(4):
        requests = driver.act()
        asked = len(chunks_of(*requests))
        driver.now += 0.1
        for request in requests:
            driver.answer(request)
    assert asked == 64


def test_a_request_done_without_its_chunks_frees_them_and_in_the_end_they_count_as_lacking() -> (
    None
):
    driver = Driver(1)
    driver.join("a")
    for _ in range(3):
        (request,) = driver.act()
        driver.planner.request_done(0.0, "a", request.request_id)
    assert driver.act() == []
    assert driver.planner.unobtainable() == [0]
    driver.planner.source_holds(0.0, "a", 0, None)
    assert len(driver.act()) == 1


def test_lacks_takes_the_objects_from_the_source() -> None:
    driver = Driver(1, 1, 1)
    driver.join("a", holds={0: "*", 1: "*"})
    for request in driver.act():
        driver.planner.request_failed(0.0, "a", request.request_id, Failure.LACKS)
    assert driver.act() == []
    assert driver.planner.unobtainable() == [0, 1, 2]
    assert driver.source("a").is_present
    driver.join("b")
    assert len(chunks_of(*driver.act())) == 2


@pytest.mark.parametrize(
    "failure", [Failure.CLOSED, Failure.UNREACHABLE, Failure.PROTOCOL, Failure.REFUSED_ACCESS]
)
def test_a_failed_source_is_dropped_and_may_come_back(failure: Failure) -> None:
    driver = Driver(2)
    driver.join("a")
    first, _ = driver.act()
    driver.planner.request_failed(0.0, "a", first.request_id, failure, "why")
    assert driver.act() == []
    assert driver.drops == [Drop("a", failure, "why")]
    assert driver.source("a").dropped is failure
    driver.planner.remove_source(0.0, "a")  # the shell tidies up: nothing more to do
    driver.join("a")
    assert len(driver.act()) == 2
    assert driver.source("a").dropped is None


def test_a_source_can_fail_as_a_whole() -> None:
    driver = Driver(2)
    driver.join("a")
    driver.act()
    driver.planner.request_failed(0.0, "a", None, Failure.UNREACHABLE)
    driver.act()
    assert [drop.failure for drop in driver.drops] == [Failure.UNREACHABLE]


def test_late_news_of_settled_requests_changes_nothing() -> None:
    driver = Driver(4)
    driver.join("a")
    request = driver.act()[0]
    driver.answer(request)
    driver.act()
    driver.planner.request_done(0.0, "a", request.request_id)
    driver.planner.request_failed(0.0, "a", request.request_id, Failure.CLOSED)
    driver.planner.progress(0.0, "nobody", 1, 5)
    driver.planner.request_done(0.0, "nobody", 1)
    driver.planner.request_failed(0.0, "nobody", 1, Failure.CLOSED)
    driver.planner.chunk_refused(0.0, "nobody", 0, 0)
    driver.planner.source_holds(0.0, "nobody", 0, None)
    driver.planner.source_holds_all(0.0, "nobody")
    driver.planner.source_lacks(0.0, "nobody", 0)
    assert driver.act() == []
    assert driver.drops == []
    assert driver.source("a").is_present


def test_a_source_that_leaves_gives_its_chunks_back() -> None:
    driver = Driver(4)
    driver.join("a")
    asked = chunks_of(*driver.act())
    driver.planner.remove_source(0.0, "a")
    driver.join("b", holds={0: "".join("01"[(0, chunk) in asked] for chunk in range(4))})
    assert sorted(chunks_of(*driver.act())) == sorted(asked)


# liars


def test_a_lying_peer_is_dropped_for_good_and_what_it_gave_before_stays() -> None:
    driver = Driver(3)
    driver.join("liar")
    good, bad = chunks_of(*driver.act())
    driver.prove("liar", good)
    driver.planner.chunk_refused(0.0, "liar", *bad)
    driver.join("honest")
    assert bad in chunks_of(*driver.act())
    assert driver.drops == [Drop("liar", Failure.BAD_BYTES, driver.drops[0].detail)]
    assert driver.planner.missing_chunks == 2
    driver.join("liar")
    assert driver.act() == []
    assert driver.drops[-1].failure is Failure.BAD_BYTES
    liar = driver.source("liar")
    assert (liar.dropped, liar.is_present) == (Failure.BAD_BYTES, False)
    assert (liar.proved_bytes, liar.refused_bytes) == (MIB, MIB)


def test_bad_bytes_reported_for_a_request_make_a_liar_too() -> None:
    driver = Driver(3)
    driver.join("liar")
    request = driver.act()[0]
    driver.planner.request_failed(0.0, "liar", request.request_id, Failure.BAD_BYTES)
    driver.join("liar")
    driver.act()
    assert [drop.failure for drop in driver.drops] == [Failure.BAD_BYTES]


def test_an_origin_is_not_asked_again_for_what_it_gave_wrongly() -> None:
    driver = Driver(2)
    driver.join("origin", ORIGIN)
    driver.act()
    driver.planner.chunk_refused(0.0, "origin", 0, 0)
    driver.planner.request_failed(
        0.0, "origin", driver.requests["origin"][0].request_id, Failure.BAD_BYTES
    )
    assert driver.act() == []
    driver.planner.remove_source(0.0, "origin")
    driver.join("origin", ORIGIN)
    driver.planner.source_holds(0.0, "origin", 0, None)
    assert chunks_of(*driver.act()) == [(0, 1)]
    assert driver.drops == []
    assert driver.planner.unobtainable() == [0]


def test_bad_bytes_of_an_origin_without_a_chunk_blame_the_one_it_was_at() -> None:
    driver = Driver(1)
    driver.join("origin", ORIGIN)
    (request,) = driver.act()
    driver.planner.request_failed(0.0, "origin", request.request_id, Failure.BAD_BYTES)
    assert driver.act() == []
    assert driver.source("origin").refused_bytes == MIB


def test_an_origin_that_gives_only_wrong_bytes_is_dropped_in_the_end() -> None:
    driver = Driver(50, limits=PlannerLimits(max_refused_chunks=10))
    driver.join("origin", ORIGIN)
    for _ in range(20):
        for chunk in chunks_of(*driver.act()):
            if driver.source("origin").is_present:
                driver.planner.chunk_refused(0.0, "origin", *chunk)
    assert [drop.failure for drop in driver.drops] == [Failure.BAD_BYTES]
    assert driver.source("origin").refused_bytes == 10 * MIB


# limits


def test_sources_beyond_the_limit_are_sent_away() -> None:
    driver = Driver(10, limits=PlannerLimits(max_sources=3))
    for name in "abcd":
        driver.join(name)
    driver.act()
    assert [(drop.source, drop.failure) for drop in driver.drops] == [("d", Failure.LOCAL)]
    driver.planner.remove_source(0.0, "a")
    driver.join("d")
    assert [request.source for request in driver.act()] == ["d", "d"]


def test_names_of_the_past_are_forgotten_liars_last() -> None:
    driver = Driver(2, limits=PlannerLimits(max_past_sources=5))
    driver.join("liar")
    driver.planner.chunk_refused(0.0, "liar", 0, 0)
    for number in range(100):
        driver.join(f"visitor-{number}")
        driver.planner.remove_source(0.0, f"visitor-{number}")
    driver.join("liar")
    driver.act()
    assert not driver.source("liar").is_present
    assert len(driver.planner.statistics().sources) <= 6


def test_a_source_that_joins_twice_is_one_source() -> None:
    driver = Driver(10)
    driver.join("a")
    driver.act()
    driver.join("a")
    assert driver.act() == []


def test_an_order_for_the_source_that_was_does_not_reach_the_one_that_is() -> None:
    driver = Driver(2)
    driver.join("a")
    request = driver.act()[0]
    driver.planner.request_failed(0.0, "a", request.request_id, Failure.CLOSED)
    driver.join("a")  # before the shell heard of the drop
    driver.act()
    assert driver.drops == []


def test_impossible_input_is_refused() -> None:
    with pytest.raises(BadInput):
        Driver(sizes=[-1])
    with pytest.raises(BadInput):
        Driver(sizes=[1 << 60])
    with pytest.raises(BadInput):
        Driver(11, limits=PlannerLimits(max_chunks=10))
    driver = Driver(2)
    driver.join("a")
    for index, chunk in ((0, 2), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(BadInput):
            driver.prove("a", (index, chunk))
    with pytest.raises(BadInput):
        driver.planner.source_holds(0.0, "a", 1, None)


def test_many_priorities_are_told_apart_up_to_the_limit() -> None:
    driver = Driver(
        *[1] * 40,
        priorities={i: -i for i in range(40)},
        limits=PlannerLimits(max_priorities=8),
    )
    driver.join("a")
    order: list[int] = []
    while not driver.planner.is_done():
        driver.act()
        request = driver.requests["a"].pop(0)
        order += [index for index, _ in chunks_of(request)]
        driver.answer(request)
    assert order[:7] == [39, 38, 37, 36, 35, 34, 33]
    assert sorted(order[7:]) == list(range(33))


def test_a_short_last_chunk_counts_with_its_own_size() -> None:
    world = SwarmWorld([2 * MIB + 1, 1, MIB - 1], [SimulatedSource("a", MIB)])
    assert world.planner.missing_bytes == 3 * MIB + 1
    world.run()
    statistics = world.planner.statistics()
    assert statistics.proved_bytes == 3 * MIB + 1
    assert (world.planner.missing_bytes, statistics.sources[0].in_flight_bytes) == (0, 0)
