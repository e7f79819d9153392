"""Origin duty, upload slots and membership, each by itself."""

from __future__ import annotations

import math
import random
from collections import Counter

from tensorswarm.p2p.swarm.membership import Membership, MembershipLimits
from tensorswarm.p2p.swarm.origin_duty import rank_of
from tensorswarm.p2p.swarm.planner import Ask, PassOn, Planner, PlannerLimits, SourceKind
from tensorswarm.p2p.swarm.source import Span
from tensorswarm.p2p.swarm.upload_slots import OFFER_S, PASSED_S, UploadSlots
from tensorswarm.store.digest import CHUNK_SIZE

KEY = b"k" * 32
NAMES = [f"member-{i}" for i in range(8)]
RANKED = sorted(NAMES, key=lambda name: -rank_of(KEY, name))


def member(me: str, chunks: int = 64, limits: PlannerLimits | None = None) -> Planner:
    planner = Planner([chunks * CHUNK_SIZE], rng=random.Random(me), limits=limits)
    planner.set_members(0.0, KEY, me, [name for name in NAMES if name != me])
    planner.add_source(0.0, "origin", SourceKind.ORIGIN)
    planner.source_holds_all(0.0, "origin")
    return planner


def asked(planner: Planner, now: float) -> list[tuple[int, int]]:
    """Return the request ids and chunks that a planner asks for now."""
    return [
        (action.request.request_id, span.first_chunk)
        for action in planner.actions(now)
        if isinstance(action, Ask)
        for span in action.request.spans
    ]


def test_members_on_duty_fetch_each_chunk_once_and_evenly() -> None:
    planners = {name: member(name) for name in NAMES}
    taken: Counter[int] = Counter()
    given: Counter[str] = Counter()
    for turn in range(200):
        now = turn * 0.1
        for name, planner in planners.items():
            for request_id, chunk in asked(planner, now):
                taken[chunk] += 1
                given[name] += 1
                planner.chunk_proved(now, "origin", 0, chunk, CHUNK_SIZE)
                planner.request_done(now, "origin", request_id)
                for other, each in planners.items():
                    if other != name:  # all are neighbours, and hear of it at once
                        each.chunk_proved(now, None, 0, chunk, 0)
    assert sum(taken.values()) == len(taken) == 64
    assert set(given) == set(RANKED[: PlannerLimits().duty_members])
    assert max(given.values()) - min(given.values()) <= 16


def test_an_origin_gets_the_next_request_shortly_before_the_last_answer_is_whole() -> None:
    # But a slow one when it is whole: it would serve two requests at half the speed.
    for chunk_s, next_at in ((0.2, 0.35), (2.0, math.inf)):
        planner = member(RANKED[0])
        ((request_id, chunk),) = asked(planner, 0.0)
        planner.progress(chunk_s, "origin", request_id, CHUNK_SIZE)
        planner.chunk_proved(chunk_s, "origin", 0, chunk, CHUNK_SIZE)
        planner.request_done(chunk_s, "origin", request_id)
        ((request_id, chunk),) = asked(planner, chunk_s)
        assert not asked(planner, min(next_at, 2 * chunk_s) - 0.01)
        planner.progress(2 * chunk_s, "origin", request_id, CHUNK_SIZE - 1)
        assert bool(asked(planner, 2 * chunk_s)) == (next_at < math.inf)


def test_who_gets_nothing_takes_a_turn_the_later_the_lower_it_ranks() -> None:
    limits = PlannerLimits()
    starts = {}
    for name in RANKED:
        planner = member(name)
        now = 0.0
        while not asked(planner, now):
            deadline = planner.next_deadline(now)
            assert deadline is not None and deadline > now
            now = deadline
        starts[name] = now
    on_duty = RANKED[: limits.duty_members]
    first = [starts[name] for name in on_duty[: limits.duty_first]]
    assert first == [rank * limits.duty_stagger_s for rank in range(limits.duty_first)]
    assert all(starts[name] <= 2 * limits.duty_patience_s for name in on_duty)
    others = [starts[name] for name in RANKED[limits.duty_members :]]
    assert others == sorted(others)
    assert others[0] >= limits.duty_patience_s
    assert len(set(others)) == len(others)


def test_all_on_duty_ask_as_soon_as_something_was_heard_of() -> None:
    limits = PlannerLimits()
    for name in RANKED[limits.duty_first : limits.duty_members]:
        planner = member(name)
        assert not asked(planner, 0.0)
        planner.add_source(0.1, "peer", SourceKind.PEER, makes_offers=True)
        planner.source_holds(0.1, "peer", 0, b"\x01")
        assert asked(planner, 0.1)


def test_what_a_neighbour_has_is_not_asked_of_the_origin() -> None:
    asks = []
    for name in NAMES:
        planner = member(name, chunks=8)
        planner.add_source(0.0, "peer", SourceKind.PEER, makes_offers=True)
        planner.source_holds(0.0, "peer", 0, b"\xfe")
        asks += asked(planner, 0.0)
    assert asks == [(1, 0)]


def test_what_only_a_goer_had_is_asked_of_the_origin_and_nothing_else() -> None:
    asks = []
    for name in RANKED[: PlannerLimits().duty_members]:
        planner = member(name, chunks=8)
        for peer, held in (("goer", b"\xff"), ("other", b"\x0f")):
            planner.add_source(0.0, peer, SourceKind.PEER, makes_offers=True)
            planner.source_holds(0.0, peer, 0, held)
        assert not asked(planner, 0.0)  # every chunk was looked at, and is held by a peer
        planner.remove_source(0.1, "goer")
        asks += [chunk for _, chunk in asked(planner, 0.1)]
    assert asks
    assert min(asks) >= 4


def test_an_offer_is_taken_up_answered_with_something_else_or_passed() -> None:
    planner = member(RANKED[-1], chunks=8)
    planner.add_source(0.0, "peer", SourceKind.PEER, makes_offers=True)
    planner.source_holds(0.0, "peer", 0, b"\x0c")
    assert not asked(planner, 0.1)  # it makes offers: nobody asks before
    planner.source_offers(0.1, "peer", 0, 3)
    assert [chunk for _, chunk in asked(planner, 0.1)] == [3]
    planner.source_offers(0.2, "peer", 0, 3)  # on its way already
    assert [chunk for _, chunk in asked(planner, 0.2)] == [2]
    planner.source_offers(0.3, "peer", 0, 3)
    assert planner.actions(0.3) == [PassOn("peer", 0)]


def test_a_peer_that_never_offers_is_asked_in_the_end() -> None:
    planner = Planner([4 * CHUNK_SIZE], rng=random.Random(1))
    planner.set_members(0.0, KEY, "me", ["peer"])
    planner.add_source(0.0, "peer", SourceKind.PEER, makes_offers=True)
    planner.source_holds_all(0.0, "peer")
    now = 0.0
    while not (actions := planner.actions(now)):
        deadline = planner.next_deadline(now)
        assert deadline is not None and deadline < 10
        now = deadline
    assert isinstance(actions[0], Ask)
    assert actions[0].request.spans[0].count == 1


def test_an_origin_far_ahead_of_all_peers_is_asked_freely() -> None:
    planner = member(RANKED[-1], chunks=2000)
    planner.add_source(0.0, "peer", SourceKind.PEER, makes_offers=True)
    planner.source_holds_all(0.0, "peer")
    now, spans = 0.0, list[Span]()
    while now < 20 and len(spans) < 50:
        for action in planner.actions(now):
            if isinstance(action, Ask) and action.request.source == "origin":
                for span in action.request.spans:
                    spans.append(span)
                    for chunk in range(span.first_chunk, span.first_chunk + span.count):
                        now += 0.01
                        planner.progress(now, "origin", action.request.request_id, CHUNK_SIZE)
                        planner.chunk_proved(now, "origin", 0, chunk, CHUNK_SIZE)
                planner.request_done(now, "origin", action.request.request_id)
        now = max(now + 0.001, min(planner.next_deadline(now) or now, now + 1))
    assert len(spans) >= 50  # though it is not on duty, and a silent peer holds everything


def test_an_origin_almost_as_slow_as_the_peers_is_asked_for_our_own_chunks_alone() -> None:
    """A chunk takes seconds: for a moment nothing has come of the peers, again and again."""
    planner = member(RANKED[0], chunks=600)
    planner.add_source(0.0, "peer", SourceKind.PEER)
    planner.source_holds(0.0, "peer", 0, bytes(25) + b"\xff" * 50)
    asks, in_flight = list[int](), list[tuple[float, str, int, int]]()
    for now in map(float, range(800)):
        for action in planner.actions(now):
            if isinstance(action, Ask):
                request = action.request
                chunk = request.spans[0].first_chunk
                takes_s = 3 if request.source == "origin" else 8
                in_flight.append((now + takes_s, request.source, request.request_id, chunk))
                asks += [chunk] if request.source == "origin" else []
        for done_at, source, request_id, chunk in list(in_flight):
            planner.progress(now, source, request_id, CHUNK_SIZE // 8)
            if done_at <= now:
                in_flight.remove((done_at, source, request_id, chunk))
                planner.chunk_proved(now, source, 0, chunk, CHUNK_SIZE)
                planner.request_done(now, source, request_id)
    assert len(asks) > 20
    assert max(asks) < 200  # the peer holds what comes behind


# upload slots


def make_slots(slots: int = 1, ahead: int = 1) -> UploadSlots:
    made = UploadSlots(slots, ahead, random.Random(1))
    for peer in "abc":
        made.peer_has(peer, 0)
    return made


def test_the_rarest_chunk_is_offered_to_somebody_who_lacks_it() -> None:
    slots = make_slots(ahead=0)
    slots.held = 0b111
    slots.peer_has("a", 0b011)
    slots.peer_has("b", 0b101)
    slots.peer_has("c", 0b011)
    assert slots.offers(0.0)[0] in [("a", 2), ("c", 2)]


def test_a_seed_offers_every_chunk_once_before_any_twice() -> None:
    slots = make_slots(ahead=0)
    slots.held = (1 << 30) - 1
    offered: list[int] = []
    while len(offered) < 30:
        now = float(len(offered))
        made = slots.offers(now)
        assert len(made) == 1
        for peer, chunk in made:
            offered.append(chunk)
            assert slots.ask(peer, len(offered), chunk)
        while begun := slots.begin():
            for each in begun:
                slots.end(each.peer, each.ticket)
                slots.peer_has(each.peer, 1 << each.chunk)
    assert len(set(offered)) == 30


def test_the_eager_offer_more_while_idle_and_for_what_nobody_has() -> None:
    for is_eager, count in ((False, 1), (True, 3)):
        slots = UploadSlots(1, 0, random.Random(1), is_eager=is_eager)
        slots.held = 0b111111
        for peer in "abcdef":
            slots.peer_has(peer, 0)
        assert len(slots.offers(0.0)) == count


def test_an_offer_to_somebody_who_has_all_by_now_gives_way_to_another() -> None:
    slots = UploadSlots(1, 0, random.Random(1))
    slots.held = 1
    slots.peer_has("a", 0)
    assert slots.offers(0.0) == [("a", 0)]
    assert not slots.peer_has("b", 0)
    assert slots.peer_has("a", 1)
    assert slots.offers(0.0) == [("b", 0)]


def test_offers_lapse_and_who_passed_is_left_alone_for_a_while() -> None:
    slots = UploadSlots(1, 0, random.Random(1))
    slots.peer_has("a", 0)
    slots.held = 1
    assert slots.offers(0.0) == [("a", 0)]
    assert slots.offers(0.5) == []
    assert slots.next_deadline(0.5) == OFFER_S
    slots.passed(0.6, "a")
    assert slots.offers(0.6) == []
    assert slots.offers(0.6 + PASSED_S) == [("a", 0)]
    assert slots.offers(5.0) == []  # it lapsed, and the peer is left alone
    assert slots.offers(5.0 + OFFER_S) == [("a", 0)]


def test_one_request_at_a_time_and_offered_ones_first() -> None:
    slots = make_slots(ahead=0)
    slots.held = 0b11
    slots.peer_has("c", 0b11)
    (invited, _), *_ = slots.offers(0.0)
    stranger = "c"
    assert slots.ask(stranger, 1, 0)
    assert slots.ask(invited, 2, 1)
    assert [each.peer for each in slots.begin()] == [invited]
    assert slots.begin() == []
    slots.end(invited, 2)
    assert [each.peer for each in slots.begin()] == [stranger]


def test_one_peer_cannot_fill_the_queue() -> None:
    slots = make_slots()
    taken = [slots.ask("a", ticket, 0) for ticket in range(100)]
    assert taken.index(False) == sum(taken) < 20
    assert slots.forget("a") == []
    assert slots.begin() == []


# membership


def test_nobody_is_crowded_out_by_one_liar_and_hearsay_is_forgotten() -> None:
    limits = MembershipLimits()
    known = Membership(KEY, "me", random.Random(1), limits)
    known.heard(0.0, (f"made-up-{i}" for i in range(10_000)), "liar")
    assert len(known.members(0.0)) == limits.max_hearsay_per_teller
    known.heard(0.0, ["real"], "honest")
    assert "real" in known.members(0.0)
    for i in range(10_000):
        known.heard(1.0, [f"more-{i}"], f"teller-{i}")
    assert len(known.members(1.0)) <= limits.max_members
    known.met("friend")
    assert known.members(1.0 + 2 * limits.hearsay_s) == ["friend"]


def test_the_first_by_rank_are_always_named_and_find_each_other() -> None:
    names = [f"n{i}" for i in range(300)]
    first = sorted(names, key=lambda name: -rank_of(KEY, name))[:5]
    known = Membership(KEY, first[0], random.Random(1))
    known.heard(0.0, names[:150], "a")
    known.heard(0.0, names[150:], "b")
    told = known.to_tell(0.0)
    assert len(told) == MembershipLimits().exchange
    assert set(first[1:]) <= set(told)
    assert set(first[1:]) <= set(known.to_dial(0.0, [], []))
    assert len(known.to_dial(0.0, [], [])) == MembershipLimits().dials


def test_a_full_table_still_lets_the_first_by_rank_in() -> None:
    names = sorted((f"n{i}" for i in range(3_000)), key=lambda name: -rank_of(KEY, name))
    first, others = names[:8], names[8:]
    limits = MembershipLimits()
    known = Membership(KEY, "me", random.Random(1), limits)
    for i in range(0, len(others), 100):
        known.heard(0.0, others[i : i + 100], f"teller-{i}")
    assert len(known.members(0.0)) == limits.max_members
    known.heard(0.0, first, "late")
    assert known.first_on_call(0.0)[:8] == first
    assert len(known.members(0.0)) == limits.max_members


def test_a_revision_tells_when_the_first_by_rank_change() -> None:
    names = sorted((f"n{i}" for i in range(100)), key=lambda name: -rank_of(KEY, name))
    known = Membership(KEY, "me", random.Random(1))
    seen = {}
    for name in random.Random(2).sample(names, len(names)):
        known.met(name)
        now = tuple(known.first_on_call(0.0))
        assert seen.setdefault(known.revision(0.0), now) == now
    before = known.revision(0.0)
    known.left(0.0, names[-1])
    assert known.revision(0.0) == before
    known.finished(names[0])
    assert known.revision(0.0) > before
    assert known.first_on_call(0.0) == names[1:33]


def test_the_chosen_neighbour_that_gave_least_is_let_go_but_no_colleague() -> None:
    known = Membership(KEY, RANKED[-1], random.Random(1), MembershipLimits(dials=3))
    for name in RANKED[:6]:
        known.met(name)
    known.heard(0.0, ["somebody new"], RANKED[0])
    chosen = RANKED[:3]
    given = {RANKED[0]: 5, RANKED[1]: 0, RANKED[2]: 3}
    assert known.to_drop(0.0, RANKED[:6], chosen, given) == RANKED[1]
    assert known.to_drop(0.0, RANKED[:6], chosen[:2], given) is None


def test_requests_without_an_offer_do_not_keep_a_node_from_offering() -> None:
    """Else who is asked much never says that it makes offers, and is asked ever more."""
    slots = UploadSlots(1, 1, random.Random(1))
    slots.held = 0b1111
    for name in "abc":
        slots.set_peer(name, 0)
        for ticket in range(3):
            assert slots.ask(name, ticket, ticket)
    assert len(slots.begin()) == 1
    assert len(slots.offers(0.0)) == 1
    (offered,) = slots._offered
    assert slots.ask(offered, 9, 3)
    assert not slots.offers(0.1)  # that one waits, before all others
    slots.end(*next(iter(slots.active)))
    assert slots.begin() == [(offered, 9, 3)]
    assert len(slots.offers(0.2)) == 1


def test_what_a_neighbour_holds_all_of_is_not_asked_of_the_origin() -> None:
    """Who has finished has announced everything, in whatever words."""
    planner = Planner([8 * CHUNK_SIZE], rng=random.Random(1), keys=[b"k" * 32])
    planner.add_source(0.0, "origin", SourceKind.ORIGIN)
    planner.source_holds_whole(0.0, "origin", [0])
    planner.add_source(0.0, "done", SourceKind.PEER, makes_offers=True)
    planner.source_holds_all(0.0, "done")
    planner.set_members(0.0, KEY, "me", ["other"])
    asked = [each for each in planner.actions(0.0) if isinstance(each, Ask)]
    assert all(each.request.source != "origin" for each in asked)
