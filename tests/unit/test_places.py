"""Who keeps a place: shares, fairness by network, and who is never pushed out."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tensorswarm.p2p.host.places import (
    IDLE_GRACE_S,
    SHARE_NEARBY,
    SHARE_OF_ADDRESS,
    SHARE_OF_NETWORK,
    Places,
    Standing,
    origin_of,
)

SIZE = 80


class House:
    """Places, and what is known of those in them."""

    def __init__(self, size: int = SIZE) -> None:
        self.standing: dict[str, Standing] = {}
        self.host_of: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.places = Places(size, lambda peer: self.standing.get(peer, Standing.STRANGER))
        self.now = 0.0

    def come(self, peer: str, host: str, others: int = 0) -> bool:
        def leave() -> None:
            del self.host_of[peer], self.numbers[peer]

        assert peer not in self.host_of
        may = self.places.may_enter(host, self.now, others)
        number = self.places.enter(peer, host, self.now, leave, others)
        assert (number is not None) == may
        if number is not None:
            self.host_of[peer], self.numbers[peer] = host, number
        return number is not None

    def crowd(self, name: str, hosts: list[str]) -> int:
        return sum(self.come(f"{name} {number}", host) for number, host in enumerate(hosts))


@pytest.mark.parametrize(
    ("host", "network", "address", "is_nearby"),
    [
        ("8.8.4.4", "8.8.4.0/24", "8.8.4.4/32", False),
        ("::ffff:8.8.4.4", "8.8.4.0/24", "8.8.4.4/32", False),
        ("2a00:1:2:3::7", "2a00:1:2::/48", "2a00:1:2:3::/64", False),
        ("127.0.0.9", "127.0.0.9", "127.0.0.9", True),
        ("10.1.2.3", "10.1.2.3", "10.1.2.3", True),
        ("fe80::1%eth0", "fe80::1", "fe80::1", True),
        ("", "", "", False),
    ],
)
def test_where_an_address_belongs(host: str, network: str, address: str, is_nearby: bool) -> None:
    origin = origin_of(host)
    assert (origin.network, origin.address, origin.is_nearby) == (network, address, is_nearby)


def test_an_address_and_a_network_have_their_share() -> None:
    house = House()
    assert house.crowd("address", ["8.8.4.4"] * SIZE) == SIZE // SHARE_OF_ADDRESS
    network = [f"8.8.4.{number}" for number in range(5, 5 + SIZE)]
    assert house.crowd("network", network) == SIZE // SHARE_OF_NETWORK - SIZE // SHARE_OF_ADDRESS
    assert house.crowd("machine", [f"2a00::{number:x}" for number in range(1, SIZE)]) == (
        SIZE // SHARE_OF_ADDRESS
    )


def test_a_machine_full_of_nodes_works() -> None:
    house = House()
    assert house.crowd("nearby", ["127.0.0.1"] * 2 * SIZE) == SHARE_NEARBY * SIZE


def test_a_newcomer_gets_a_place_of_whoever_has_most() -> None:
    house = House()
    house.crowd("crowd", ["127.0.0.1"] * SIZE)
    house.crowd("others", [f"8.{number}.1.1" for number in range(SIZE // 4)])
    assert len(house.places) == SIZE
    house.now = 1.0
    house.places.heard("crowd 0", house.now)
    assert house.come("newcomer", "9.9.9.9")
    assert "crowd 0" in house.host_of
    assert "crowd 1" not in house.host_of
    assert len(house.places) == SIZE
    assert house.places.displaced == 1
    # Until nobody has more than the others, except those who are busy.
    for number in range(50):
        assert house.come(f"more {number}", f"9.{number}.1.1")
    assert Counter(house.host_of.values())["127.0.0.1"] == SIZE - SIZE // 4 - 51


def test_within_a_network_the_fullest_address_makes_room() -> None:
    house = House(40)
    house.crowd("a", ["8.8.4.4"] * 4)
    house.crowd("b", [f"8.8.4.{number}" for number in range(5, 11)])
    house.crowd("c", [f"9.{number}.1.1" for number in range(30)])
    assert len(house.places) == 40
    assert house.come("newcomer", "7.7.7.7")
    assert Counter(house.host_of.values())["8.8.4.4"] == 3


def test_those_who_have_proved_something_go_last_and_those_who_transfer_never() -> None:
    house = House(20)
    house.crowd("crowd", ["127.0.0.1"] * 15)
    house.crowd("others", [f"8.{number}.1.1" for number in range(5)])
    for number in range(15):
        house.standing[f"crowd {number}"] = Standing(3 - number % 4)
    gone = []
    for number in range(15):
        before = set(house.host_of)
        if house.come(f"newcomer {number}", f"9.{number}.1.1"):
            (loser,) = before - set(house.host_of)
            gone.append(house.standing[loser])
    assert gone == sorted(gone)
    assert Standing.BUSY not in gone
    assert {peer for peer, what in house.standing.items() if what is Standing.BUSY} <= set(
        house.host_of
    )


def test_who_keeps_coming_back_pushes_nobody_of_its_network_out() -> None:
    house = House(20)
    house.crowd("here", [f"8.{number}.1.1" for number in range(20)])
    assert not house.come("newcomer", "9.9.9.9")
    house.now = IDLE_GRACE_S
    assert not house.come("newcomer", "9.9.9.9")
    assert house.places.refused == 2
    nearby = House(20)
    assert nearby.crowd("here", ["127.0.0.1"] * 20) == 15
    nearby.now = IDLE_GRACE_S / 2
    assert not nearby.come("early", "127.0.0.1")
    nearby.standing["here 0"] = Standing.NEIGHBOUR
    nearby.now = IDLE_GRACE_S
    assert nearby.come("late", "127.0.0.1")
    assert "here 0" in nearby.host_of
    assert "here 1" not in nearby.host_of


def test_places_that_are_not_shared_out_count() -> None:
    house = House(20)
    house.crowd("here", ["127.0.0.1"] * 10)
    assert house.come("a", "9.9.9.9", others=9)
    assert "here 0" in house.host_of
    assert house.come("b", "9.9.8.9", others=10)
    assert "here 0" not in house.host_of


def test_everything_is_forgotten_with_the_last_place() -> None:
    rng = random.Random(1)
    house = House(30)
    for step in range(3_000):
        house.now += 0.1
        if house.numbers and rng.random() < 0.4:
            peer = rng.choice(sorted(house.numbers))
            house.places.left(house.numbers.pop(peer))
            house.places.left(10**9)
            del house.host_of[peer]
        else:
            host = rng.choice([f"8.8.{rng.randrange(3)}.{rng.randrange(4)}", "127.0.0.1", ""])
            house.come(f"peer {step}", host)
        assert len(house.places) == len(house.host_of) <= 30
    for peer in list(house.numbers):
        house.places.left(house.numbers.pop(peer))
    assert len(house.places) == 0
    assert not house.places._of_address and not house.places._of_network
    assert not house.places._numbers
