"""Whom a look-up asks, held against the whole network seen at once."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.p2p.dht.lookup import (
    MAX_CANDIDATES,
    MAX_PER_GROUP,
    K,
    Lookup,
    Regions,
    closest,
    kad_id,
    peer_kad_id,
)
from tensorswarm.p2p.host.addresses import peer_id_text


def peer(number: int) -> str:
    return peer_id_text(b"\x12\x20" + number.to_bytes(32, "big"))


PEERS = [peer(number) for number in range(300)]
MADE = {made: peer_kad_id(made) for made in map(peer, range(1_000, 7_000))}
"""Ids to choose from for whoever wants some next to a key: where an id lies is chance."""


def network(rng: random.Random, size: int) -> dict[str, list[str]]:
    """Peers that each know their neighbourhood well and the rest a little."""
    peers = rng.sample(PEERS, size)
    return {
        one: sorted({*closest(peer_kad_id(one), peers, 2 * K), *rng.sample(peers, min(size, K))})
        for one in peers
    }


def finish(lookup: Lookup, knows: dict[str, list[str]], dead: set[str], key: bytes) -> int:
    """Answer a look-up's questions as a network would; return how many it asked."""
    asked = 0
    while (node := lookup.next_peer()) is not None:
        asked += 1
        assert asked <= len(knows), "a peer was asked twice"
        if node in dead:
            lookup.failed(node)
        else:
            lookup.answered(node, closest(kad_id(key), knows[node]))
    return asked


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 150), st.binary(min_size=1, max_size=34))
def test_a_look_up_ends_with_the_closest_of_the_whole_network(
    seed: int, size: int, key: bytes
) -> None:
    rng = random.Random(seed)
    knows = network(rng, size)
    lookup = Lookup(key, rng.sample(sorted(knows), min(3, size)), "")
    asked = finish(lookup, knows, set(), key)
    expected = closest(kad_id(key), knows)
    found = lookup.result()
    assert found[: K // 2] == expected[: K // 2]
    assert len(set(found) & set(expected)) >= 0.9 * len(expected)
    assert asked <= 4 * K  # and not the whole network


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_dead_are_passed_over(seed: int) -> None:
    rng = random.Random(seed)
    knows = network(rng, 150)
    dead = set(rng.sample(sorted(knows), 40))
    key = rng.randbytes(34)
    lookup = Lookup(key, sorted(knows)[:30], "")
    finish(lookup, knows, dead, key)
    found = lookup.result()
    assert not dead & set(found)
    assert found[0] == closest(kad_id(key), set(knows) - dead)[0]
    assert len(found) == K


def test_we_are_never_asked() -> None:
    lookup = Lookup(b"key", [peer(1), peer(2)], own_id=peer(1))
    assert lookup.next_peer() == peer(2)
    lookup.answered(peer(2), [peer(1)])
    assert lookup.next_peer() is None
    assert lookup.result() == [peer(2)]


def test_what_a_liar_names_is_bounded() -> None:
    lookup = Lookup(b"key", [peer(0)], own_id="")
    for round_number in range(20):
        asked = lookup.next_peer()
        assert asked is not None
        lookup.answered(asked, [peer(1000 * round_number + i) for i in range(1, 1000)])
    assert len(lookup._distance) <= MAX_CANDIDATES + 20


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_ids_made_for_a_key_do_not_hide_its_records(seed: int) -> None:
    """Thirty ids next to a key, of one network: who announces and who looks still meet."""
    rng = random.Random(seed)
    knows = network(rng, 150)
    key = rng.randbytes(34)
    honest = closest(kad_id(key), knows)
    made = sorted(MADE, key=lambda each: MADE[each] ^ kad_id(key))
    sybils = made[:30]
    assert len(set(closest(kad_id(key), [*knows, *sybils])) & set(sybils)) > K // 2
    for node in honest:
        knows[node] = [*knows[node], *sybils]
    knows |= dict.fromkeys(sybils, sybils)  # they name nobody else

    def look_up(start: list[str]) -> list[str]:
        lookup = Lookup(key, start, "", lambda each: "192.0.2.0/24" if each in sybils else each)
        while (node := lookup.next_peer()) is not None:
            lookup.answered(node, closest(kad_id(key), knows[node], 2 * K))
        return lookup.result()

    announced_at = look_up(rng.sample(sorted(knows), 5))
    asked_by_others = look_up(rng.sample(sorted(knows), 5))
    assert len(set(announced_at) & set(sybils)) <= MAX_PER_GROUP
    assert set(announced_at) & set(asked_by_others) - set(sybils)


def test_where_all_are_of_one_group_all_are_asked() -> None:
    lookup = Lookup(b"key", [peer(number) for number in range(12)], "", lambda _peer: "office")
    asked = set()
    while (node := lookup.next_peer()) is not None:
        asked.add(node)
        lookup.answered(node, [])
    assert len(asked) == len(lookup.result()) == 12


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_regions_give_each_key_its_closest_peers(seed: int, size: int) -> None:
    rng = random.Random(seed)
    peers = rng.sample(PEERS, size)
    regions = Regions()
    lookups = 0
    exact = total = 0
    for point in sorted(rng.getrandbits(256) for _ in range(100)):
        found = regions.peers_for(point)
        if found is None:
            lookups += 1
            found = closest(point, peers)
            regions.learn(point, found)
        assert found[0] == closest(point, peers, 1)[0] or len(found) == K
        exact += len(set(found) & set(closest(point, peers)))
        total += min(K, size)
    assert exact >= 0.6 * total
    assert lookups <= max(1, size // 4)
    if size < K:
        assert lookups == 1


def test_a_look_up_asks_everybody_only_while_few_are_heard_of() -> None:
    here, invented = PEERS[:K], PEERS[K : K + 1]
    lookup = Lookup(b"key", here[:3], PEERS[-1])
    assert lookup.asks_everybody
    first = lookup.next_peer()
    assert first is not None
    lookup.answered(first, [*here, PEERS[-1]])
    assert lookup.asks_everybody and lookup.answer_count == 1
    second = lookup.next_peer()
    assert second is not None
    lookup.failed(second)
    lookup.answered(first, invented)
    assert not lookup.asks_everybody  # also if one of them has failed since
