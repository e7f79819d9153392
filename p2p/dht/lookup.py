"""Whom to ask next: the iterative look-up of Kademlia, without any I/O.

A look-up asks the nodes closest to a key that it has heard of, hears from them of
closer ones, and is done when the `K` closest that answer have all answered. Which
closer nodes exist is all the distance is used for; it is libp2p's: the exclusive or
of the SHA-256 of the key and the SHA-256 of the binary peer id.

Ids near a key cost nothing to make: whoever has a machine can own the `K` closest of any
key. Network addresses cost more, so of one group (a part of the network, as the caller
tells) `MAX_PER_GROUP` count among the closest, and the others only where nobody else is
left. Who announces and who looks choose alike, so they meet at the same nodes.

`Regions` saves look-ups when many keys are announced: where the closest nodes to
one key are known, those of neighbouring keys are known too.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

from ..host.addresses import peer_id_bytes

K = 20
"""Nodes that keep a record, and that a look-up ends with (specification: k)."""

ALPHA = 10
"""Questions open at once in one look-up (specification: alpha)."""

MAX_CANDIDATES = 200
"""Nodes one look-up remembers: ten times those it ends with; the farthest go."""

MAX_ASKED = 100
"""Nodes one look-up asks: three times what it takes where they answer and name real ones."""

MAX_PER_GROUP = 3
"""Nodes of one group among the closest: with all 20 from one network, its owner could make
any key's providers disappear; fewer would pass over honest neighbours for nothing."""

_BITS = 256


def kad_id(key: bytes) -> int:
    """Return where a key lies in the key space."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


@lru_cache(maxsize=16_384)
def peer_kad_id(peer_id: str) -> int:
    """Return where a peer lies in the key space."""
    return kad_id(peer_id_bytes(peer_id))


def closest(target: int, peers: Iterable[str], count: int = K) -> list[str]:
    """Return the `count` peers closest to a point of the key space, nearest first."""
    return sorted(peers, key=lambda peer: peer_kad_id(peer) ^ target)[:count]


class Lookup:
    """One look-up: what is known, asked and answered.

    Parameters
    ----------
    key : bytes
        What is looked up: a DHT key or a binary peer id.
    start : iterable of str
        Peers to begin with.
    own_id : str
        Our own peer id, never asked.
    group : callable
        Tells which part of the network a peer is in; by default, each is by itself.
    """

    def __init__(
        self,
        key: bytes,
        start: Iterable[str],
        own_id: str,
        group: Callable[[str], str] = lambda peer: peer,
    ) -> None:
        self._target = kad_id(key)
        self._distance: dict[str, int] = {}
        self._group = group
        self._group_of: dict[str, str] = {}
        self._own_id = own_id
        self._ignored = {own_id}
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self.add(start)

    def add(self, peers: Iterable[str]) -> None:
        """Hear of peers."""
        for peer in peers:
            if peer not in self._distance and peer not in self._ignored:
                self._distance[peer] = peer_kad_id(peer) ^ self._target
                self._group_of[peer] = self._group(peer)
        if len(self._distance) > MAX_CANDIDATES:
            for peer in self._nearest()[MAX_CANDIDATES:]:
                if peer not in self._asked:
                    del self._distance[peer], self._group_of[peer]

    def next_peer(self) -> str | None:
        """Return the next peer to ask, None if there is nobody to ask at the moment."""
        if len(self._asked) >= MAX_ASKED:
            return None
        for peer in self._nearest()[:K]:
            if peer not in self._asked:
                self._asked.add(peer)
                return peer
        return None

    @property
    def is_exhausted(self) -> bool:
        """Whether it has asked as many as it may, and so may be far from its end."""
        return len(self._asked) >= MAX_ASKED

    @property
    def answer_count(self) -> int:
        """How many have answered."""
        return len(self._answered)

    @property
    def asks_everybody(self) -> bool:
        """Whether all that were heard of are asked, being no more than `K`.

        Then nobody can be hidden behind others that are nearer to the key.
        """
        heard_of = self._distance.keys() | self._ignored - {self._own_id}
        return len(heard_of) <= K

    def answered(self, peer: str, closer: Iterable[str]) -> None:
        """Note an answer and the closer peers in it."""
        self._answered.add(peer)
        self.add(closer)

    def failed(self, peer: str) -> None:
        """Note that a peer did not answer; it is not counted among the closest."""
        self._distance.pop(peer, None)
        self._ignored.add(peer)

    def result(self) -> list[str]:
        """Return the closest peers that answered, at most `K`, nearest first."""
        return [peer for peer in self._nearest() if peer in self._answered][:K]

    def _nearest(self) -> list[str]:
        """Return all, nearest first, those past `MAX_PER_GROUP` of their group last."""
        of_group: Counter[str] = Counter()
        first: list[str] = []
        last: list[str] = []
        for peer in sorted(self._distance, key=self._distance.__getitem__):
            group = self._group_of[peer]
            of_group[group] += 1
            (first if of_group[group] <= MAX_PER_GROUP else last).append(peer)
        return first + last


class Regions:
    """Parts of the key space whose nodes are known, after look-ups.

    Parameters
    ----------
    is_crowd : callable
        Tells whether the peers closest to a point were made for it (`crowding`).
    """

    def __init__(self, is_crowd: Callable[[int, list[str]], bool] = lambda *_: False) -> None:
        self._is_crowd = is_crowd
        self._known: dict[tuple[int, int], list[str]] = {}

    def learn(self, point: int, found: list[str]) -> None:
        """Note that a look-up of `point` ended with these peers.

        All nodes that share more leading bits with the point than the farthest of
        them are among them, so the region of those bits is known.
        """
        if len(found) < K:
            depth = 0  # there are no more in the whole network
        else:
            distance = max(peer_kad_id(peer) ^ point for peer in found)
            depth = min(_BITS - distance.bit_length() + 1, _BITS)
        self._known[(depth, point >> (_BITS - depth))] = found

    def peers_for(self, point: int) -> list[str] | None:
        """Return the peers to keep a record at, None where a look-up is needed.

        They are the `K` closest, in a crowd all that are known.
        """
        for (depth, prefix), found in self._known.items():
            if point >> (_BITS - depth) == prefix:
                chosen = closest(point, found)
                return found if self._is_crowd(point, chosen) else chosen
        return None
