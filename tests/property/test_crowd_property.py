"""Random swarms around one planner: members, origins and peers that offer, come and go.

The world checks each action as it comes (`tests.support.swarm_world`): what is asked for is
wanted, held, in flight at most twice and never twice at one source; a copy only when nothing
is free; a drop only for silence, slowness or lies; and the planner always names a deadline
while somebody honest who has everything is there.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.p2p.swarm.planner import Ask, Planner, PlannerLimits, SourceKind
from tensorswarm.p2p.swarm.source import Failure, Request
from tensorswarm.store.digest import CHUNK_SIZE, chunk_count
from tests.support.entries import count_entries
from tests.support.swarm_driver import chunks_of
from tests.support.swarm_world import MIB, Chunk, SimulatedSource, SwarmWorld

NAMES = [f"member-{i}" for i in range(12)]
PEER, ORIGIN = SourceKind.PEER, SourceKind.ORIGIN
EVENTS = 8000
RATES = [0.3, 1.0, 5.0, 20.0, 100.0]


def one_of_the_others(draw: st.DrawFn, name: str, chunks: list[Chunk]) -> SimulatedSource:
    """A source of any sort."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))

    def some(share: float) -> dict[int, frozenset[int]]:
        mine = [chunk for chunk in chunks if rng.random() < share]
        return {i: frozenset(c for j, c in mine if j == i) for i, _ in mine}

    stalls_at = rng.choice([math.inf, math.inf, rng.uniform(0.0, 5.0)])
    holds = draw(st.sampled_from([None, some(0.5), some(0.1), {}]))
    offers_every_s = draw(st.sampled_from([math.inf, 0.05, 0.5, 3.0]))
    gain_share = rng.choice([0.0, 0.2, 1.0]) if holds is not None else 0.0
    return SimulatedSource(
        name,
        rate_bytes_per_s=draw(st.sampled_from(RATES)) * MIB,
        latency_s=rng.uniform(0.0, 0.5),
        kind=draw(st.sampled_from([PEER, PEER, ORIGIN])),
        holds=holds,
        claims=rng.choice([None, None, None, some(1.0)]),
        lies=frozenset(c for c in chunks if rng.random() < rng.choice([0.0, 0.0, 0.0, 0.3])),
        joins_at=rng.choice([0.0, 0.0, rng.uniform(0.0, 4.0)]),
        leaves_at=rng.choice([math.inf, math.inf, rng.uniform(0.0, 10.0)]),
        stalls_at=stalls_at,
        wakes_at=stalls_at + rng.choice([1.0, 4.0, math.inf]),
        gains=[(rng.uniform(0.0, 8.0), chunk) for chunk in chunks if rng.random() < gain_share],
        makes_offers=offers_every_s < math.inf or rng.random() < 0.3,
        offers_every_s=offers_every_s,
    )


@st.composite
def swarms(draw: st.DrawFn, *, ends_alone: bool = False) -> Callable[[], SwarmWorld]:
    """Make worlds, all the same, with one honest source of everything that stays."""
    sizes = draw(st.lists(st.integers(1, 12 * MIB), min_size=1, max_size=4))
    chunks = [(i, c) for i, size in enumerate(sizes) for c in range(chunk_count(size))]
    others = [one_of_the_others(draw, NAMES[i], chunks) for i in range(draw(st.integers(0, 5)))]
    honest = SimulatedSource(
        "honest",
        draw(st.sampled_from([0.5, 5.0, 50.0])) * MIB,
        latency_s=draw(st.sampled_from([0.0, 0.1, 0.5])),
        kind=draw(st.sampled_from([PEER, ORIGIN])),
        joins_at=draw(st.sampled_from([0.0, 2.0, 8.0])),
        makes_offers=draw(st.booleans()),
        offers_every_s=draw(st.sampled_from([math.inf, 0.2])),
    )
    seen = st.sets(st.sampled_from(NAMES), max_size=len(NAMES)).map(frozenset)
    members = draw(st.lists(st.tuples(st.floats(0.0, 10.0), seen), max_size=5))
    members.append((draw(st.sampled_from([0.0, 1.0])), frozenset(NAMES[: draw(st.integers(1, 9))])))
    sources = draw(st.permutations([*others, honest]))
    seed = draw(st.integers(0, 1 << 30))
    return lambda: SwarmWorld(sizes, sources, seed=seed, members=members)


@given(swarms())
def test_nobody_is_stuck_while_somebody_honest_has_everything(
    make: Callable[[], SwarmWorld],
) -> None:
    world = make()
    wanted_bytes = world.planner.missing_bytes
    world.run(until=5000.0)
    statistics = world.planner.statistics()
    assert world.planner.is_done()
    assert statistics.proved_bytes == wanted_bytes == world.given.total()
    assert all(s.in_flight_bytes == s.in_flight_requests == 0 for s in statistics.sources)
    # Only who sent wrong bytes was called a liar, and each of the peers that did.
    called = Counter(drop.source for _, drop in world.drops if drop.failure is Failure.BAD_BYTES)
    for source in statistics.sources:
        is_caught = source.kind is PEER and source.refused_bytes > 0
        assert called[source.source] == is_caught


@given(swarms())
def test_the_steady_honest_source_is_never_dropped(make: Callable[[], SwarmWorld]) -> None:
    world = make()
    world.run(until=5000.0)
    assert all(drop.source != "honest" for _, drop in world.drops)


@given(swarms())
def test_the_same_events_give_the_same_actions(make: Callable[[], SwarmWorld]) -> None:
    worlds = make(), make()
    for world in worlds:
        world.run(until=5000.0)
    one, other = [(w.now, w.asks, w.cancels, w.passes, w.drops) for w in worlds]
    assert one == other


# events in any order, sense or not


class Storm:
    """Tells a planner anything at all, and answers what it asks for now and then."""

    def __init__(self, seed: int, limits: PlannerLimits) -> None:
        self.rng = random.Random(seed)
        self.sizes = [self.rng.randint(1, 300) * CHUNK_SIZE for _ in range(3)]
        self.planner = Planner(self.sizes, rng=random.Random(seed), limits=limits)
        self.limits = limits
        self.now = 0.0
        self.open: list[Request] = []
        self._last = 0

    def name(self) -> str:
        """Return the name of somebody who may be there, or may have been."""
        return f"s{max(0, self._last - self.rng.randrange(12))}"

    def chunk(self) -> Chunk:
        index = self.rng.randrange(len(self.sizes))
        return index, self.rng.randrange(chunk_count(self.sizes[index]))

    def step(self) -> None:
        """Let one thing happen."""
        self.now += self.rng.choice([0.0, 0.01, 0.3])
        often = [self._come, self._come, self._hold, self._hold, self._offer, self._answer]
        self.rng.choice([*often, self._go, self._members, self._refuse, self._fail, self._lack])()
        if self.rng.random() < 0.1 and self.planner.next_deadline(self.now) is not None:
            self.now += 0.1
            asked = [a.request for a in self.planner.actions(self.now) if isinstance(a, Ask)]
            self.open = [*self.open, *asked][-50:]

    def _come(self) -> None:
        self._last += 1
        kind = PEER if self.rng.random() < 0.8 else ORIGIN
        name = self.name()
        self.planner.add_source(self.now, name, kind, makes_offers=self.rng.random() < 0.5)
        if self.rng.random() < 0.4:
            self.planner.source_holds_all(self.now, name)

    def _go(self) -> None:
        present = [each.source for each in self.planner.statistics().sources if each.is_present]
        if present:
            self.planner.remove_source(self.now, self.rng.choice(present))

    def _hold(self) -> None:
        index, _ = self.chunk()
        self.planner.source_holds(self.now, self.name(), index, self.rng.randbytes(20))

    def _offer(self) -> None:
        name = self.name()
        for _ in range(1 if self.rng.random() < 0.99 else 1000):
            self.planner.source_offers(self.now, name, *self.chunk())

    def _members(self) -> None:
        some = self.rng.sample(range(10_000), self.rng.randrange(10))
        self.planner.set_members(self.now, b"key", "me", [f"m{i}" for i in some])

    def _answer(self) -> None:
        if self.open and self.planner.missing_chunks > 50:
            request = self.open.pop(self.rng.randrange(len(self.open)))
            for chunk in chunks_of(request):
                if self.rng.random() < 0.3:
                    self.planner.chunk_proved(self.now, request.source, *chunk, CHUNK_SIZE)
            self.planner.request_done(self.now, request.source, request.request_id)

    def _refuse(self) -> None:
        if self.rng.random() < 0.05:  # a liar is never taken again
            self.planner.chunk_refused(self.now, self.name(), *self.chunk())

    def _fail(self) -> None:
        if self.open and self.rng.random() < 0.2:
            request = self.rng.choice(self.open)
            failure = self.rng.choice([f for f in Failure if f is not Failure.LOCAL])
            self.planner.request_failed(self.now, request.source, request.request_id, failure)

    def _lack(self) -> None:
        if self.rng.random() < 0.1:
            self.planner.source_lacks(self.now, self.name(), self.chunk()[0])


@settings(max_examples=8)
@given(st.integers(0, 1 << 30))
def test_tables_do_not_grow_with_the_number_of_events(seed: int) -> None:
    limits = PlannerLimits(
        max_sources=6,
        max_past_sources=8,
        max_refused_chunks=4,
        max_request_chunks=2,
        max_requests_per_source=2,
    )
    storm = Storm(seed, limits)
    blank = count_entries(storm.planner)
    blocks = 4
    in_flight = limits.max_requests_per_source * (1 + 3 * limits.max_request_chunks)
    per_source = 3 * blocks + limits.max_offers + in_flight + 6
    past = (limits.max_past_sources + limits.max_sources + 1) * (1 + limits.max_refused_chunks)
    turns = limits.duty_members + 1  # and in each some chunks for every member
    shared = blocks * turns * (turns + 1) + limits.duty_trial_chunks + 50
    most = blank + limits.max_sources * per_source + past + shared
    assert most < EVENTS / 10  # or an entry more with each tenth event would go unseen
    for number in range(EVENTS):
        storm.step()
        if number % 5 == 0:
            assert count_entries(storm.planner) <= most
