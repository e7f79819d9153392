"""The simulated look-ups: against brute force, and against published figures."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tensorswarm.simulations import kademlia
from tensorswarm.simulations.kademlia import Tables
from tensorswarm.store.errors import BadInput


def generator(seed: int = 3) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def random_keys(count: int, rng: np.random.Generator) -> kademlia.Ids:
    return rng.integers(0, 1 << 64, size=count, dtype=np.uint64)


@pytest.mark.parametrize("count", [1, 2, 3, 50, 1000])
def test_the_closest_nodes_are_those_of_brute_force(count: int) -> None:
    rng = generator()
    ids = kademlia.random_ids(count, rng)
    keys = random_keys(50, rng)
    found = kademlia.closest_nodes(ids, keys)
    for key, node in zip(keys, found, strict=True):
        order = np.argsort(ids ^ key)
        assert order[0] == node
        for wanted in (1, 7, count):
            assert list(kademlia.closest_to(ids, key, wanted)) == list(order[:wanted])


def test_top_bits() -> None:
    values = np.array([0, 1, 2, 3, 255, 256, 1 << 31, 1 << 32, (1 << 64) - 1], np.uint64)
    expected = [0, *(int(value).bit_length() - 1 for value in values[1:])]
    assert kademlia.top_bits(values).tolist() == expected


def contacts_of(tables: Tables, node: int, bit: int, size: int) -> set[int]:
    drawn = tables._members(np.array([node]), np.array([bit]), np.array([size]))
    return set(drawn[0].tolist())


@pytest.mark.parametrize("size", [1, 5, 8, 9, 12, 1000])
def test_a_bucket_is_full_has_no_one_twice_and_does_not_change(size: int) -> None:
    ids = kademlia.random_ids(2000, generator())
    tables = Tables(ids, 8, seed=1)
    for node in range(100):
        found = contacts_of(tables, node, 40, size)
        assert found <= set(range(size))
        assert len(found) == min(size, 8)
        assert contacts_of(tables, node, 40, size) == found
    assert contacts_of(Tables(ids, 8, seed=2), 7, 40, 1000) != contacts_of(tables, 7, 40, 1000)


def test_contacts_are_drawn_evenly() -> None:
    ids = kademlia.random_ids(30_000, generator())
    nodes = np.arange(30_000)
    drawn = Tables(ids, 4, seed=1)._members(nodes, np.full(30_000, 50), np.full(30_000, 12))
    counts = np.bincount(drawn.ravel(), minlength=12)
    assert np.abs(counts / 10_000 - 1).max() < 0.05  # each is in 4 of 12; 5 standard errors


def test_with_room_for_everyone_one_hop_is_enough() -> None:
    found = kademlia.run(60, seed=1, bucket_size=64, lookups=500)
    assert found.hops_to_closest.max() == 1
    assert kademlia.run(1, seed=1, lookups=5).hops.tolist() == [0] * 5


def walk(ids: list[int], key: int, start: int, k: int, rng: np.random.Generator) -> int:
    """Look one key up, node by node, with tables made as plainly as can be."""
    node, hops = start, 0
    while True:
        bit = (ids[node] ^ key).bit_length()
        bucket = [other for other, value in enumerate(ids) if (value ^ key) >> (bit - 1) == 0]
        if not bucket:
            return hops
        contacts = rng.permutation(bucket)[:k]
        node = min(contacts, key=lambda other: ids[other] ^ key)
        hops += 1


@pytest.mark.parametrize("k", [1, 4])
def test_means_agree_with_a_plain_simulation(k: int) -> None:
    rng = generator()
    plain = []
    for _ in range(20):
        ids = kademlia.random_ids(200, rng).tolist()
        for key in random_keys(40, rng).tolist():
            plain.append(walk(ids, key, int(rng.integers(200)), k, rng))
    ours = [kademlia.run(200, seed, bucket_size=k, lookups=200).mean for seed in range(40)]
    assert np.mean(ours) == pytest.approx(np.mean(plain), rel=0.05)


@pytest.mark.parametrize("nodes", [1_000, 10_000, 100_000, 1_000_000])
def test_hops_are_within_five_per_cent_of_the_published(nodes: int) -> None:
    for found in kademlia.run_many(nodes, seed=11, bucket_sizes=[1, 8, 20]):
        assert found.published is not None
        assert found.mean == pytest.approx(found.published, rel=0.05)
        assert (found.hops <= found.hops_to_closest).all()


def test_a_million_nodes_take_less_than_150_mb() -> None:
    tracemalloc.start()
    try:
        kademlia.run(1_000_000, seed=1, lookups=40_000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 150e6


def test_the_seed_replays_a_run() -> None:
    first, again, other = (kademlia.run(5_000, seed, lookups=2_000) for seed in (4, 4, 5))
    assert first.digest() == again.digest() != other.digest()
    assert sum(first.share_by_hops()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("nodes", "k", "lookups"), [(0, 20, 1), (10, 0, 1), (10, 65, 1), (10, 20, 0)]
)
def test_senseless_parameters_are_refused(nodes: int, k: int, lookups: int) -> None:
    with pytest.raises(BadInput):
        kademlia.run(nodes, seed=1, bucket_size=k, lookups=lookups)
