"""Ids made for one key: noticed, and passed by, in networks held as sets of ids."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from tensorswarm.p2p.dht.crowding import (
    CROWDED,
    MAX_SAMPLES,
    MAX_WIDENED,
    SPAN,
    Reach,
    keys_beside,
    spread,
)
from tensorswarm.p2p.dht.hearsay import Hearsay
from tensorswarm.p2p.dht.lookup import MAX_PER_GROUP, K, Regions, closest, kad_id, peer_kad_id
from tensorswarm.p2p.host.addresses import PeerAddress, peer_id_text


def peers(rng: random.Random, count: int) -> list[str]:
    return [peer_id_text(b"\x12\x20" + rng.randbytes(32)) for _ in range(count)]


def alone(peer: str) -> str:
    return peer


def learned(rng: random.Random, network: list[str], look_ups: int = 9) -> Reach:
    reach = Reach()
    for _ in range(look_ups):
        point = rng.getrandbits(256)
        reach.learn(point, closest(point, network))
    return reach


POOL = peers(random.Random(0), 20_000)
"""Ids to choose from, for whoever wants some next to a point."""


def made_for(point: int, count: int) -> list[str]:
    return closest(point, POOL, count)


@pytest.mark.parametrize("size", [25, 100, 600])
def test_without_a_crowd_none_is_seen(size: int) -> None:
    rng = random.Random(size)
    network = peers(rng, size)
    reach = learned(rng, network)
    points = [rng.getrandbits(256) for _ in range(400)]
    assert not any(reach.is_crowd(point, closest(point, network)) for point in points)


@pytest.mark.parametrize("made", [30, 60, 100])
def test_a_crowd_is_seen_and_honest_nodes_are_chosen_all_the_same(made: int) -> None:
    rng = random.Random(made)
    network = peers(rng, 100)
    reach = learned(rng, network)
    for _ in range(5):
        point = rng.getrandbits(256)
        crowd = made_for(point, made)
        everybody = [*network, *crowd]
        assert len(set(closest(point, everybody)) & set(crowd)) >= K - 1
        assert reach.is_crowd(point, closest(point, everybody))
        usual = reach.beside(point)
        assert usual is not None
        told = spread(point, usual, everybody, alone)
        assert len(told) <= MAX_WIDENED
        # Who looks knows other parts of the network, and has another idea of its size.
        other = learned(rng, rng.sample(network, 80)).beside(point)
        assert other is not None
        asked = spread(point, other, [*rng.sample(network, 80), *crowd], alone)
        assert len(set(told) & set(asked) & set(network)) >= 3


def test_one_network_has_three_places_in_a_region() -> None:
    rng = random.Random(1)
    network = peers(rng, 100)
    point = rng.getrandbits(256)
    crowd = set(peers(rng, 500))
    chosen = spread(
        point, SPAN, [*network, *crowd], lambda peer: "192.0.2.0/24" if peer in crowd else peer
    )
    assert len(chosen) == MAX_WIDENED
    assert len(crowd.intersection(chosen)) <= MAX_PER_GROUP


def test_the_usual_reach_is_that_of_other_points_and_follows_the_network() -> None:
    rng = random.Random(2)
    reach = Reach()
    point = rng.getrandbits(256)
    assert reach.beside(point) is None
    assert not reach.is_crowd(point, peers(rng, K))
    reach.learn(point, closest(point, peers(rng, 4_000)))
    assert reach.beside(point) is None
    small, large = peers(rng, 60), peers(rng, 3_000)
    for network in (small, large):
        for _ in range(MAX_SAMPLES):
            at = rng.getrandbits(256)
            reach.learn(at, closest(at, network))
    usual = reach.beside(point)
    assert usual is not None
    assert usual < SPAN * 2 * K // 3_000
    assert len(reach._at) == MAX_SAMPLES


@pytest.mark.parametrize("size", [10, 60, 20_000])
def test_keys_beside_lie_outside_the_region_and_not_far(size: int) -> None:
    rng = random.Random(size)
    reach = SPAN * min(K, size) // size
    for _ in range(5):
        point = rng.getrandbits(256)
        distances = [kad_id(key) ^ point for key in keys_beside(point, reach, rng)]
        for distance in distances:
            assert distance < 8 * reach
            assert distance >= reach or 4 * reach >= SPAN


def test_in_a_crowded_region_all_that_are_known_keep_a_record() -> None:
    rng = random.Random(3)
    network = peers(rng, 100)
    reach = learned(rng, network)
    point = rng.getrandbits(256)
    crowd = made_for(point, 60)
    found = closest(point, [*network, *crowd], 80)
    regions = Regions(reach.is_crowd)
    regions.learn(point, found)
    assert regions.peers_for(point) == found
    elsewhere = Regions(reach.is_crowd)
    elsewhere.learn(point, closest(point, network))
    chosen = elsewhere.peers_for(point)
    assert chosen is not None
    assert len(chosen) == K


def test_the_threshold_leaves_some_honest_nodes_among_the_closest() -> None:
    """A crowd that keeps below it leaves a K-th part of four among those asked anyway."""
    rng = random.Random(4)
    honest = []
    for _ in range(200):
        network = peers(rng, 100)
        point = rng.getrandbits(256)
        limit = SPAN * K // 100 // CROWDED
        honest.append(sum(peer_kad_id(peer) ^ point < limit for peer in network))
    assert mean(honest) == pytest.approx(K / CROWDED, rel=0.15)


def told(*names: str) -> list[PeerAddress]:
    return [PeerAddress(name, ()) for name in names]


def test_who_names_many_takes_nobodys_place() -> None:
    hearsay = Hearsay("me", 200)
    passed_on = []
    for liar in range(100):
        passed_on += hearsay.take(told(*(f"false {liar} {number}" for number in range(40))))
    assert len(passed_on) == 100
    assert hearsay.take(told("honest")) == told("honest")
    assert len(hearsay.rest()) == 99
    assert hearsay.is_full
    assert hearsay.take(told("late")) == hearsay.rest() == []


def test_each_provider_is_passed_on_once_and_never_ourselves() -> None:
    hearsay = Hearsay("me", 10)
    assert hearsay.take(told("me", "a", "b")) == told("a")
    assert hearsay.take(told("a", "b", "c")) == told("b")
    assert hearsay.take(told("me")) == []
    assert hearsay.rest() == told("c")
    assert not hearsay.is_full
