"""Random worlds, and the planner's tables against the plainest possible ones."""

from __future__ import annotations

import math
import random
from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from tensorswarm.p2p.swarm.chunk_map import BLOCK_CHUNKS, ChunkMap
from tensorswarm.p2p.swarm.picker import Picker
from tensorswarm.p2p.swarm.planner import PlannerLimits, SourceKind
from tensorswarm.p2p.swarm.source import Failure
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, chunk_length
from tests.support.swarm_world import MIB, Chunk, SimulatedSource, SwarmWorld

SIZES = st.one_of(st.sampled_from([0, 1, 1000, MIB - 1, MIB, MIB + 1]), st.integers(1, 30 * MIB))
BLOCK = st.integers(0, (1 << BLOCK_CHUNKS) - 1)


@st.composite
def worlds(draw: st.DrawFn, *, may_leave: bool = True) -> SwarmWorld:
    """Sources of every sort, and one honest source of everything that stays."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=8))
    everything = [(i, c) for i, size in enumerate(sizes) for c in range(chunk_count(size))]
    rng = draw(st.randoms(use_true_random=False))

    def some(share: float) -> list[Chunk]:
        return [chunk for chunk in everything if rng.random() < share]

    def by_object(chunks: list[Chunk]) -> dict[int, frozenset[int]]:
        return {i: frozenset(c for j, c in chunks if i == j) for i in range(len(sizes))}

    sources = []
    for number in range(draw(st.integers(0, 6))):
        stalls_at = draw(st.sampled_from([math.inf, math.inf, rng.uniform(0.0, 5.0)]))
        sources.append(
            SimulatedSource(
                f"source-{number}",
                rate_bytes_per_s=draw(st.sampled_from([0.3, 1.0, 5.0, 20.0, 100.0])) * MIB,
                latency_s=rng.uniform(0.0, 0.5),
                kind=draw(st.sampled_from(SourceKind)),
                distance=draw(st.integers(0, 2)),
                holds=draw(st.sampled_from([None, by_object(some(0.5)), by_object(some(0.1))])),
                claims=draw(st.sampled_from([None, by_object(everything)])),
                lies=frozenset(some(draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 1.0])))),
                joins_at=draw(st.sampled_from([0.0, 0.0, rng.uniform(0.0, 4.0)])),
                leaves_at=rng.uniform(0.0, 10.0) if may_leave and rng.random() < 0.3 else math.inf,
                stalls_at=stalls_at,
                wakes_at=stalls_at + draw(st.sampled_from([1.0, 4.0, math.inf])),
            )
        )
    honest_rate = draw(st.sampled_from([0.5, 5.0, 50.0])) * MIB
    sources.append(SimulatedSource("honest", honest_rate, latency_s=rng.uniform(0.0, 0.5)))
    rng.shuffle(sources)
    return SwarmWorld(
        sizes,
        sources,
        seed=draw(st.integers(0, 1 << 30)),
        priorities={i: rng.randint(-1, 2) for i in range(len(sizes))} if rng.random() < 0.3 else {},
        proved={
            i: bytes(rng.randrange(256) for _ in range(chunk_count(size) // 8 + 1))
            for i, size in enumerate(sizes)
            if rng.random() < 0.2
        },
        limits=PlannerLimits(near_first=draw(st.booleans())),
    )


@given(worlds())
def test_a_download_ends_when_somebody_honest_has_everything(world: SwarmWorld) -> None:
    # The world checks each request: held, wanted, not asked twice, within the limits,
    # and that nothing is in flight without a deadline.
    wanted_bytes = world.planner.missing_bytes
    world.run(until=5000.0)
    statistics = world.planner.statistics()
    assert world.planner.is_done()
    assert world.missing == 0
    assert statistics.proved_bytes == wanted_bytes == world.given.total()
    assert {s.source: s.proved_bytes for s in statistics.sources if s.proved_bytes} == {
        name: given_bytes for name, given_bytes in world.given.items() if given_bytes
    }
    assert all(s.in_flight_bytes == s.in_flight_requests == 0 for s in statistics.sources)


@given(worlds())
def test_only_liars_are_dropped_as_liars_and_peers_at_the_first_lie(world: SwarmWorld) -> None:
    world.run(until=5000.0)
    verdicts = Counter(drop.source for _, drop in world.drops if drop.failure is Failure.BAD_BYTES)
    for source in world.planner.statistics().sources:
        simulated = world.sources[source.source]
        assert bool(source.refused_bytes) <= bool(simulated.lies)
        is_caught = source.refused_bytes > 0 and source.kind is SourceKind.PEER
        assert verdicts[source.source] == is_caught
        assert (source.dropped is Failure.BAD_BYTES) == is_caught
        if is_caught:
            assert source.refused_bytes <= CHUNK_SIZE


@given(worlds(may_leave=False))
def test_a_steady_honest_source_is_never_dropped(world: SwarmWorld) -> None:
    world.run(until=5000.0)
    # With 0.5 MiB/s and a first byte within half a second it is neither silent nor slow.
    assert all(drop.source != "honest" for _, drop in world.drops)


@given(
    rates=st.lists(st.sampled_from([1.0, 2.0, 5.0, 10.0, 40.0]), min_size=1, max_size=5),
    chunks=st.integers(200, 400),
    seed=st.integers(0, 1000),
)
def test_steady_sources_together_come_near_the_ideal(
    rates: list[float], chunks: int, seed: int
) -> None:
    sources = [SimulatedSource(f"s{i}", rate * MIB) for i, rate in enumerate(rates)]
    took_s = SwarmWorld([chunks * MIB], sources, seed=seed).run()
    ideal_s = chunks / sum(rates)
    # One chunk of a slow source may have to be fetched again by a faster one.
    assert took_s <= 1.1 * ideal_s + 0.2


@given(worlds())
def test_the_same_events_give_the_same_actions(world: SwarmWorld) -> None:
    def asks() -> list[object]:
        twin = SwarmWorld(world.sizes, list(world.sources.values()), seed=1)
        twin.run(until=5000.0)
        return [twin.asks, twin.cancels, twin.drops]

    assert asks() == asks()


# the tables


def make_map(
    sizes: list[int],
    proved: dict[int, bytes] | None = None,
    priorities: dict[int, int] | None = None,
) -> ChunkMap:
    return ChunkMap(sizes, proved or {}, priorities or {}, max_chunks=1 << 20, max_priorities=256)


@given(st.lists(st.tuples(BLOCK, st.booleans()), max_size=20), BLOCK)
def test_rarity_is_what_counting_gives(steps: list[tuple[int, bool]], candidates: int) -> None:
    assume(candidates)
    chunks = make_map([BLOCK_CHUNKS * CHUNK_SIZE])
    counted: list[int] = []
    for mask, is_added in steps:
        if is_added and mask:
            chunks.add_holder(0, mask)
            counted.append(mask)
        elif counted:
            chunks.remove_holder(0, counted.pop())
    counts = [sum(mask >> i & 1 for mask in counted) for i in range(BLOCK_CHUNKS)]
    for at_least in (1, 2, 3, 5):
        held = {i for i in range(BLOCK_CHUNKS) if chunks.held_by(0, at_least) >> i & 1}
        assert held == {i for i in range(BLOCK_CHUNKS) if counts[i] >= at_least}
    assert chunks.counted_blocks == (any(counts) and 1)

    def leading_bits(count: int) -> int:
        spare = max(count.bit_length() - 2, 0)
        return count >> spare << spare

    members = [i for i in range(BLOCK_CHUNKS) if candidates >> i & 1]
    fewest = min(leading_bits(counts[i]) for i in members)
    expected = sum(1 << i for i in members if leading_bits(counts[i]) == fewest)
    assert chunks.rarest(0, candidates) == (fewest, expected)


@given(st.lists(SIZES, min_size=1, max_size=8), st.data())
def test_positions_and_spans_agree_with_sizes(sizes: list[int], data: st.DataObject) -> None:
    priorities = data.draw(st.dictionaries(st.integers(0, len(sizes) - 1), st.integers(-2, 2)))
    proved = {i: data.draw(st.binary(min_size=0, max_size=6)) for i in range(len(sizes)) if i % 2}
    chunks = make_map(sizes, proved, priorities)
    everything = [(i, c) for i, size in enumerate(sizes) for c in range(chunk_count(size))]
    positions = {chunk: chunks.position(*chunk) for chunk in everything}
    assert len(set(positions.values())) == len(everything)
    missing = set()
    for (index, chunk), position in positions.items():
        assert chunks.locate(position) == (index, chunk)
        assert chunks.size_at(position) == chunk_length(sizes[index], chunk)
        byte = proved.get(index, b"")[chunk // 8 : chunk // 8 + 1]
        is_proved = bool(byte and byte[0] >> chunk % 8 & 1)
        assert chunks.is_proved(position) == is_proved
        if not is_proved:
            missing.add((index, chunk))
    assert chunks.missing_chunks == len(missing)
    assert chunks.missing_bytes == sum(chunk_length(sizes[i], c) for i, c in missing)
    by_position = sorted(positions, key=positions.__getitem__)
    urgency = [priorities.get(index, 0) for index, _ in by_position]
    assert urgency == sorted(urgency)
    free = sum(mask.bit_count() for mask in chunks.free)
    assert free == len(missing)


@given(st.lists(SIZES, min_size=1, max_size=8), st.data())
def test_a_cut_run_is_within_its_limits_and_no_shorter_than_needed(
    sizes: list[int], data: st.DataObject
) -> None:
    everything = [(i, c) for i, size in enumerate(sizes) for c in range(chunk_count(size))]
    assume(everything)
    chunks = make_map(sizes)
    start = data.draw(st.integers(0, len(everything) - 1))
    width = data.draw(st.integers(1, len(everything) - start))
    room_bytes = data.draw(st.integers(0, 20 * MIB))
    max_spans = data.draw(st.integers(1, 5))
    spans, count, size_bytes = chunks.fit(start, width, room_bytes, max_spans)
    covered = [(s.object_index, s.first_chunk + k) for s in spans for k in range(s.count)]
    assert covered == everything[start : start + count]
    assert size_bytes == sum(chunk_length(sizes[i], c) for i, c in covered) <= room_bytes
    assert len(spans) <= max_spans
    if count < width:
        index, chunk = everything[start + count]
        would_be = size_bytes + chunk_length(sizes[index], chunk)
        is_new_span = not covered or covered[-1][0] != index
        assert would_be > room_bytes or (is_new_span and len(spans) == max_spans)


@given(BLOCK, st.integers(0, 1000))
def test_the_longest_run_is_the_longest(mask: int, seed: int) -> None:
    assume(mask)
    chunks = make_map([BLOCK_CHUNKS * CHUNK_SIZE])
    picker = Picker(chunks, random.Random(seed), PlannerLimits())
    start, width = picker.longest_run(mask)
    assert mask >> start & ((1 << width) - 1) == (1 << width) - 1
    assert width == max(map(len, f"{mask:b}".split("0")))
