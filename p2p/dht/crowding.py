"""Ids that crowd round a key: noticing them, and whom to ask beside them. No I/O.

Purpose
-------
Ids near a key cost nothing to make: whoever owns the `lookup.K` closest of a key, and
answers for them, hears every announcement and every question about it, and can keep
silent. Ids are spread evenly by their hash, though, so such a crowd shows: the closest
nodes are far closer together than anywhere else in the network.

Rules
-----
- `Reach` is how far away the K-th closest node is, by the median of look-ups at other
  points. A key is *crowded* if the K closest fill less than a `CROWDED`-th of that. By
  chance that happens once in millions (the number of nodes in a quarter of the reach is
  Poisson with mean 5, and would have to be 20), and where it does not, about five honest
  nodes are among the closest.
- Of a crowded key, `spread` chooses from all nodes within reach, where the 20 that would be
  closest without the crowd are: every part of the distance in its turn, so that however
  many sit in one part, the others are asked. All choose alike, so that who announces and
  who looks meet.
- Who those nodes are is not asked of the crowd. `keys_beside` gives keys in neighbouring
  regions, whose nodes know the region of the key, and were not chosen by its crowd.

What it does not do: tell false nodes from honest ones, or help against somebody who has
many times more nodes than all others in the whole region.

This follows "Content Censorship in the InterPlanetary File System" (Sridhar et al., NDSS
2024), which finds crowds by the distribution of distances and announces to a region; the
choice by parts, which bounds the cost, is ours.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from statistics import median_high

from .lookup import MAX_PER_GROUP, K, kad_id, peer_kad_id

SPAN_BITS = 256

SPAN = 1 << SPAN_BITS
"""The whole key space."""

CROWDED = 4
"""A key is crowded if its closest nodes are within such a part of the usual distance."""

MAX_WIDENED = 3 * K
"""Nodes asked within reach of a crowded key: all, while the crowd is twice the honest."""

KEYS_BESIDE = 2
"""Neighbouring regions asked: half as near as the key's own, and a quarter."""

MAX_SAMPLES = 16
"""Look-ups remembered for the usual distance."""

MAX_TRIES = 1 << 16
"""Keys tried to hit a region: enough for a network of a million."""


class Reach:
    """How far the `K` closest nodes reach from a point of this network."""

    def __init__(self) -> None:
        self._at: OrderedDict[int, int] = OrderedDict()

    def learn(self, point: int, found: Sequence[str]) -> None:
        """Note what a look-up of a point ended with: nodes, nearest first."""
        self._at.pop(point, None)
        self._at[point] = _distance(point, found[K - 1]) if len(found) >= K else SPAN
        if len(self._at) > MAX_SAMPLES:
            self._at.popitem(last=False)

    def beside(self, point: int) -> int | None:
        """Return the usual reach, by look-ups of other points; None without any."""
        others = [reach for at, reach in self._at.items() if at != point]
        return median_high(others) if others else None

    def is_crowd(self, point: int, found: Sequence[str]) -> bool:
        """Tell whether the nodes closest to a point, nearest first, are a crowd."""
        usual = self.beside(point)
        return (
            usual is not None
            and len(found) >= K
            and _distance(point, found[K - 1]) * CROWDED < usual
        )


def spread(point: int, reach: int, peers: Iterable[str], group: Callable[[str], str]) -> list[str]:
    """Return those to ask within reach of a crowded point, at most `MAX_WIDENED`.

    Parameters
    ----------
    point : int
        The key's place.
    reach : int
        How far the closest nodes reach where there is no crowd.
    peers : iterable of str
        All that are known.
    group : callable
        Tells which part of the network a peer is in; `MAX_PER_GROUP` of one count.
    """
    within = sorted(
        (distance, peer) for peer in set(peers) if (distance := _distance(point, peer)) < reach
    )
    in_part: Counter[int] = Counter()
    of_group: Counter[str] = Counter()
    turns: list[tuple[bool, int, int, str]] = []
    for distance, peer in within:
        part, its_group = distance * K // reach, group(peer)
        turns.append((of_group[its_group] >= MAX_PER_GROUP, in_part[part], distance, peer))
        in_part[part] += 1
        of_group[its_group] += 1
    return [peer for _, _, _, peer in sorted(turns)[:MAX_WIDENED]]


def keys_beside(point: int, reach: int, rng: random.Random) -> list[bytes]:
    """Return keys in the regions next to that of a point; in a small network, anywhere."""
    return [
        _key_at(point, min(reach.bit_length() + 1 + further, SPAN_BITS), rng)
        for further in range(KEYS_BESIDE)
    ]


def _key_at(point: int, distance_bits: int, rng: random.Random) -> bytes:
    """Return a key whose distance has so many bits, or nearly."""
    best, error = b"", SPAN_BITS + 1
    for _ in range(MAX_TRIES):
        key = b"\x12\x20" + rng.randbytes(32)  # in the form of a peer id
        off = abs((kad_id(key) ^ point).bit_length() - distance_bits)
        if off < error:
            best, error = key, off
        if not error:
            break
    return best


def _distance(point: int, peer: str) -> int:
    return peer_kad_id(peer) ^ point
