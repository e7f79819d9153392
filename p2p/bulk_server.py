"""The serving half of the bulk plane: proved bytes over TLS, to peers that may have them.

Purpose: answer ``GET /tensor/<digest>`` with ``Range`` (see `http1`) from the store,
in blocking threads, one per connection.

Rules
- The peer id comes from the certificate (see `tls`); the caller's `allow` is asked
  for every request, so that access taken back takes effect at once.
- Only ranges are served of which the reader says that they are proved.
- Everything is bounded: connections in all, per peer, and per address as long as
  nobody on them was allowed anything; the handshake, the wait for a request, and the
  time in which a reader must take each slice of bytes. A stuck peer costs a thread
  until that deadline, no longer.
- Answers are collected in one reused buffer and sent together as long as more
  requests are waiting, so that small objects cost neither a packet nor a system call
  each.

Not here: what is in the store, who is allowed (`open_reader` and `allow` are called
from the connections' threads and must be thread-safe), and limits on the rate.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tensorswarm.store.errors import LocalError, ProtocolError
from tensorswarm.store.reader import ObjectReader

from . import http1
from .tls import BulkIdentity, peer_id_of

HANDSHAKE_TIMEOUT_S = 5.0
"""Seconds for a handshake, and for a stranger's first request: ten slow round trips."""

SEND_BUFFER_BYTES = 256 << 10
"""Room for answers, of each connection: some sixty small ones. Sizes up to 4 MiB were
measured and cost the same processor time."""

SEND_SLICE_BYTES = 128 << 10
"""Bytes that a reader must take within the send deadline: with 20 s, 6.5 kB/s."""

MAX_TRACKED_PEERS = 1024
"""Peers whose sent bytes are counted: the least recently served is forgotten first."""

LINGER_S = 1.0
"""Seconds to wait for the peer to read a refusal before the socket is closed: closing
with unread requests would reset the connection and could destroy the answer."""

MAX_LINGER_BYTES = 64 << 10
"""Bytes of further requests thrown away meanwhile: what fits a pipeline of ours."""

ACCEPT_POLL_S = 0.5
"""Seconds between looks at the closing flag, where shutting a listening socket down
does not wake the thread that accepts (everywhere but Linux)."""

BACKLOG = 128
"""Connections the kernel keeps for us before they are accepted."""

INPUT_BUFFER_BYTES = 32 << 10
"""Room for requests: an unfinished head and a whole TLS record behind it."""

_SHORTEST_WAIT_S = 0.001  # a timeout of 0 would mean "do not wait at all"

_log = logging.getLogger(__name__)


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
        slow, a disk error.
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


class _Limits(NamedTuple):
    connections: int
    per_peer: int
    unproved_per_host: int
    handshake_timeout_s: float
    idle_timeout_s: float
    send_timeout_s: float


class BulkServer:
    """Serves objects to peers.

    Parameters
    ----------
    identity : BulkIdentity
        Our certificate.
    open_reader : callable
        From a digest to a reader, or None when there is no such object.
    allow : callable
        From a peer id to whether it may have anything.
    host : str, optional
        Address to listen on; ``"::"`` listens on IPv4 as well.
    port : int, optional
        Port to listen on; 0 lets the system choose.
    max_connections : int, optional
        Connections served at once; further ones are closed unanswered. Half of
        them may come from one address before anybody there was allowed anything.
    max_connections_per_peer : int, optional
        Connections of one peer id; further ones are answered 503.
    handshake_timeout_s, idle_timeout_s, send_timeout_s : float, optional
        Seconds for the handshake, for the next whole request, and for the peer to
        take `SEND_SLICE_BYTES`.
    """

    def __init__(
        self,
        identity: BulkIdentity,
        open_reader: Callable[[bytes], ObjectReader | None],
        allow: Callable[[str], bool],
        *,
        host: str = "0.0.0.0",
        port: int = 0,
        max_connections: int = 64,
        max_connections_per_peer: int = 8,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        idle_timeout_s: float = 60.0,
        send_timeout_s: float = 20.0,
    ) -> None:
        self._identity = identity
        self._open_reader = open_reader
        self._allow = allow
        self._wanted_address = (host, port)
        self._limits = _Limits(
            max_connections,
            max_connections_per_peer,
            max(1, max_connections // 2),
            handshake_timeout_s,
            idle_timeout_s,
            send_timeout_s,
        )
        self._listener: socket.socket | None = None
        self._accept_thread: threading.Thread | None = None
        self._address = ("", 0)
        self._table = _Table()

    def start(self) -> None:
        """Listen and serve, in threads of its own.

        Raises
        ------
        LocalError
            The address cannot be listened on.
        """
        if self._listener is not None:
            raise RuntimeError("a server is started once")
        host, port = self._wanted_address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        dualstack = host == "::" and socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server(
                (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=dualstack
            )
        except OSError as error:
            raise LocalError(f"cannot listen on {host} port {port}: {error}") from error
        listener.settimeout(ACCEPT_POLL_S)
        self._listener = listener
        self._address = listener.getsockname()[:2]
        self._accept_thread = threading.Thread(
            target=self._accept, args=(listener,), name="bulk-accept", daemon=True
        )
        self._accept_thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port listened on, after `start`."""
        return self._address

    def statistics(self) -> ServerStatistics:
        """Return what the server has done so far."""
        return self._table.statistics()

    def close(self, timeout_s: float = 5.0) -> None:
        """Cut all connections and wait for the threads to end.

        Parameters
        ----------
        timeout_s : float, optional
            Longest wait. Threads that a disk holds up end by themselves later.
        """
        deadline = time.monotonic() + timeout_s
        threads = self._table.shut()
        if self._listener is not None and self._accept_thread is not None:
            with suppress(OSError):  # only Linux can shut a listening socket down
                self._listener.shutdown(socket.SHUT_RDWR)
            threads.insert(0, self._accept_thread)  # first: it may still start one of the others
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        late = [thread.name for thread in threads if thread.is_alive()]
        if late:
            _log.warning("still running %s s after close: %s", timeout_s, ", ".join(late))

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while not self._table.is_closing():
                try:
                    sock, address = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:
                    if self._table.is_closing():
                        return
                    _log.warning("cannot accept a connection: %s", error)
                    self._table.wait_closing(ACCEPT_POLL_S)  # e.g. out of file descriptors
                    continue
                self._serve(sock, address[0])

    def _serve(self, sock: socket.socket, host: str) -> None:
        connection = _Connection(
            sock, host, self._identity, self._open_reader, self._allow, self._limits, self._table
        )
        if not self._table.admit(connection, self._limits):
            sock.close()
            return
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.warning("cannot serve %s: %s", host, error)
            self._table.dismiss(connection, failed=True)
            sock.close()


class _Table:
    """Connections and counters of one server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._open: set[_Connection] = set()
        self._unproved: Counter[str] = Counter()
        self._per_peer: Counter[str] = Counter()
        self._sent: OrderedDict[str, int] = OrderedDict()
        self._accepted = self._turned_away = self._failed = self._requests = 0
        self._bytes_sent = 0

    def is_closing(self) -> bool:
        return self._closing.is_set()

    def wait_closing(self, timeout_s: float) -> None:
        self._closing.wait(timeout_s)

    def shut(self) -> list[threading.Thread]:
        """Refuse further connections, cut the open ones, and return their threads."""
        with self._lock:
            self._closing.set()
            connections = list(self._open)
        for connection in connections:
            connection.abort()
        return [connection.thread for connection in connections]

    def admit(self, connection: _Connection, limits: _Limits) -> bool:
        with self._lock:
            if (
                self._closing.is_set()
                or len(self._open) >= limits.connections
                or self._unproved[connection.host] >= limits.unproved_per_host
            ):
                self._turned_away += 1
                return False
            self._accepted += 1
            self._open.add(connection)
            self._unproved[connection.host] += 1
            return True

    def identify(self, connection: _Connection, peer_id: str, limit: int) -> bool:
        """Note whose connection it is; False when that peer has too many."""
        with self._lock:
            if self._per_peer[peer_id] >= limit:
                self._turned_away += 1
                return False
            self._per_peer[peer_id] += 1
            connection.peer_id = peer_id
            return True

    def prove(self, connection: _Connection) -> None:
        """Note that the peer was allowed something: it is no stranger any more."""
        if not connection.proved:
            with self._lock:
                connection.proved = True
                _decrement(self._unproved, connection.host)

    def dismiss(self, connection: _Connection, *, failed: bool) -> None:
        with self._lock:
            self._open.discard(connection)
            self._failed += failed
            if not connection.proved:
                _decrement(self._unproved, connection.host)
            if connection.peer_id is not None:
                _decrement(self._per_peer, connection.peer_id)

    def count(self, peer_id: str, requests: int, byte_count: int) -> None:
        with self._lock:
            self._requests += requests
            if not byte_count:
                return
            self._bytes_sent += byte_count
            self._sent[peer_id] = self._sent.get(peer_id, 0) + byte_count
            self._sent.move_to_end(peer_id)
            if len(self._sent) > MAX_TRACKED_PEERS:
                self._sent.popitem(last=False)

    def statistics(self) -> ServerStatistics:
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


class _Connection:
    """One accepted connection: its thread, its buffers, its one open reader."""

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        identity: BulkIdentity,
        open_reader: Callable[[bytes], ObjectReader | None],
        allow: Callable[[str], bool],
        limits: _Limits,
        table: _Table,
    ) -> None:
        self.host = host
        self.peer_id: str | None = None
        self.proved = False
        self.thread = threading.Thread(target=self._run, name=f"bulk-serve-{host}", daemon=True)
        self._raw = sock
        self._busy = False
        self._abort_lock = threading.Lock()
        self._identity = identity
        self._open_reader = open_reader
        self._allow = allow
        self._limits = limits
        self._table = table
        self._reader: tuple[bytes, ObjectReader] | None = None
        self._input = bytearray(INPUT_BUFFER_BYTES)
        self._start = self._end = 0
        self._output = memoryview(bytearray(SEND_BUFFER_BYTES))
        self._filled = self._filled_requests = self._filled_bytes = 0

    def abort(self) -> None:
        """Cut the connection, from any thread; its own thread closes it."""
        with self._abort_lock, suppress(OSError):  # closed or cut already
            _shutdown(self._raw, socket.SHUT_RDWR)

    def _run(self) -> None:
        failed = True
        try:
            self._socket = self._handshake()
            self._answer_all()
            failed = False
        except ProtocolError as error:
            _log.info("peer %s at %s %s", self.peer_id, self.host, error)
        except LocalError as error:
            _log.warning("cut peer %s off: %s", self.peer_id, error)
        except OSError as error:  # of the socket: ssl.SSLError and TimeoutError are such
            _log.info("lost peer %s at %s: %s", self.peer_id, self.host, error)
        except Exception:
            _log.exception("serving peer %s failed", self.peer_id)
        finally:
            # Counted before the peer sees the end: who waits for it finds it counted.
            self._table.dismiss(self, failed=failed and not self._table.is_closing())
            self._drop_reader()
            with self._abort_lock:
                self._raw.close()

    def _handshake(self) -> ssl.SSLSocket:
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._raw.settimeout(self._limits.handshake_timeout_s)
        with self._abort_lock:
            secured = self._identity.server_context.wrap_socket(
                self._raw, server_side=True, do_handshake_on_connect=False
            )
            self._raw = secured
        secured.do_handshake()
        peer_id = peer_id_of(secured)
        self._busy = not self._table.identify(self, peer_id, self._limits.per_peer)
        return secured

    def _answer_all(self) -> None:
        while (head := self._next_head()) is not None:
            try:
                exchange = http1.ServerExchange(head)
            except ProtocolError:
                self._finish(http1.bad_request())
                raise
            refusal = self._refusal_of_peer()
            if refusal is not None:
                self._finish(exchange.refusal(refusal))
                return
            self._answer(exchange)

    def _next_head(self) -> bytes | None:
        """Return the next request's head, or None when the peer is through."""
        head_end = http1.find_head(self._input, self._start, self._end)
        if head_end is None:
            self._flush()
            limits = self._limits
            wait_s = limits.idle_timeout_s if self.proved else limits.handshake_timeout_s
            deadline = time.monotonic() + wait_s
            while head_end is None:
                if not self._receive(deadline):
                    return None
                head_end = http1.find_head(self._input, self._start, self._end)
        head = bytes(self._input[self._start : head_end])
        self._start = head_end
        return head

    def _receive(self, deadline: float) -> bool:
        """Receive more of a request; False when none came or the peer closed."""
        rest = self._input[self._start : self._end]
        self._input[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        try:
            self._socket.settimeout(max(_SHORTEST_WAIT_S, deadline - time.monotonic()))
            received = self._socket.recv_into(memoryview(self._input)[self._end :])
        except TimeoutError:
            if rest:
                raise ProtocolError("did not finish a request") from None
            return False
        self._end += received
        return received > 0

    def _refusal_of_peer(self) -> int | None:
        if self._busy:
            return http1.UNAVAILABLE
        if self.peer_id is None or not self._allow(self.peer_id):
            return http1.FORBIDDEN
        self._table.prove(self)
        return None

    def _answer(self, exchange: http1.ServerExchange) -> None:
        _, offset, length = exchange.request
        reader = self._reader_for(exchange.request)
        if reader is None:
            self._put(exchange.refusal(http1.NOT_FOUND))
        elif not reader.covers(offset, length):
            self._put(exchange.refusal(http1.RANGE_NOT_SATISFIABLE))
        else:
            self._put(exchange.partial_content(reader.size_bytes))
            self._put_body(reader, offset, length)
        self._filled_requests += 1

    def _reader_for(self, request: http1.RangeRequest) -> ObjectReader | None:
        """Return a reader, the last one if it will do.

        A reader knows what was proved when it was opened: one that does not cover the
        range is opened again, for the rest may have come since.
        """
        if self._reader is not None:
            digest, reader = self._reader
            if digest == request.digest and reader.covers(request.offset, request.length):
                return reader
            self._drop_reader()
        opened = self._open_reader(request.digest)
        if opened is not None:
            self._reader = (request.digest, opened)
        return opened

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None

    def _put(self, data: bytes) -> None:
        """Add a head to the answers that wait to be sent."""
        if self._filled + len(data) > len(self._output):
            self._flush()
        self._output[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def _put_body(self, reader: ObjectReader, offset: int, length: int) -> None:
        """Add an object's bytes, sending as often as the buffer is full."""
        end = offset + length
        while offset < end:
            if self._filled == len(self._output):
                self._flush()
            view = self._output[self._filled : self._filled + end - offset]
            try:
                reader.read_into(offset, view)
            except OSError as error:
                raise LocalError(f"cannot read an object that it asked for: {error}") from error
            self._filled += len(view)
            self._filled_bytes += len(view)
            offset += len(view)

    def _flush(self) -> None:
        """Send what is collected; each slice has the whole deadline."""
        if not self._filled:
            return
        if self.peer_id is not None:
            # Before sending: a peer that has the bytes finds them counted.
            self._table.count(self.peer_id, self._filled_requests, self._filled_bytes)
        self._socket.settimeout(self._limits.send_timeout_s)
        for start in range(0, self._filled, SEND_SLICE_BYTES):
            self._socket.sendall(self._output[start : min(self._filled, start + SEND_SLICE_BYTES)])
        self._filled = self._filled_requests = self._filled_bytes = 0

    def _finish(self, refusal: bytes) -> None:
        """Send a last answer, and give the peer a moment to read it."""
        self._put(refusal)
        self._filled_requests += 1
        self._flush()
        deadline = time.monotonic() + LINGER_S
        thrown_away = 0
        with suppress(OSError):  # the peer may be gone already: nothing is lost
            _shutdown(self._socket, socket.SHUT_WR)
            while thrown_away < MAX_LINGER_BYTES and (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                received = self._socket.recv_into(self._input)
                if not received:
                    return
                thrown_away += received


def _shutdown(sock: socket.socket, how: int) -> None:
    """Shut the TCP connection down, below TLS.

    `ssl.SSLSocket.shutdown` would drop the TLS state as well, and a thread still using
    the socket would go on in the clear.
    """
    socket.socket.shutdown(sock, how)


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]  # keys come from outside: none stays behind
