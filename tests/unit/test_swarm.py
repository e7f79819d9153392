"""The planner's rules, one by one. Whole downloads run in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest

from tensorswarm.p2p.source import Failure, Request, Span
from tensorswarm.p2p.swarm import (
    Ask,
    Cancel,
    Drop,
    Planner,
    PlannerLimits,
    SourceKind,
    SourceStatistics,
)
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput
from tests.support.swarm_world import MIB, Chunk, SimulatedSource, SwarmWorld

PEER, ORIGIN = SourceKind.PEER, SourceKind.ORIGIN


class Driver:
    """A planner with the shorthand that the tests below need; chunks are 1 MiB."""

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

    def join(self, name: str, kind: SourceKind = PEER, holds: Mapping[int, str] | None = None):
        """Add a source; per object the chunks it holds as "1" in a string, "*" for all."""
        self.planner.add_source(self.now, name, kind)
        if holds is None:
            self.planner.source_holds_all(self.now, name)
        for index, text in (holds or {}).items():
            bits = int(text[::-1], 2).to_bytes(len(text) // 8 + 1, "little") if text != "*" else None
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
    driver.warm_up("a", rate_chunks_per_s=500)
    driver.act()
    driver.answer(driver.requests["a"].pop(0))
    assert len(driver.requests["a"]) == 3
    (request,) = driver.act()
    assert [span.count for span in request.spans] == [16]


def test_small_objects_share_a_request_up_to_its_limit_of_spans() -> None:
    driver = Driver(sizes=[100] * 1000)
    driver.join("a")
    first, second = driver.act()
    assert len(first.spans) == len(second.spans) == 256
    assert {span.count for span in first.spans} == {1}
    assert not set(first.spans) & set(second.spans)


def test_a_run_goes_on_across_objects() -> None:
    driver = Driver(3, 3, limits=PlannerLimits(min_requests_per_source=1))
    driver.join("a")
    driver.act()
    driver.now = 1.0
    while not driver.planner.is_done():
        driver.warm_up("a", rate_chunks_per_s=10)
        driver.act()
    assert driver.planner.statistics().duplicate_bytes == 0


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


def test_two_downloads_of_the_same_model_begin_differently() -> None:
    starts = set()
    for seed in range(20):
        driver = Driver(100, seed=seed)
        driver.join("seeder")
        starts.add(chunks_of(*driver.act())[0])
    assert len(starts) > 10


def test_the_rarest_chunks_come_first() -> None:
    driver = Driver(12)
    for number, text in enumerate(("110111111111", "111101111111", "110101111111")):
        driver.planner.add_source(0.0, f"leecher-{number}", PEER)
        bits = int(text[::-1], 2).to_bytes(2, "little")
        driver.planner.source_holds(0.0, f"leecher-{number}", 0, bits)
    driver.join("all", holds={0: "*"})
    requests = [request for request in driver.act() if request.source == "all"]
    assert sorted(chunks_of(*requests)) == [(0, 2), (0, 4)]


def test_priority_comes_before_rarity() -> None:
    driver = Driver(4, 4, 4, priorities={1: -1, 2: 5})
    driver.join("all")
    for name in "xyz":  # makes object 1 the most common one
        driver.planner.add_source(0.0, name, PEER)
        driver.planner.source_holds(0.0, name, 1, b"\x00")
    for _ in range(12):
        request = driver.act()[0] if not driver.requests else driver.requests["all"][0]
        driver.now += 1.0
        driver.requests["all"].remove(request)
        driver.answer(request)
        driver.act()
        if driver.planner.is_done():
            break
    world = SwarmWorld(
        [4 * MIB] * 3, [SimulatedSource("all", 10 * MIB)], priorities={1: -1, 2: 5}
    )
    world.run()
    order = [chunk[0] for _, request in world.asks for chunk in world.chunks_of(request)]
    assert order == [1] * 4 + [0] * 4 + [2] * 4
    assert driver.planner.is_done()


def test_a_rare_object_of_low_priority_waits() -> None:
    driver = Driver(4, 4, priorities={0: 1})
    driver.join("both")
    for name in "xyz":
        driver.planner.add_source(0.0, name, PEER)
        driver.planner.source_holds(0.0, name, 1, None)
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
            driver.planner.progress(driver.now, "origin", 1, CHUNK_SIZE)
            driver.prove("origin", (0, chunk))
        driver.act()
    assert driver.drops == []
    assert driver.source("origin").proved_bytes >= 48 * MIB


def test_a_request_done_without_its_chunks_frees_them_and_in_the_end_they_count_as_lacking() -> None:
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
            driver.planner.chunk_refused(0.0, "origin", *chunk)
    assert [drop.failure for drop in driver.drops] == [Failure.BAD_BYTES]
    assert driver.source("origin").refused_bytes == 10 * MIB


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
    assert [(at, drop.source, drop.failure) for at, drop in world.drops] == [
        (pytest.approx(20.0), "slow", Failure.STALLED)
    ]


def test_the_only_holder_is_never_dropped_for_being_slow() -> None:
    sources = [
        SimulatedSource("slow", MIB / 40),
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
        driver.planner.progress(driver.now, "a", first.request_id, CHUNK_SIZE)
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


def test_a_late_fast_source_takes_the_place_of_the_later_of_two_slow_copies() -> None:
    sources = [
        SimulatedSource("slow", 0.1 * MIB),
        SimulatedSource("slower", 0.08 * MIB),
        SimulatedSource("fast", 50 * MIB, joins_at=4.0),
    ]
    world = SwarmWorld([1 * MIB], sources, progress_bytes=16 << 10)
    assert world.run() < 5.5


def test_near_the_end_a_slow_source_leaves_the_rest_to_a_fast_one() -> None:
    driver = Driver(30)
    driver.join("fast")
    driver.act()
    driver.warm_up("fast", 10.0)
    driver.join("slow", holds={0: "*"})
    driver.act()
    driver.warm_up("slow", 0.25)  # 8 s for its two chunks; 2.6 s would do for all
    driver.act()
    assert "slow" not in driver.requests
    deadline = driver.planner.next_deadline(driver.now)
    assert deadline is not None
    assert deadline <= driver.now + 0.25
    driver.planner.remove_source(driver.now, "fast")
    assert {request.source for request in driver.act()} == {"slow"}


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
        assert SwarmWorld([100 * MIB], sources, seed=seed).run() <= 1.05 * best_s


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


def test_span_of_a_short_last_chunk() -> None:
    driver = Driver(sizes=[2 * MIB + 1])
    driver.join("a")
    driver.act()
    driver.warm_up("a", 100.0)
    driver.act()
    while driver.requests.get("a"):
        driver.answer(driver.requests["a"].pop())
        driver.act()
    assert driver.planner.is_done()
    assert driver.planner.missing_bytes == 0
    assert driver.planner.statistics().proved_bytes == 3 * MIB  # as the caller counted them
    assert Span(0, 2, 1) not in driver.requests.get("a", [])
    assert math.isfinite(driver.now)
