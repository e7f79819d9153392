"""Kademlia with ideal routing tables: a million nodes as one sorted array.

Purpose
-------
How many nodes a look-up has to ask, in networks too large to hold as objects. A node is
its identifier; identifiers are 64 random bits, sorted. The nodes that differ from a node
first in bit *b* are a range of that array, so a routing table need not be kept: where a
look-up reaches a bucket, its contacts are drawn from the range by a hash of seed, node,
bucket and number (Maymounkov & Mazières 2002, section 2.2: a bucket holds up to *k* nodes
at a distance between 2^b and 2^(b+1)). The same node gives the same answer at every visit.

Rules
-----
- Tables are ideal: full, without dead nodes, each contact drawn evenly from its range.
- One query at a time. A hop is one query: to the closest node in the own table, then to
  the closest in each answer. Hops are counted twice: until a node is reached that agrees
  with the key in as many leading bits as any node does (its bucket for the key is empty:
  what `PUBLISHED_HOPS` counts), and until the very closest node is, which takes a little
  longer where several agree equally far.
- Look-ups run side by side in arrays; memory is 8 bytes a node and, per look-up of a
  batch, some 30 bytes a contact.

What it does not do: time, failures, or tables that age. See `provider_records` for churn.

64 bits tell apart 2^32 nodes; a real identifier's other bits change nothing, because
only the first ones that differ are looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorswarm.store.errors import BadInput

Ids = NDArray[np.uint64]
Indices = NDArray[np.int64]

BITS = 64

BATCH = 20_000
"""Look-ups that run side by side: with k = 20 about 15 MB."""

MAX_LOOKUPS = 10_000_000
"""Most look-ups of one run: 50 bytes are kept of each."""

MAX_BUCKET_SIZE = 64
"""Largest k: drawing without repeats takes k² steps."""

PUBLISHED_HOPS = {
    (1_000, 1): 4.64,
    (10_000, 1): 6.26,
    (100_000, 1): 7.89,
    (1_000_000, 1): 9.67,
    (1_000, 8): 2.30,
    (10_000, 8): 3.07,
    (100_000, 8): 3.81,
    (1_000_000, 8): 4.58,
    (1_000, 20): 1.89,
    (10_000, 20): 2.48,
    (100_000, 20): 3.07,
    (1_000_000, 20): 3.63,
}
"""Mean hops by (nodes, k) with ideal tables and one query at a time, as an earlier and
independent simulation gave them: to compare with, nothing is computed from them."""


@dataclass(frozen=True, slots=True)
class Lookups:
    """What some look-ups took.

    Attributes
    ----------
    nodes, bucket_size : int
        The network.
    hops : array of int64, shape (lookups,)
        Queries of each look-up until nobody agrees with the key in more leading bits.
    hops_to_closest : array of int64, shape (lookups,)
        Queries of each look-up until the node closest to the key.
    """

    nodes: int
    bucket_size: int
    hops: Indices
    hops_to_closest: Indices

    @property
    def mean(self) -> float:
        """Mean of `hops`."""
        return float(self.hops.mean())

    @property
    def mean_to_closest(self) -> float:
        """Mean of `hops_to_closest`."""
        return float(self.hops_to_closest.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return float(self.hops.std() / np.sqrt(len(self.hops)))

    @property
    def published(self) -> float | None:
        """The mean in `PUBLISHED_HOPS`, None if it has none for this network."""
        return PUBLISHED_HOPS.get((self.nodes, self.bucket_size))

    def share_by_hops(self) -> list[float]:
        """Return the share of look-ups with 0, 1, 2 ... hops."""
        counts = np.bincount(self.hops)
        return [float(count / len(self.hops)) for count in counts]

    def digest(self) -> str:
        """Return a hash of every look-up's hops: equal runs have equal ones."""
        both = np.concatenate([self.hops, self.hops_to_closest])
        return hashlib.sha256(both.astype("<i8").tobytes()).hexdigest()


def random_ids(count: int, rng: np.random.Generator) -> Ids:
    """Return `count` distinct identifiers, ascending (uint64)."""
    ids = np.unique(_random_bits(count, rng))
    while len(ids) < count:  # two were equal, which happens once in 2^64 / count² times
        ids = np.unique(np.concatenate([ids, _random_bits(count - len(ids), rng)]))
    return ids


def generator(seed: int, nodes: int) -> np.random.Generator:
    """Return the random numbers of a run; NumPy takes no negative seed."""
    sign = [1] if seed < 0 else []
    return np.random.Generator(np.random.PCG64([abs(seed), nodes, *sign]))


def run(nodes: int, seed: int, *, bucket_size: int = 20, lookups: int = 10_000) -> Lookups:
    """Do as `run_many` does, with one size of buckets."""
    return run_many(nodes, seed, bucket_sizes=[bucket_size], lookups=lookups)[0]


def run_many(
    nodes: int, seed: int, *, bucket_sizes: Sequence[int], lookups: int = 10_000
) -> list[Lookups]:
    """Look up random keys from random nodes, with each size of buckets.

    Parameters
    ----------
    nodes : int
        Size of the network, at least 1.
    seed : int
        Replays the run.
    bucket_sizes : sequence of int
        Contacts in a bucket and nodes in an answer, k, at most `MAX_BUCKET_SIZE`. All
        see the same nodes and look up the same keys.
    lookups : int
        How many, at least 1.

    Raises
    ------
    BadInput
        A parameter is out of its limits.
    """
    if not all(0 < k <= MAX_BUCKET_SIZE for k in bucket_sizes):
        raise BadInput(f"k: from 1 to {MAX_BUCKET_SIZE}")
    if not (nodes > 0 and 0 < lookups <= MAX_LOOKUPS):
        raise BadInput(f"at least 1 node; look-ups: from 1 to {MAX_LOOKUPS}")
    rng = generator(seed, nodes)
    ids = random_ids(nodes, rng)
    starts = rng.integers(0, nodes, size=lookups)
    keys = _random_bits(lookups, rng)
    found = []
    for k in bucket_sizes:
        tables = Tables(ids, k, seed)
        hops = [hops_of(tables, starts[part], keys[part]) for part in _batches(lookups)]
        to_prefix, to_closest = (np.concatenate(parts) for parts in zip(*hops, strict=True))
        found.append(Lookups(nodes, k, to_prefix, to_closest))
    return found


def hops_of(tables: Tables, starts: Indices, keys: Ids) -> tuple[Indices, Indices]:
    """Look up each key from a starting node (an index).

    Returns
    -------
    to_prefix, to_closest : arrays of int64
        The hops, counted as `Lookups` has them.
    """
    goals = closest_nodes(tables.ids, keys)
    longest = top_bits(tables.ids[goals] ^ keys)
    current = starts.copy()
    to_prefix = np.zeros(len(starts), np.int64)
    to_closest = np.zeros(len(starts), np.int64)
    under_way = np.flatnonzero(current != goals)
    while len(under_way):
        asking = current[under_way]
        to_prefix[under_way] += top_bits(tables.ids[asking] ^ keys[under_way]) > longest[under_way]
        current[under_way] = tables.closest_contacts(asking, keys[under_way], goals[under_way])
        to_closest[under_way] += 1
        under_way = under_way[current[under_way] != goals[under_way]]
    return to_prefix, to_closest


class Tables:
    """The routing tables of all nodes, none of which is stored.

    Parameters
    ----------
    ids : array of uint64, ascending
        The nodes.
    bucket_size : int
        Contacts in a bucket, k.
    seed : int
        Decides who is in which bucket.
    """

    def __init__(self, ids: Ids, bucket_size: int, seed: int) -> None:
        self.ids = ids
        self._bucket_size = bucket_size
        self._seed = _mixed(np.uint64(seed % (1 << BITS)))

    def closest_contacts(self, nodes: Indices, keys: Ids, goals: Indices) -> Indices:
        """Return, of each node's contacts, the one closest to its key (an index).

        Parameters
        ----------
        nodes : array of int64
            Whose tables are asked.
        keys : array of uint64
            What for.
        goals : array of int64
            The nodes closest to the keys, none of them the one that is asked. Above the
            first bit in which the goal differs from it, nobody is on the key's side
            where the goal is not; so this bit names the bucket to look in.
        """
        bits = top_bits(self.ids[nodes] ^ self.ids[goals])
        first, size = bucket_ranges(self.ids, self.ids[goals], bits)
        contacts = first[:, None] + self._members(nodes, bits, size)
        distances = self.ids[contacts] ^ keys[:, None]
        rows = np.arange(len(nodes))
        closest: Indices = contacts[rows, distances.argmin(axis=1)]
        return closest

    def _members(self, nodes: Indices, bits: Indices, size: Indices) -> Indices:
        """Draw up to k different places in each bucket, by Floyd's method.

        (Bentley & Floyd 1987, sample S.) Where a bucket has no more than k members, the
        places are all of them, some twice.
        """
        k = self._bucket_size
        base = _mixed(self._seed ^ self.ids[nodes] ^ _mixed(bits.astype(np.uint64)))
        chosen = np.empty((len(nodes), k), np.int64)
        for number in range(k):
            last = np.maximum(size - k + number, 0)
            drawn = _mixed(base + np.uint64(number)) % (last + 1).astype(np.uint64)
            place = drawn.astype(np.int64)
            is_taken = (chosen[:, :number] == place[:, None]).any(axis=1)
            chosen[:, number] = np.where(is_taken, last, place)
        is_small = size <= k
        chosen[is_small] = np.minimum(np.arange(k), size[is_small, None] - 1)
        return chosen


def top_bits(values: Ids) -> Indices:
    """Return the number of each value's highest bit that is set, from 0; 0 for the value 0."""
    bits = np.zeros(values.shape, np.int64)
    rest = values.copy()
    for step in (32, 16, 8, 4, 2, 1):
        high = rest >> np.uint64(step)
        is_high = high > 0
        bits[is_high] += step
        rest = np.where(is_high, high, rest)
    return bits


def bucket_ranges(ids: Ids, keys: Ids, bits: Indices) -> tuple[Indices, Indices]:
    """Return where the nodes begin, and how many, that equal the key above bit `bits` and in it."""
    below = (np.uint64(1) << bits.astype(np.uint64)) - np.uint64(1)
    first = np.searchsorted(ids, keys & ~below, side="left")
    after = np.searchsorted(ids, keys | below, side="right")
    return first, after - first


def closest_nodes(ids: Ids, keys: Ids) -> Indices:
    """Return the node closest to each key (an index).

    Goes down the tree of prefixes, at each bit to the key's own side unless nobody is
    there.
    """
    path = np.zeros_like(keys)
    for bit in reversed(range(BITS)):
        mask = np.uint64(1) << np.uint64(bit)
        wanted = path | (keys & mask)
        _, size = bucket_ranges(ids, wanted, np.full(len(keys), bit))
        path = np.where(size > 0, wanted, wanted ^ mask)
    found: Indices = np.searchsorted(ids, path)
    return found


def closest_to(ids: Ids, key: np.uint64, count: int) -> Indices:
    """Return the `count` nodes closest to one key, nearest first (indices)."""
    first, size = 0, len(ids)
    for bit in reversed(range(BITS)):
        start, inside = bucket_ranges(ids, np.array([key]), np.array([bit]))
        if inside[0] < count:
            break
        first, size = int(start[0]), int(inside[0])
    order = np.argsort(ids[first : first + size] ^ key, kind="stable")
    return order[:count] + first


def _random_bits(count: int, rng: np.random.Generator) -> Ids:
    return rng.integers(0, 1 << BITS, size=count, dtype=np.uint64)


def _mixed(values: Ids | np.uint64) -> Ids:
    """Return a hash of each value: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    mixed: Ids = np.atleast_1d(values) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _batches(total: int) -> Iterator[slice]:
    for start in range(0, total, BATCH):
        yield slice(start, min(start + BATCH, total))


def sizes_up_to(nodes: int, smallest: int = 1_000) -> Sequence[int]:
    """Return 1,000, 10,000 ... below `nodes`, and `nodes`."""
    sizes = []
    size = smallest
    while size < nodes:
        sizes.append(size)
        size *= 10
    return [*sizes, nodes]
