"""Who is connected to a bulk server, who makes room for whom, and what was served.

Rules
- Threads, and so memory, have a ceiling: `Limits.connections` that are identified, and
  `MAX_UNIDENTIFIED` beside them that shake hands or are told that there is no room.
- When all places are taken, a newcomer gets that of a connection without work for
  `IDLE_GRACE_S`, or else one of the peer that has most, if that has at least two more.
  So whoever came first cannot keep the others out, and a crowd ends up with one
  connection each.
- Strangers, who were not allowed anything yet, may not take all places from one address.
  Where they would, or fill all places from many, the oldest that does not know how to shake
  hands within `IDLE_GRACE_S` makes room, of the address that has most.

Threads call; nothing waits; no sockets.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

MAX_CONNECTIONS = 128
"""Connections served at once. Each has a thread and 0.3 MB of buffers, so all of them 50
MB with their stacks. A node keeps up to 200 neighbours, few of whom fetch at a time; the
others get a place as soon as somebody is idle."""

MAX_CONNECTIONS_PER_PEER = 8
"""Connections of one peer: more have never been faster than four."""

MAX_UNIDENTIFIED = 32
"""Connections beyond those, whose peer is not known yet or hears that there is no room: a
handshake takes 2 ms, so half as many would do for a crowd that comes at once."""

IDLE_GRACE_S = 1.0
"""Seconds without a request after which a connection may have to make room: a planner
that has work for us asks again within a round trip. As much for a handshake."""

MAX_TRACKED_PEERS = 1024
"""Peers whose sent bytes are counted: the least recently served is forgotten first."""


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """What a server has done so far.

    Attributes
    ----------
    connections : int
        Connections open now.
    accepted : int
        Connections accepted since the start.
    turned_away : int
        Connections closed or answered 503 because a limit was reached.
    failed : int
        Connections that ended by a fault: a bad handshake or request, a reader too
        slow, a disk error, or that had to make room.
    requests : int
        Requests answered, refusals included.
    bytes_sent : int
        Object bytes sent, with those that were to be sent when a connection broke.
    bytes_sent_to : dict of str to int
        The same by peer id, of the peers served last (`MAX_TRACKED_PEERS`).
    """

    connections: int
    accepted: int
    turned_away: int
    failed: int
    requests: int
    bytes_sent: int
    bytes_sent_to: dict[str, int]


class Limits(NamedTuple):
    """Connections in all, of one peer, and of one address before it was allowed anything."""

    connections: int
    per_peer: int
    unproved_per_host: int


class Connection(Protocol):
    """What the table knows of a connection. All but `host` and `thread` changes.

    Attributes
    ----------
    host : str
        Address at the other end.
    peer_id : str or None
        Who is there, once it is known and has a place.
    proved : bool
        Whether it was allowed something.
    idle_since : float or None
        Since when it waits for a request, in seconds of the monotonic clock.
    thread : threading.Thread
        The one that serves it.
    """

    host: str
    peer_id: str | None
    proved: bool
    idle_since: float | None
    thread: threading.Thread

    def abort(self) -> None:
        """Cut it, from any thread."""
        ...


class ConnectionTable:
    """Connections and counters of one server. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: dict[Connection, float] = {}  # since when, in the order of their coming
        self._unproved: Counter[str] = Counter()
        self._per_peer: Counter[str] = Counter()
        self._sent: OrderedDict[str, int] = OrderedDict()
        self._accepted = self._turned_away = self._failed = self._requests = 0
        self._bytes_sent = 0

    def is_closing(self) -> bool:
        """Tell whether the server is being closed."""
        return self._closing.is_set()

    def wait_closing(self, timeout_s: float) -> None:
        """Wait until it is, or for so long."""
        self._closing.wait(timeout_s)

    def shut(self) -> list[threading.Thread]:
        """Refuse further connections, cut the open ones, and return their threads."""
        with self._lock:
            self._closing.set()
            connections = list(self._open)
        for connection in connections:
            connection.abort()
        return [connection.thread for connection in connections]

    def admit(self, connection: Connection, now: float) -> bool:
        """Take a connection of somebody unknown; False to close it unanswered."""
        limits = self._limits
        loser: Connection | None = None
        with self._lock:
            host: str | None = None
            if self._unproved[connection.host] >= limits.unproved_per_host:
                host = connection.host
            elif len(self._open) >= limits.connections + MAX_UNIDENTIFIED and self._unproved:
                host = self._unproved.most_common(1)[0][0]
            if not self._unproved[connection.host]:
                del self._unproved[connection.host]  # reading it has made it
            if host is not None:
                loser = self._slow_stranger(host, now)
                if loser is not None:
                    self._forget(loser)
                    self._failed += 1
            is_full = len(self._open) >= limits.connections + MAX_UNIDENTIFIED
            if self._closing.is_set() or is_full or (host is not None and loser is None):
                self._turned_away += 1
                is_admitted = False
            else:
                self._accepted += 1
                self._open[connection] = now
                self._unproved[connection.host] += 1
                is_admitted = True
        if loser is not None:
            loser.abort()
        return is_admitted

    def _slow_stranger(self, host: str, now: float) -> Connection | None:
        """Return the oldest connection of an address that has not shaken hands in time."""
        for each, since in self._open.items():
            if now - since < IDLE_GRACE_S:
                return None  # and all that follow came later
            if each.host == host and each.peer_id is None and not each.proved:
                return each
        return None

    def _forget(self, connection: Connection) -> bool:
        if self._open.pop(connection, None) is None:
            return False
        if not connection.proved:
            _decrement(self._unproved, connection.host)
        return True

    def identify(self, connection: Connection, peer_id: str, now: float) -> bool:
        """Give a peer's connection a place; False when there is none."""
        limits = self._limits
        loser: Connection | None = None
        with self._lock:
            room = connection in self._open and self._per_peer[peer_id] < limits.per_peer
            if room and self._per_peer.total() >= limits.connections:
                loser = self._who_makes_room(peer_id, now)
                room = loser is not None
            if not self._per_peer[peer_id]:
                del self._per_peer[peer_id]  # reading it has made it
            if not room:
                self._turned_away += 1
                return False
            if loser is not None:
                self._leave_place(loser)
            self._per_peer[peer_id] += 1
            connection.peer_id = peer_id
        if loser is not None:
            loser.abort()
        return True

    def _who_makes_room(self, peer_id: str, now: float) -> Connection | None:
        held = [each for each in self._open if each.peer_id is not None]
        idle = [
            (since, each)
            for each in held
            if (since := each.idle_since) is not None and now - since >= IDLE_GRACE_S
        ]
        if idle:
            return min(idle, key=lambda pair: pair[0])[1]
        richest, count = self._per_peer.most_common(1)[0]
        if count < self._per_peer[peer_id] + 2:
            return None
        return next(each for each in reversed(held) if each.peer_id == richest)

    def _leave_place(self, connection: Connection) -> None:
        if connection.peer_id is not None:
            _decrement(self._per_peer, connection.peer_id)
            connection.peer_id = None

    def prove(self, connection: Connection) -> None:
        """Note that the peer was allowed something: it is no stranger any more."""
        if not connection.proved:
            with self._lock:
                if connection in self._open:
                    _decrement(self._unproved, connection.host)
                connection.proved = True

    def dismiss(self, connection: Connection, *, failed: bool) -> None:
        """Note that a connection has ended."""
        with self._lock:
            if self._forget(connection):
                self._failed += failed
            self._leave_place(connection)

    def count(self, peer_id: str, requests: int, byte_count: int) -> None:
        """Count what a peer is sent."""
        with self._lock:
            self._requests += requests
            if not byte_count:
                return
            self._bytes_sent += byte_count
            self._sent[peer_id] = self._sent.get(peer_id, 0) + byte_count
            self._sent.move_to_end(peer_id)
            if len(self._sent) > MAX_TRACKED_PEERS:
                self._sent.popitem(last=False)

    def is_serving(self, peer_id: str, now: float) -> bool:
        """Tell whether a peer has a request open, or had one a moment ago."""
        with self._lock:
            return any(
                each.peer_id == peer_id
                and (each.idle_since is None or now - each.idle_since < IDLE_GRACE_S)
                for each in self._open
            )

    def statistics(self) -> ServerStatistics:
        """Return the counters."""
        with self._lock:
            return ServerStatistics(
                connections=len(self._open),
                accepted=self._accepted,
                turned_away=self._turned_away,
                failed=self._failed,
                requests=self._requests,
                bytes_sent=self._bytes_sent,
                bytes_sent_to=dict(self._sent),
            )


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]  # keys come from outside: none stays behind
