"""Who comes in: connections that shake hands, and streams that peers open.

Purpose
-------
`HalfOpen` decides which connections may take part in handshakes, `Places` who stays
afterwards, `StreamBudget` which streams are taken. None does I/O; `host.guard` asks them.

Rules
-----
- Connections whose peer is not known yet are few: `MAX_HALF_OPEN`, of one network address
  `MAX_HALF_OPEN_PER_HOST`. When there is no room, one makes it, of the address that has
  most: the oldest that has said nothing yet (in libp2p who connects speaks first), else the
  oldest that had `HALF_OPEN_GRACE_S` for its handshake. If there is neither, the newcomer is
  turned away. So ten thousand idle connections cost as much as those few, and neither those
  who came first nor those who come in crowds keep the others out.
- Each peer may always have `STREAMS_OF_RIGHT` streams open: what a neighbour has. More,
  up to `MAX_STREAMS_PER_PEER`, only while all peers together have fewer than
  `MAX_SPARE_STREAMS`.
- A peer that goes on opening streams which are refused is cut after `MAX_REFUSALS`:
  refusing costs as much as opening does.

Memory, the stated bound: an idle stream is a few tasks and buffers, `STREAM_BYTES` at most,
so all of them together are under 100 MB (`MAX_SPARE_STREAMS` and the streams of right of
900 connections); half-open connections are 3 MB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .places import Places, Standing

MAX_HALF_OPEN = 128
"""Connections in a handshake, which takes three round trips, 10 s at most."""

MAX_HALF_OPEN_PER_HOST = 64
"""The same of one network address: an office behind one, all starting at once."""

HALF_OPEN_GRACE_S = 1.0
"""Time that a handshake has, from its first byte on, before it may have to make room:
three round trips of 0.3 s."""

STREAMS_OF_RIGHT = 4
"""Streams that each peer may have, whatever others do: control, DHT, bulk, identify."""

MAX_STREAMS_PER_PEER = 64
"""Streams one peer may have open to us at best: look-ups in parallel, downloads."""

MAX_SPARE_STREAMS = 1_000
"""Streams in all, from which on nobody gets more than those of right."""

MAX_REFUSALS = 256
"""Refused streams after which a connection is cut. A peer whose streams are refused
notices at the first."""

STREAM_BYTES = 20_000
"""What an idle stream takes at most, in bytes (measured: 10 KB)."""


@dataclass(slots=True)
class _Entry:
    host: str
    leave: Callable[[], None]
    spoke_at: float | None = None


class HalfOpen:
    """Connections that shake hands. Does no I/O.

    Attributes
    ----------
    entered, turned_away, displaced : int
        Connections that came in, that got no room, and of the former those that had to
        make room.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # in the order of their coming
        self._per_host: Counter[str] = Counter()
        self.entered = self.turned_away = self.displaced = 0

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, host: str, now: float, leave: Callable[[], None]) -> int | None:
        """Take a connection; None to close it.

        Parameters
        ----------
        host : str
            The network address at its other end.
        now : float
            The time, in seconds.
        leave : callable
            Ends the handshake, when it has to make room.

        Returns
        -------
        int or None
            Its number, for `spoke` and `left`.
        """
        if self._per_host[host] >= MAX_HALF_OPEN_PER_HOST:
            has_room = self._make_room(host, now)
        elif len(self._entries) >= MAX_HALF_OPEN:
            has_room = self._make_room(self._per_host.most_common(1)[0][0], now)
        else:
            has_room = True
        if not has_room:
            self.turned_away += 1
            return None
        self.entered += 1
        self._entries[self.entered] = _Entry(host, leave)
        self._per_host[host] += 1
        return self.entered

    def spoke(self, number: int, now: float) -> None:
        """Note the first byte of a connection."""
        if number in self._entries:
            self._entries[number].spoke_at = now

    def left(self, number: int) -> None:
        """Note that a handshake is over, whatever came of it."""
        entry = self._entries.pop(number, None)
        if entry is not None:
            self._per_host[entry.host] -= 1
            if not self._per_host[entry.host]:
                del self._per_host[entry.host]

    def _make_room(self, host: str, now: float) -> bool:
        of_host = [(number, each) for number, each in self._entries.items() if each.host == host]
        silent = [pair for pair in of_host if pair[1].spoke_at is None]
        slow = [
            pair
            for pair in of_host
            if pair[1].spoke_at is not None and now - pair[1].spoke_at >= HALF_OPEN_GRACE_S
        ]
        for number, entry in (silent or slow)[:1]:
            self.left(number)
            self.displaced += 1
            entry.leave()
            return True
        return False


class StreamBudget:
    """Streams that peers have open to us. Does no I/O.

    Attributes
    ----------
    taken, refused : int
        Streams that were taken so far, and those that were not.
    on_asked : callable
        Called for each stream, when it has been counted.
    """

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._total = 0
        self.taken = self.refused = 0
        self.on_asked: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return self._total

    def take(self, peer: str) -> bool:
        """Take a stream of a peer; False to refuse it."""
        allowed = MAX_STREAMS_PER_PEER if self._total < MAX_SPARE_STREAMS else STREAMS_OF_RIGHT
        is_taken = self._open[peer] < allowed
        if is_taken:
            self._open[peer] += 1
            self._total += 1
            self.taken += 1
        else:
            self._refused[peer] += 1
            self.refused += 1
        self.on_asked()
        return is_taken

    def is_flood(self, peer: str) -> bool:
        """Tell whether a peer was refused so often that its connection is to be cut."""
        return self._refused[peer] >= MAX_REFUSALS

    def gone(self, peer: str) -> None:
        """Note the end of a stream that was taken."""
        self._total -= 1
        self._open[peer] -= 1
        if not self._open[peer]:  # all is well again, or the connection has ended
            del self._open[peer]
            self._refused.pop(peer, None)


class Door:
    """All of these, of one host.

    Parameters
    ----------
    max_connections : int
        Places for peers that have shaken hands.

    Attributes
    ----------
    half_open : HalfOpen
        Connections that shake hands.
    places : Places
        Connections that came in and stay.
    streams : StreamBudget
        Streams that peers open.
    standing : callable
        Tells what is known of a peer; to be set by whoever knows something.
    expected : dict of (str, int) to str
        Places from which a peer is expected that dials us and yet waits for us to speak
        (hole punching makes it the server), to its id. Kept small by whoever expects it.
    """

    def __init__(self, max_connections: int) -> None:
        self.standing: Callable[[str], Standing] = lambda _peer: Standing.STRANGER
        self.half_open = HalfOpen()
        self.places = Places(max_connections, lambda peer: self.standing(peer))
        self.streams = StreamBudget()
        self.expected: dict[tuple[str, int], str] = {}

    def statistics(self) -> dict[str, int]:
        """Return counters of connections that came in, and of the streams that peers open."""
        return {
            "connections_let_in": self.half_open.entered,
            "connections_turned_away": self.half_open.turned_away + self.half_open.displaced,
            "connections_refused": self.places.refused,
            "connections_displaced": self.places.displaced,
            "shaking_hands": len(self.half_open),
            "streams_open": len(self.streams),
            "streams_refused": self.streams.refused,
        }
