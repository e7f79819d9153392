"""Who comes in: handshakes and streams, as the tables decide."""

from __future__ import annotations

from tensorswarm.p2p.host import door
from tensorswarm.p2p.host.door import HalfOpen, StreamBudget

THERE = "192.0.2.1"


def nothing() -> None:
    """End no handshake."""


def test_the_oldest_silent_connection_makes_room_at_once() -> None:
    table, cut = HalfOpen(), list[int]()
    numbers = [
        table.enter(THERE, 0.0, lambda index=index: cut.append(index))  # type: ignore[misc]
        for index in range(10_000)
    ]
    assert None not in numbers
    assert len(table) == door.MAX_HALF_OPEN_PER_HOST
    assert cut == list(range(10_000 - door.MAX_HALF_OPEN_PER_HOST))


def test_who_speaks_has_its_time_and_then_makes_room() -> None:
    table = HalfOpen()
    for _ in range(door.MAX_HALF_OPEN_PER_HOST):
        number = table.enter(THERE, 0.0, nothing)
        assert number is not None
        table.spoke(number, 0.0)
    assert table.enter(THERE, door.HALF_OPEN_GRACE_S / 2, nothing) is None
    assert table.enter(THERE, door.HALF_OPEN_GRACE_S, nothing) is not None
    assert len(table) == door.MAX_HALF_OPEN_PER_HOST
    assert table.turned_away == table.displaced == 1


def test_a_crowd_of_one_address_does_not_keep_another_out() -> None:
    table, cut = HalfOpen(), list[str]()
    crowd = ["192.0.2.1"] * 60 + ["192.0.2.2"] * 50 + ["192.0.2.3"] * 18
    for host in crowd:
        assert table.enter(host, 0.0, lambda host=host: cut.append(host)) is not None  # type: ignore[misc]
    assert len(table) == door.MAX_HALF_OPEN
    assert table.enter("192.0.2.9", 0.0, nothing) is not None
    assert cut == ["192.0.2.1"]
    assert len(table) == door.MAX_HALF_OPEN


def test_places_are_free_again_when_the_handshake_is_over() -> None:
    table = HalfOpen()
    for _ in range(3 * door.MAX_HALF_OPEN):
        number = table.enter(THERE, 0.0, nothing)
        assert number is not None
        table.left(number)
        table.left(number)  # it also made room: no harm
        table.spoke(number, 0.0)
    assert len(table) == table.turned_away == 0
    assert not table._per_host


def test_everybody_has_some_streams_whatever_others_do() -> None:
    budget = StreamBudget()
    for peer in range(900):
        for _ in range(200):
            budget.take(f"greedy {peer}")
    assert len(budget) <= door.MAX_SPARE_STREAMS + 900 * door.STREAMS_OF_RIGHT
    assert len(budget) * door.STREAM_BYTES < 100e6
    assert [budget.take("honest") for _ in range(5)] == [True] * 4 + [False]


def test_a_single_peer_has_its_bound_and_is_a_flood_past_it() -> None:
    budget = StreamBudget()
    taken = sum(budget.take("peer") for _ in range(door.MAX_STREAMS_PER_PEER + 10))
    assert taken == door.MAX_STREAMS_PER_PEER
    assert not budget.is_flood("peer")
    for _ in range(door.MAX_REFUSALS):
        budget.take("peer")
    assert budget.is_flood("peer")
    for _ in range(taken):
        budget.gone("peer")
    assert not budget.is_flood("peer")
    assert len(budget) == 0
    assert not budget._open and not budget._refused
