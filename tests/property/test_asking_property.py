"""Who is asked, and who is asked again: random swarms and random failures, in virtual time.

Nobody asks for a chunk that somebody is sending him already, unless nothing else is left to
ask for, nor the origin for what a neighbour has told him of. And a source that failed for a
passing reason and comes back is asked again, for what is still missing; a liar never is.
"""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.p2p.known_source import PASSING, RETRY_PAUSES_S, KnownSource
from tensorswarm.p2p.swarm.planner import Ask, Drop, Planner, SourceKind
from tensorswarm.p2p.swarm.source import Failure, Request
from tensorswarm.simulations.peer import Nature, SimulatedPeer
from tensorswarm.simulations.peer import chunks_of as numbered_chunks_of
from tensorswarm.simulations.world import Setup, World
from tensorswarm.store.digest import CHUNK_SIZE
from tests.support.swarm_driver import chunks_of

RATE = 10.0 * CHUNK_SIZE


class Asked:
    """Holds every request of every node against what that node has asked before."""

    def __init__(self, world: World) -> None:
        self.count = 0
        self.broken: list[str] = []
        for peer in world.peers:
            self._watch(peer)

    def _watch(self, peer: SimulatedPeer) -> None:
        ask = peer._ask

        def watched(request: Request) -> None:
            self._look(peer, request)
            ask(request)

        peer._ask = watched  # type: ignore[method-assign]

    def _look(self, peer: SimulatedPeer, request: Request) -> None:
        under_way: dict[int, list[str]] = {}
        for (source, _), earlier in peer.in_flight.items():
            for _, chunk in numbered_chunks_of(earlier.spans):
                under_way.setdefault(chunk, []).append(source)
        missing = peer.wants & ~peer.has
        is_all_asked_for = all(
            chunk in under_way for chunk in range(missing.bit_length()) if missing >> chunk & 1
        )
        for _, chunk in numbered_chunks_of(request.spans):
            self.count += 1
            senders = under_way.get(chunk, [])
            what = f"{peer.name} asks {request.source} for {chunk}, which {senders} send"
            if request.source in senders or len(senders) > 1 or senders and not is_all_asked_for:
                self.broken.append(what)


@settings(max_examples=40)
@given(
    nodes=st.integers(2, 10),
    chunks=st.integers(1, 40),
    latency_s=st.sampled_from([0.0, 0.005, 0.02, 0.1]),
    starts_s=st.sampled_from([0.0, 0.1, 2.0]),
    makes_offers=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_nobody_asks_for_what_he_was_told_somebody_is_sending_him(
    nodes: int, chunks: int, latency_s: float, starts_s: float, makes_offers: bool, seed: int
) -> None:
    rng = random.Random(seed)
    setup = Setup(chunks, latency_s=latency_s, origin_bytes_per_s=RATE, makes_offers=makes_offers)
    natures = [Nature(RATE, math.inf, starts_at=rng.random() * starts_s) for _ in range(nodes)]
    world = World(setup, natures, seed)
    asked = Asked(world)
    world.run()
    assert not world.checker.failures
    assert not asked.broken
    assert asked.count >= nodes * chunks


passing = st.sampled_from(sorted(PASSING, key=lambda failure: failure.value))


@given(
    chunks=st.integers(1, 30),
    kind=st.sampled_from(list(SourceKind)),
    lives=st.lists(st.tuples(passing, st.integers(0, 6), st.booleans()), max_size=9),
    in_crowd=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_a_source_that_failed_and_comes_back_is_asked_again(
    chunks: int,
    kind: SourceKind,
    lives: list[tuple[Failure, int, bool]],
    in_crowd: bool,
    seed: int,
) -> None:
    planner = Planner([chunks * CHUNK_SIZE], rng=random.Random(seed))
    known = KnownSource(kind)
    now, failed = 0.0, 0
    if in_crowd:
        planner.set_members(now, b"key", "me", ["somebody"])
    for failure, given_chunks, is_whole in [*lives, (None, chunks, False)]:
        planner.add_source(now, "source", kind)
        planner.source_holds_all(now, "source")
        if not planner.missing_chunks:
            return
        open_requests: list[Request] = []
        for turn in range(given_chunks + 1):
            now, asked = asked_from(planner, now)
            open_requests += asked
            assert open_requests, "nobody asks it"
            if turn == given_chunks:
                break
            request = open_requests[0]
            left = planner.unanswered("source", request.request_id)
            planner.chunk_proved(now, "source", *left[0], CHUNK_SIZE)
            known.came_back()
            failed = 0
            if len(left) == 1:
                planner.request_done(now, "source", open_requests.pop(0).request_id)
            if not planner.missing_chunks:
                return
        assert failure is not None, "the last life gives everything"
        request_id = None if is_whole else open_requests[0].request_id
        planner.request_failed(now, "source", request_id, failure)
        drops = [action for action in planner.actions(now) if isinstance(action, Drop)]
        assert [(drop.source, drop.failure) for drop in drops] == [("source", failure)]
        known.give_up(now, failure, "")
        assert not known.banned
        pause_s = RETRY_PAUSES_S[min(failed, len(RETRY_PAUSES_S) - 1)]
        assert known.retry_at == now + pause_s
        assert not [a for a in planner.actions(now) if isinstance(a, Ask)]
        now, failed = known.retry_at, failed + 1


def asked_from(planner: Planner, now: float) -> tuple[float, list[Request]]:
    """Return the requests of now, or of the planner's next deadlines, and when they came."""
    for _ in range(50):
        asked = [a.request for a in planner.actions(now) if isinstance(a, Ask)]
        in_flight = sum(each.in_flight_requests for each in planner.statistics().sources)
        if asked or in_flight:
            return now, asked
        deadline = planner.next_deadline(now)
        assert deadline is not None, "it waits for nothing"
        now = max(now, deadline)
    raise AssertionError("it wakes up again and again, and asks for nothing")


@given(chunks=st.integers(2, 30), seed=st.integers(0, 1 << 30), pause_s=st.floats(0.0, 1000.0))
def test_a_liar_that_comes_back_is_never_asked_again(
    chunks: int, seed: int, pause_s: float
) -> None:
    planner = Planner([chunks * CHUNK_SIZE], rng=random.Random(seed))
    known = KnownSource(SourceKind.PEER)
    planner.add_source(0.0, "liar", SourceKind.PEER)
    planner.source_holds_all(0.0, "liar")
    _, (request, *_) = asked_from(planner, 0.0)
    planner.chunk_refused(0.1, "liar", *chunks_of(request)[0])
    known.give_up(0.1, Failure.BAD_BYTES, "")
    assert known.banned and known.retry_at is None
    planner.actions(0.1)
    planner.add_source(0.1 + pause_s, "liar", SourceKind.PEER)
    planner.source_holds_all(0.1 + pause_s, "liar")
    actions = planner.actions(0.1 + pause_s)
    assert [(type(a), a.source) for a in actions if not isinstance(a, Ask)] == [(Drop, "liar")]
    assert not [action for action in actions if isinstance(action, Ask)]
