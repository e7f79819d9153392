"""A TCP proxy that behaves like a long wire: delay, a shared rate, and cuts.

Purpose: measure and test transfers over a wire that this machine does not have. Every
connection through the proxy has a thread for each direction's reading and writing.

Rules
- Each byte arrives `round_trip_s / 2` after it came in. A new connection carries nothing
  for one round trip, as if its handshake took one.
- The server's bytes of all connections share one rate, and one room: what is under way
  is bounded by what such a wire holds, rate times round trip, plus `queue_bytes` for the
  buffer before its bottleneck. Then the proxy stops reading, and the server's own
  sockets fill: nothing hides congestion.
- A connection is cut (reset, both ways, with all that was under way) after a time and a
  number of the server's bytes drawn from exponential distributions with the given means.
  The random numbers are seeded; cuts by bytes do not depend on the machine's speed.

Not here: loss and reordering of packets: TCP's own recovery happens on real wires below
what a proxy can show.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator

PIECE_BYTES = 16 << 10
"""Bytes read at a time: at 25 MB/s they take 0.7 ms."""

REQUESTS_BYTES = 256 << 10
"""What may be under way to the server, for each connection."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with 0 s: closing resets the connection, as a cut does."""


class _Wire:
    """The rate that all connections share: when the next bytes have passed it."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_at(self, byte_count: int) -> float:
        """Return when `byte_count` bytes, sent now, have left the bottleneck."""
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + byte_count / self._bytes_per_s
            return self._free_at


class _Room:
    """What may be under way at a time."""

    def __init__(self, room_bytes: int) -> None:
        self._changed = threading.Condition()
        self._room_bytes = room_bytes

    def take(self, byte_count: int) -> None:
        """Wait for room, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._room_bytes >= byte_count)
            self._room_bytes -= byte_count

    def give(self, byte_count: int) -> None:
        """Give room back."""
        with self._changed:
            self._room_bytes += byte_count
            self._changed.notify_all()


class _Pipe:
    """One direction of a connection: bytes on their way, each with its time of arrival."""

    def __init__(self, room: _Room) -> None:
        self._changed = threading.Condition()
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._room = room
        self._is_over = False

    def put(self, arrives_at: float, data: bytes) -> bool:
        """Put bytes on their way, for which room was taken; False if the connection is over."""
        with self._changed:
            if not self._is_over:
                self._under_way.append((arrives_at, data))
                self._changed.notify_all()
                return True
        self._room.give(len(data))
        return False

    def take(self) -> bytes | None:
        """Return the next bytes when they have arrived; None when the connection is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._under_way) or self._is_over)
            while not self._is_over:
                arrives_at, data = self._under_way[0]
                left_s = arrives_at - time.monotonic()
                if left_s <= 0:
                    self._under_way.popleft()
                    self._room.give(len(data))
                    return data
                self._changed.wait(left_s)
            return None

    def end(self) -> None:
        """Drop what is under way."""
        with self._changed:
            self._is_over = True
            dropped = sum(len(data) for _, data in self._under_way)
            self._under_way.clear()
            self._changed.notify_all()
        self._room.give(dropped)


class DelayProxy:
    """A long wire to one server. Use as a context manager.

    Parameters
    ----------
    target : (str, int)
        The server's address.
    round_trip_s : float
        Time there and back.
    bytes_per_s : float
        Rate of the server's bytes, all connections together.
    queue_bytes : int
        Buffer before the bottleneck.
    mean_life_s, mean_life_bytes : float, optional
        Means after which a connection is cut; infinite by default.
    seed : int
        Of the random lives.

    Attributes
    ----------
    address : (str, int)
        Where it listens.
    connections, cuts : int
        Connections so far, and how many of them were cut.
    bytes_sent : int
        Bytes of the server that came out at the client's side.
    bytes_taken : int
        Bytes of the server that went in.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        round_trip_s: float,
        bytes_per_s: float,
        queue_bytes: int = 256 << 10,
        mean_life_s: float = math.inf,
        mean_life_bytes: float = math.inf,
        seed: int = 0,
    ) -> None:
        self._target = target
        self._round_trip_s = round_trip_s
        self._wire = _Wire(bytes_per_s)
        self._room = _Room(int(bytes_per_s * round_trip_s) + queue_bytes)
        self._means = (mean_life_s, mean_life_bytes)
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._lives: list[tuple[float, int, _Connection]] = []
        self._reaper = threading.Condition(self._lock)
        self._is_over = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.connections = self.cuts = self.bytes_sent = self.bytes_taken = 0

    def __enter__(self) -> DelayProxy:
        for work in (self._accept, self._reap):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
            open_ = [connection for _, _, connection in self._lives]
            self._reaper.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in open_:
            connection.cut()

    def _draw(self, mean: float) -> float:
        return math.inf if math.isinf(mean) else self._rng.expovariate(1 / mean)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    life_s, life_bytes = (self._draw(mean) for mean in self._means)
                    self.connections += 1
                    connection = _Connection(
                        self, client, self._target, self._round_trip_s, self._room, life_bytes
                    )
                    if self._is_over:
                        connection.cut()
                        return
                    ends_at = time.monotonic() + life_s
                    heapq.heappush(self._lives, (ends_at, self.connections, connection))
                    self._reaper.notify_all()
                connection.start()

    def _reap(self) -> None:
        """Cut the connections whose time is over."""
        with self._lock:
            while not self._is_over:
                now = time.monotonic()
                while self._lives and self._lives[0][0] <= now:
                    _, _, connection = heapq.heappop(self._lives)
                    if connection.cut():
                        self.cuts += 1
                next_at = self._lives[0][0] if self._lives else math.inf
                self._reaper.wait(None if math.isinf(next_at) else next_at - now)

    def pass_at(self, byte_count: int) -> float:
        """Take a server's bytes through the bottleneck; return when they have passed."""
        with self._lock:
            self.bytes_taken += byte_count
        return self._wire.pass_at(byte_count)

    def note_sent(self, byte_count: int) -> None:
        """Count bytes that came out."""
        with self._lock:
            self.bytes_sent += byte_count

    def note_cut(self) -> None:
        """Count a connection that had its bytes."""
        with self._lock:
            self.cuts += 1


class _Connection:
    """One connection through the proxy: four threads, two pipes."""

    def __init__(
        self,
        proxy: DelayProxy,
        client: socket.socket,
        target: tuple[str, int],
        round_trip_s: float,
        room: _Room,
        life_bytes: float,
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._target = target
        self._delay_s = round_trip_s / 2
        self._opens_at = time.monotonic() + round_trip_s
        self._life_bytes = life_bytes
        self._room = room
        self._up_room = _Room(REQUESTS_BYTES)
        self._up, self._down = _Pipe(self._up_room), _Pipe(room)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = [client]
        self._is_cut = False

    def start(self) -> None:
        """Connect to the server and carry bytes."""
        server = socket.socket()
        for each in (self._client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The wire is the proxy's: the sockets at its ends must not hold as much again.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        try:
            server.connect(self._target)
        except OSError:
            self.cut()
            return
        with self._lock:
            self._sockets.append(server)
        for work in (
            lambda: self._read_up(server),
            lambda: self._write(self._up, server, is_down=False),
            lambda: self._read_down(server),
            lambda: self._write(self._down, self._client, is_down=True),
        ):
            threading.Thread(target=work, daemon=True).start()

    def cut(self) -> bool:
        """Reset both sides and drop what is under way; False if it was over already."""
        with self._lock:
            if self._is_cut:
                return False
            self._is_cut = True
            sockets = list(self._sockets)
        self._up.end()
        self._down.end()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        return True

    def _pieces(self, source: socket.socket) -> Iterator[bytes]:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                yield data

    def _read_up(self, server: socket.socket) -> None:
        for data in self._pieces(self._client):
            self._up_room.take(len(data))
            if not self._up.put(max(time.monotonic(), self._opens_at) + self._delay_s, data):
                return
        self.cut()

    def _read_down(self, server: socket.socket) -> None:
        for data in self._pieces(server):
            self._room.take(len(data))
            passed_at = self._proxy.pass_at(len(data))
            if not self._down.put(max(passed_at, self._opens_at) + self._delay_s, data):
                return
            self._life_bytes -= len(data)
            if self._life_bytes <= 0:
                if self.cut():
                    self._proxy.note_cut()
                return
        self.cut()

    def _write(self, pipe: _Pipe, sink: socket.socket, *, is_down: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := pipe.take()) is not None:
                sink.sendall(data)
                if is_down:
                    self._proxy.note_sent(len(data))
        self.cut()
