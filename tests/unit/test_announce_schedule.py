"""When keys are announced, over days of virtual time, and how much receivers are sent."""

from __future__ import annotations

import random

import pytest

from tensorswarm.p2p.dht import announce_schedule
from tensorswarm.p2p.dht.announce_schedule import (
    CROWDED_RETRY_S,
    MAX_RETRY_S,
    REPUBLISH_S,
    RETRY_S,
    Appetites,
    Schedule,
)
from tensorswarm.p2p.dht.lookup import kad_id
from tensorswarm.store.cid import dht_key

HOUR_S = 3600.0


def digests(count: int) -> list[bytes]:
    rng = random.Random(1)
    return [rng.randbytes(32) for _ in range(count)]


def confirmed(schedule: Schedule, now: float, keys: list[bytes]) -> None:
    schedule.report(now, keys, set(keys), set())


def test_every_key_is_announced_in_time_and_the_load_is_spread() -> None:
    schedule, keys = Schedule(), digests(2_200)
    assert schedule.add(0, keys) == keys
    confirmed(schedule, 0, keys)
    last = dict.fromkeys(keys, 0.0)
    busiest, now = 0, 0.0
    while now < 66 * HOUR_S:
        now += 600
        due = schedule.due(now, 10_000)
        busiest = max(busiest, len(due))
        for key in due:
            assert now - last[key] < REPUBLISH_S * 1.06, "within 24 of the record's 48 hours"
            last[key] = now
        confirmed(schedule, now, due)
    even = 2_200 * 600 / REPUBLISH_S
    assert busiest < 3 * even
    assert len(schedule.due(now + 24 * HOUR_S, 10_000)) == 2_200


def test_neighbours_in_the_key_space_come_due_together() -> None:
    schedule, keys = Schedule(), digests(1_000)
    schedule.add(0, keys)
    confirmed(schedule, 0, keys)
    half = REPUBLISH_S / 2
    confirmed(schedule, half, schedule.due(half, 10_000))
    due = schedule.due(REPUBLISH_S * 0.6, 10_000)
    places = [kad_id(dht_key(digest)) for digest in due]
    assert places == sorted(places)
    assert max(places) - min(places) < 0.11 * 2**256


def test_what_fails_is_tried_again_ever_more_rarely_until_something_succeeds() -> None:
    schedule, (key, other) = Schedule(), digests(2)
    schedule.add(0, [key])
    now, pauses = 0.0, []
    for _ in range(10):
        assert schedule.report(now, [key], set(), set()) == 0
        due = schedule.next_due()
        assert due is not None
        pauses.append(due - now)
        now = due
    assert pauses[0] == 2 * RETRY_S
    assert pauses[-1] == MAX_RETRY_S
    assert (schedule.failed(), schedule.confirmed()) == (1, [])
    schedule.nodes_have_come(now - 1)
    assert schedule.due(now, 10) == [key]
    schedule.add(now, [other])
    assert schedule.report(now, [key, other], {key, other}, set()) == 1  # the one that was late
    assert schedule.failed() == 0


def test_a_crowded_key_can_wait_and_a_removed_one_is_gone() -> None:
    schedule, (crowded, removed) = Schedule(), digests(2)
    schedule.add(0, [crowded, removed])
    schedule.report(0, [crowded, removed], set(), {crowded})
    schedule.remove([removed])
    assert schedule.due(CROWDED_RETRY_S - 1, 10) == []
    assert schedule.due(CROWDED_RETRY_S, 10) == [crowded]
    assert schedule.report(0, [removed], {removed}, set()) == 0
    assert len(schedule) == 1


def test_what_is_being_announced_is_not_due_a_second_time() -> None:
    schedule, keys = Schedule(), digests(5)
    schedule.add(0, keys)
    assert len(schedule.due(RETRY_S, 3)) == 3
    assert len(schedule.due(RETRY_S, 10)) == 2
    assert schedule.due(RETRY_S, 10) == []
    assert len(schedule.due(2 * RETRY_S, 10)) == 5  # nobody said what became of it


def test_a_restart_goes_on_where_it_was() -> None:
    schedule, keys = Schedule(), digests(100)
    schedule.restore(dict.fromkeys(keys[:50], 1_000.0) | {keys[50]: 1_000.0 - REPUBLISH_S})
    schedule.add(2_000, keys)
    assert set(schedule.confirmed()) == set(keys[:50])
    assert set(schedule.due(2_000 + RETRY_S, 1_000)) == set(keys[50:])
    later = schedule.due(1_000 + 1.06 * REPUBLISH_S, 1_000)
    assert set(keys[:50]) <= set(later)


def test_a_clock_that_was_wrong_makes_no_key_wait_for_years() -> None:
    schedule, keys = Schedule(), digests(3)
    schedule.restore(dict.fromkeys(keys, 9e9))
    schedule.add(1_000, keys)
    assert len(schedule.due(1_000 + REPUBLISH_S, 10)) == 3


def test_only_so_many_keys_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce_schedule, "MAX_OWN_KEYS", 3)
    schedule, keys = Schedule(), digests(5)
    assert schedule.add(0, [*keys, *keys]) == keys[:3]
    for now in range(3_000):  # the heap does not grow with every report
        schedule.report(now, keys[:3], set(), set())
    assert len(schedule._heap) <= 1_013


def test_a_node_gets_what_it_takes_and_not_more_often() -> None:
    appetites = Appetites()
    assert appetites.portion(0, "node", 700) == 700
    appetites.took(0, "node", 700, 700, True)
    assert appetites.portion(0, "node", 700) == 700
    appetites.took(0, "node", 700, 4, False)  # stock py-libp2p: ten in 10 s
    assert appetites.portion(RETRY_S - 1, "node", 700) == 0
    assert appetites.portion(RETRY_S, "node", 700) == 10
    appetites.took(RETRY_S, "node", 10, 10, True)
    assert appetites.portion(RETRY_S + 1, "node", 700) == 0
    assert appetites.portion(2 * RETRY_S, "node", 3) == 3
    appetites.took(2 * RETRY_S, "node", 3, 3, True)
    assert appetites.portion(2 * RETRY_S, "node", 700) == 10
    for number in range(2 * announce_schedule.MAX_APPETITES):
        appetites.took(0, f"other {number}", 1, 0, False)
    assert len(appetites._of) == announce_schedule.MAX_APPETITES
