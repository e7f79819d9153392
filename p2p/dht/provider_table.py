"""Who provides what, as others told us: bounded, fair, and without any I/O.

Purpose
-------
The records that a DHT server keeps for others. Time and randomness are arguments;
sockets, the disk and protobuf are elsewhere (`dht.records`).

Rules
-----
- A record runs out `lifetime_s` after it was last renewed.
- Everything is bounded: records in all, per key, and per peer. Ids cost nothing to
  make, network addresses do, so what is full makes room by *group*: the part of the
  network that a peer was seen in (`group_of`).
- A full key replaces a record of the group that has most of that key, chosen at
  random: neither coming first nor coming last nor coming often wins a place for good.
- A full table drops the oldest records of the largest groups.
- A key with more providers than fit in an answer is answered with a random choice,
  every group in its turn. Who asks 20 servers sees far more than one choice.

What it does not do: believe addresses (they are checked before), or tell a false
provider from an honest one. Only bytes show that.
"""

from __future__ import annotations

import heapq
import ipaddress
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

RECORD_LIFETIME_S = 48 * 3600.0
"""How long a provider record is kept (specification), in seconds."""

MAX_PROVIDERS_PER_KEY = 64
"""Providers kept of one key. Three times the 20 of the specification, so that an early
bird with 20 ids has not taken all the places."""

MAX_RECORDS = 100_000
"""Provider records kept in all, at about 800 bytes each: 80 MB."""

MAX_RECORDS_PER_PEER = 20_000
"""Records kept for one peer: some ten large models; more are not taken."""

EVICTED_AT_ONCE = 100
"""A full table makes room for one part in so many, which spares it sorting each time."""

Key = bytes
Peer = bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as it is kept on disk."""

    key: Key
    peer: Peer
    added_at: float


@dataclass(slots=True)
class Changes:
    """What is different since the changes were last taken."""

    added: dict[tuple[Key, Peer], float] = field(default_factory=dict)
    removed: set[tuple[Key, Peer]] = field(default_factory=set)
    peers: dict[Peer, tuple[str, tuple[bytes, ...]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.peers)


@dataclass(slots=True)
class _Provider:
    """A peer that has records here."""

    group: str
    addrs: tuple[bytes, ...]
    records: int = 0


def group_of(host: str | None, peer: str) -> str:
    """Return the part of the network that a peer counts for.

    Parameters
    ----------
    host : str or None
        The IP address at which it is seen; None if it is not connected.
    peer : str
        Its id, which stands for itself on loopback, where all addresses are one.

    Returns
    -------
    str
        A public IPv4 network of 256, an IPv6 site of 48 bits, a private address.
    """
    if host is None:
        return peer
    address = ipaddress.ip_address(host)
    if address.is_loopback:
        return peer
    if address.is_private:
        return str(address)
    bits = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network(f"{host}/{bits}", strict=False))


class ProviderTable:
    """Provider records.

    Parameters
    ----------
    rng : random.Random
        Source of all random choices.
    max_records, max_per_key, max_per_peer : int
        The bounds.
    lifetime_s : float
        How long a record is kept without being renewed.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        max_records: int = MAX_RECORDS,
        max_per_key: int = MAX_PROVIDERS_PER_KEY,
        max_per_peer: int = MAX_RECORDS_PER_PEER,
        lifetime_s: float = RECORD_LIFETIME_S,
    ) -> None:
        self._rng = rng
        self._max_records = max_records
        self._max_per_key = max_per_key
        self._max_per_peer = max_per_peer
        self._lifetime_s = lifetime_s
        self._by_key: dict[Key, dict[Peer, float]] = {}
        self._providers: dict[Peer, _Provider] = {}
        self._by_group: dict[str, OrderedDict[tuple[Key, Peer], None]] = {}
        self._oldest_first: OrderedDict[tuple[Key, Peer], None] = OrderedDict()
        self._changes = Changes()

    def __len__(self) -> int:
        return len(self._oldest_first)

    def add(self, now: float, key: Key, peer: Peer, group: str, addrs: tuple[bytes, ...]) -> bool:
        """Keep or renew a record; return whether it is kept.

        Parameters
        ----------
        now : float
            The time, in seconds; never earlier than at the call before.
        key, peer : bytes
            Who provides what.
        group : str
            Where the peer was seen, as `group_of` says.
        addrs : tuple of bytes
            Its addresses, checked.
        """
        provider = self._providers.get(peer)
        is_new = peer not in self._by_key.get(key, ())
        if is_new and provider is not None and provider.records >= self._max_per_peer:
            return False
        if provider is None:
            provider = self._providers[peer] = _Provider(group, addrs)
            self._changes.peers[peer] = (group, addrs)
        elif (provider.group, provider.addrs) != (group, addrs):
            self._move(peer, provider, group)
            provider.addrs = addrs
            self._changes.peers[peer] = (group, addrs)
        place = (key, peer)
        holders = self._by_key.setdefault(key, {})
        holders[peer] = now
        self._oldest_first[place] = None
        self._oldest_first.move_to_end(place)
        of_group = self._by_group.setdefault(provider.group, OrderedDict())
        of_group[place] = None
        of_group.move_to_end(place)
        self._changes.added[place] = now
        self._changes.removed.discard(place)
        if is_new:
            provider.records += 1
            if len(holders) > self._max_per_key:
                self._remove((key, self._one_too_many(holders, peer)))
            if len(self) > self._max_records:
                self._make_room()
        return peer in self._by_key.get(key, ())

    def providers(
        self, now: float, key: Key, count: int, first: Peer = b""
    ) -> list[tuple[Peer, tuple[bytes, ...]]]:
        """Return who provides a key: ids and addresses.

        Parameters
        ----------
        now : float
            The time, in seconds.
        key : bytes
            What is asked for.
        count : int
            How many at most: a random choice, every group in its turn.
        first : bytes
            A peer that is named before all others if it is there: whoever asks, so
            that it sees whether its own record is kept.
        """
        fresh = [
            peer
            for peer, added_at in self._by_key.get(key, {}).items()
            if now - added_at < self._lifetime_s
        ]
        self._rng.shuffle(fresh)
        turns: Counter[str] = Counter()
        turn_of: dict[Peer, int] = {}
        for peer in fresh:
            group = self._providers[peer].group
            turn_of[peer] = turns[group]
            turns[group] += 1
        fresh.sort(key=lambda peer: (peer != first, turn_of[peer]))
        return [(peer, self._providers[peer].addrs) for peer in fresh[:count]]

    def remove(self, key: Key, peer: Peer) -> None:
        """Drop a record, if it is there."""
        if peer in self._by_key.get(key, ()):
            self._remove((key, peer))

    def expire(self, now: float) -> None:
        """Drop the records that have run out."""
        while self._oldest_first:
            key, peer = next(iter(self._oldest_first))
            if now - self._by_key[key][peer] < self._lifetime_s:
                return
            self._remove((key, peer))

    def take_changes(self) -> Changes:
        """Return what is different since the last call."""
        changes, self._changes = self._changes, Changes()
        return changes

    def restore(
        self,
        now: float,
        records: Iterable[Record],
        peers: dict[Peer, tuple[str, tuple[bytes, ...]]],
    ) -> None:
        """Fill an empty table with what was kept; what has run out is left out."""
        for record in sorted(records, key=lambda record: record.added_at):
            known = peers.get(record.peer)
            # A clock that was set back must not make a record live for ever.
            added_at = min(record.added_at, now)
            if known is not None and now - added_at < self._lifetime_s:
                self.add(added_at, record.key, record.peer, *known)
        self.take_changes()

    def _one_too_many(self, holders: Iterable[Peer], newest: Peer) -> Peer:
        """Return a random holder of the group that has most of a key, not the newest."""
        group = {peer: self._providers[peer].group for peer in holders}
        sizes = Counter(group.values())
        most = max(sizes.values())
        candidates = [peer for peer in group if sizes[group[peer]] == most and peer != newest]
        return self._rng.choice(candidates)

    def _make_room(self) -> None:
        excess = len(self) - self._max_records + self._max_records // EVICTED_AT_ONCE
        largest = [(-len(places), group) for group, places in self._by_group.items()]
        heapq.heapify(largest)
        for _ in range(excess):
            size, group = heapq.heappop(largest)
            self._remove(next(iter(self._by_group[group])))
            if size + 1:
                heapq.heappush(largest, (size + 1, group))

    def _move(self, peer: Peer, provider: _Provider, group: str) -> None:
        """Count a peer's records for another group: it is seen elsewhere now."""
        if group == provider.group:
            return
        old = self._by_group.get(provider.group, OrderedDict())
        moved = [place for place in old if place[1] == peer]
        for place in moved:
            del old[place]
        if not old:
            self._by_group.pop(provider.group, None)
        self._by_group.setdefault(group, OrderedDict()).update(dict.fromkeys(moved))
        provider.group = group

    def _remove(self, place: tuple[Key, Peer]) -> None:
        key, peer = place
        provider = self._providers[peer]
        del self._oldest_first[place]
        del self._by_key[key][peer]
        if not self._by_key[key]:
            del self._by_key[key]
        del self._by_group[provider.group][place]
        if not self._by_group[provider.group]:
            del self._by_group[provider.group]
        provider.records -= 1
        if not provider.records:
            del self._providers[peer]
            self._changes.peers.pop(peer, None)
        self._changes.added.pop(place, None)
        self._changes.removed.add(place)
