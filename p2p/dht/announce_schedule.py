"""When which key is announced, and how much each receiver takes. Does no I/O.

Purpose
-------
`Schedule` knows our keys, when each is due, and what became of it. `Appetites` knows
how many announcements a node takes at once. Both are given the time, wall clock in
seconds, so that what they know can outlive the process.

Rules
-----
- A new key is announced at once by whoever adds it. A confirmed key is due again at its
  *slot*: the key space is laid over the republish period, as in Kubo's sweep, so that
  the load is spread evenly, and keys that the same nodes keep come due together.
- What was not confirmed is tried again, ever more rarely while nothing is gained, and
  at once when new nodes are known.
- A key whose list of providers is full of others can be found without us; it is tried
  again after `CROWDED_RETRY_S`.
- A node that stopped in the middle gets as many as it took, once in `RETRY_S`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tensorswarm.store.cid import dht_key

from .lookup import kad_id

STOCK_ALLOWANCE = 10
"""Announcements that stock py-libp2p takes at once."""

RETRY_S = 11.0
"""Shortest wait before unconfirmed keys are announced again: stock py-libp2p's window
of 10 s, and a little."""

MAX_RETRY_S = 600.0
"""Longest wait before unconfirmed keys are announced again."""

CROWDED_RETRY_S = 3600.0
"""Wait for keys that have many providers already."""

REPUBLISH_S = 22 * 3600.0
"""The period in which every key is announced again (specification: 22 h of 48 h)."""

SLOTS = 1 << 10
"""Parts of the key space that come due one after another, 77 s apart."""

MIN_REPUBLISHES = 20
"""A slot is left out if it is nearer than a part in so many of the period: about 1 h."""

MAX_OWN_KEYS = 200_000
"""Keys we provide: hundreds of large models. More are not announced."""

MAX_APPETITES = 2_000
"""Nodes of which it is remembered that they take only so many."""

_BITS = 256


@dataclass(slots=True)
class _OwnKey:
    place: int
    due: float
    confirmed_at: float | None = None
    has_failed: bool = False


class Schedule:
    """Our keys, and when each is to be announced.

    Parameters
    ----------
    period_s : float
        The republish period.
    """

    def __init__(self, period_s: float = REPUBLISH_S) -> None:
        self._period_s = period_s
        self._own: dict[bytes, _OwnKey] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._retry_s = RETRY_S
        self._restored: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._own)

    def restore(self, confirmed_at: Mapping[bytes, float]) -> None:
        """Take what an earlier run had announced, and when; for keys added later."""
        self._restored = dict(confirmed_at)

    def add(self, now: float, digests: Iterable[bytes]) -> list[bytes]:
        """Take digests to be announced; return those taken, each once."""
        taken = []
        for digest in dict.fromkeys(digests):
            if digest not in self._own:
                if len(self._own) >= MAX_OWN_KEYS:
                    continue
                # Whoever adds a key announces it; this is for when that is cut short.
                own = _OwnKey(kad_id(dht_key(digest)), now + RETRY_S)
                self._own[digest] = own
                earlier = self._restored.pop(digest, None)
                if earlier is not None and now - earlier < self._period_s:
                    own.confirmed_at = min(earlier, now)
                    own.due = min(self._next_slot(earlier, own.place), now + self._period_s)
                self._push(digest, own)
            taken.append(digest)
        return taken

    def remove(self, digests: Iterable[bytes]) -> None:
        """Announce these no more."""
        for digest in digests:
            self._own.pop(digest, None)
            self._restored.pop(digest, None)

    def due(self, now: float, limit: int) -> list[bytes]:
        """Return keys that are due, at most `limit`; neighbours in the key space together.

        They count as taken: due again after `RETRY_S`, unless told otherwise before.
        """
        found: list[tuple[int, bytes]] = []
        while self._heap and self._heap[0][0] <= now and len(found) < limit:
            due, place, digest = heapq.heappop(self._heap)
            own = self._own.get(digest)
            if own is not None and own.due == due:
                own.due = now + RETRY_S
                self._push(digest, own)
                found.append((place, digest))
        return [digest for _, digest in sorted(found)]

    def next_due(self) -> float | None:
        """Return when the next key is due, None if there is none."""
        while self._heap:
            due, _, digest = self._heap[0]
            own = self._own.get(digest)
            if own is not None and own.due == due:
                return due
            heapq.heappop(self._heap)
        return None

    def report(
        self, now: float, asked: Iterable[bytes], confirmed: set[bytes], crowded: set[bytes]
    ) -> int:
        """Note what became of announcing keys.

        Returns
        -------
        int
            How many of the confirmed had failed before.
        """
        late = 0
        self._retry_s = RETRY_S if confirmed else min(2 * self._retry_s, MAX_RETRY_S)
        for digest in asked:
            own = self._own.get(digest)
            if own is None:
                continue  # removed in the meantime
            if digest in confirmed:
                own.due = self._next_slot(now, own.place)
                own.confirmed_at = now
                late += own.has_failed
                own.has_failed = False
            else:
                own.due = now + (CROWDED_RETRY_S if digest in crowded else self._retry_s)
                own.has_failed = digest not in crowded
                own.confirmed_at = None
            self._push(digest, own)
        return late

    def nodes_have_come(self, now: float) -> None:
        """Have unconfirmed keys tried again at once: there are new nodes to tell."""
        self._retry_s = RETRY_S
        self.make_due(now, (d for d, own in self._own.items() if own.confirmed_at is None))

    def make_due(self, now: float, digests: Iterable[bytes]) -> None:
        """Have these announced again at once."""
        for digest in list(digests):
            own = self._own.get(digest)
            if own is not None and own.due > now:
                own.due = now
                self._push(digest, own)

    def is_confirmed(self, digest: bytes) -> bool:
        """Tell whether a key is announced."""
        own = self._own.get(digest)
        return own is not None and own.confirmed_at is not None

    def confirmed(self) -> list[bytes]:
        """Return the keys that are announced."""
        return [digest for digest, own in self._own.items() if own.confirmed_at is not None]

    def failed(self) -> int:
        """Return how many keys could not be announced so far."""
        return sum(own.has_failed for own in self._own.values())

    def _next_slot(self, now: float, place: int) -> float:
        slot = place * SLOTS >> _BITS
        earliest = now + self._period_s / MIN_REPUBLISHES
        offset_s = slot * self._period_s / SLOTS
        return earliest + (offset_s - earliest) % self._period_s

    def _push(self, digest: bytes, own: _OwnKey) -> None:
        heapq.heappush(self._heap, (own.due, own.place, digest))
        if len(self._heap) > 4 * len(self._own) + 1_000:
            self._heap = [(each.due, each.place, name) for name, each in self._own.items()]
            heapq.heapify(self._heap)


class Appetites:
    """How many announcements each node takes, as far as it has shown a limit."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def portion(self, now: float, node: str, wanted: int) -> int:
        """Return how many announcements to send to a node now, at most `wanted`."""
        known = self._of.get(node)
        if known is None:
            return wanted
        allowance, not_before = known
        if now < not_before:
            return 0
        return min(wanted, allowance)

    def took(self, now: float, node: str, sent: int, echoes: int, is_intact: bool) -> None:
        """Note how many a node was sent, how many it acknowledged, and if it went on."""
        known = self._of.pop(node, None)
        if not is_intact:
            self._of[node] = (max(echoes, STOCK_ALLOWANCE), now + RETRY_S)
            if len(self._of) > MAX_APPETITES:
                self._of.popitem(last=False)
        elif known is not None:
            allowance, not_before = known
            if sent >= allowance:
                not_before = now + RETRY_S
            self._of[node] = (allowance, not_before)
