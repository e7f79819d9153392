"""Provider records: bounded, fair to late comers, and gone in time."""

from __future__ import annotations

import random

import pytest

from tensorswarm.p2p.dht.provider_table import (
    EVICTED_AT_ONCE,
    ProviderTable,
    Record,
    group_of,
)

ADDRS = (b"addr",)


def table(**limits: float) -> ProviderTable:
    return ProviderTable(random.Random(1), **limits)  # type: ignore[arg-type]


def named(records: ProviderTable, key: bytes, now: float = 0.0, count: int = 20) -> set[bytes]:
    return {peer for peer, _ in records.providers(now, key, count)}


def test_twenty_false_providers_do_not_hide_an_honest_one() -> None:
    for squatters in (20, 60, 300):
        records = table()
        for number in range(squatters):
            records.add(number, b"key", b"false %d" % number, "192.0.2.0/24", ADDRS)
        assert records.add(squatters, b"key", b"honest", "198.51.100.0/24", ADDRS)
        for _ in range(20):
            assert b"honest" in named(records, b"key"), f"hidden by {squatters}"


def test_whoever_comes_later_and_often_does_not_push_it_out_either() -> None:
    records = table()
    records.add(0, b"key", b"honest", "198.51.100.0/24", ADDRS)
    for number in range(5_000):
        records.add(number, b"key", b"false %d" % number, "192.0.2.0/24", ADDRS)
    assert b"honest" in named(records, b"key")


def test_where_all_come_from_one_place_everybody_is_named_in_some_answer() -> None:
    records = table()
    peers = {b"peer %d" % number for number in range(60)}
    for peer in sorted(peers):
        records.add(0, b"key", peer, "192.0.2.0/24", ADDRS)
    answers = [named(records, b"key") for _ in range(60)]
    assert all(len(answer) == 20 for answer in answers)
    assert set().union(*answers) == peers


def test_an_early_bird_with_many_ids_does_not_keep_out_its_own_neighbours() -> None:
    kept = 0
    for seed in range(50):
        records = ProviderTable(random.Random(seed), max_per_key=10)
        for number in range(100):
            records.add(number, b"key", b"false %d" % number, "10.0.0.1", ADDRS)
        kept += records.add(100, b"key", b"honest", "10.0.0.1", ADDRS)
    assert kept == 50


def test_who_asks_is_told_of_its_own_record_first() -> None:
    records = table()
    for number in range(60):
        records.add(0, b"key", b"peer %d" % number, f"group {number}", ADDRS)
    for number in range(60):
        (first, *_) = records.providers(0, b"key", 20, first=b"peer %d" % number)
        assert first == (b"peer %d" % number, ADDRS)


def test_a_full_table_makes_room_at_the_largest_group() -> None:
    records = table(max_records=1_000)
    for number in range(50):
        records.add(number, b"honest key %d" % number, b"honest", "198.51.100.0/24", ADDRS)
    for number in range(20_000):
        peer = b"false %d" % (number % 3_000)
        records.add(100 + number, b"key %d" % number, peer, f"192.0.{number % 2}.0/24", ADDRS)
        assert len(records) <= 1_000
    assert len(records) > 1_000 - 1_000 // EVICTED_AT_ONCE - 1
    assert all(named(records, b"honest key %d" % number) == {b"honest"} for number in range(50))


def test_one_peer_has_its_share_and_no_more_but_may_renew() -> None:
    records = table(max_per_peer=3)
    kept = [records.add(0, b"key %d" % number, b"peer", "group", ADDRS) for number in range(5)]
    assert kept == [True, True, True, False, False]
    assert records.add(1, b"key 0", b"peer", "group", ADDRS)
    records.remove(b"key 0", b"peer")
    assert records.add(1, b"key 4", b"peer", "group", ADDRS)


def test_records_run_out_unless_renewed() -> None:
    records = table(lifetime_s=100)
    records.add(0, b"key", b"old", "group", ADDRS)
    records.add(0, b"key", b"renewed", "group", ADDRS)
    records.add(50, b"key", b"renewed", "group", ADDRS)
    assert named(records, b"key", now=99) == {b"old", b"renewed"}
    assert named(records, b"key", now=100) == {b"renewed"}
    records.expire(100)
    assert len(records) == 1
    records.expire(150)
    assert len(records) == 0
    assert not (records._by_key or records._by_group or records._providers)


def test_the_latest_addresses_and_place_of_a_peer_count() -> None:
    records = table()
    for key in (b"a", b"b"):
        records.add(0, key, b"peer", "old group", (b"old",))
    records.add(1, b"b", b"peer", "new group", (b"new",))
    assert records.providers(1, b"a", 5) == [(b"peer", (b"new",))]
    assert set(records._by_group) == {"new group"}


def test_changes_say_what_to_write() -> None:
    records = table(max_per_key=1)
    records.add(0, b"key", b"a", "group", ADDRS)
    records.add(1, b"key", b"b", "group", ADDRS)
    changes = records.take_changes()
    assert changes.added == {(b"key", b"b"): 1}
    assert changes.removed == {(b"key", b"a")}
    assert set(changes.peers) == {b"b"}
    assert not records.take_changes()


def test_what_was_kept_comes_back_without_what_has_run_out() -> None:
    records = table(lifetime_s=100)
    kept = [Record(b"key", b"a", 0), Record(b"key", b"b", 50), Record(b"key", b"c", 9e9)]
    peers = {peer: ("group", ADDRS) for peer in (b"a", b"b", b"c")}
    records.restore(120, [*kept, Record(b"key", b"unknown", 100)], peers)
    assert named(records, b"key", 120) == {b"b", b"c"}
    assert named(records, b"key", 219) == {b"c"}
    assert named(records, b"key", 220) == set()  # the clock had been wrong, not the record
    assert not records.take_changes()


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("203.0.114.77", "203.0.114.0/24"),
        ("2a00:1:2:3::4", "2a00:1:2::/48"),
        ("10.1.2.3", "10.1.2.3"),
        ("127.0.0.1", "the peer"),
        (None, "the peer"),
    ],
)
def test_groups_are_parts_of_the_network(host: str | None, group: str) -> None:
    assert group_of(host, "the peer") == group
