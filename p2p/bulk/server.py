"""The serving half of the bulk plane: proved bytes over TLS, to peers that may have them.

Purpose: answer ``GET /tensor/<digest>`` with ``Range`` (see `http1`), and ``POST /small``
for many small objects (see `http1_small`), from the store, in blocking threads, one per
connection.

Rules
- The peer id comes from the certificate (see `tls`); the caller's `allow` is asked
  for every request, so that access taken back takes effect at once.
- Only ranges are served of which the reader says that they are proved.
- Everything is bounded: connections (see `bulk.table`), the handshake, the wait for a
  request. Over a whole answer a reader must keep up a least rate, with a little time to
  spare (`Patience`): who stops reading, or reads a byte a second, costs a thread until
  that is used up, no longer.
- Few threads send at a time (`SENDERS`), and of the peers that wait, the one that got
  least goes first: in a crowd, nobody is left behind by chance.
- With a limiter, every slice waits for its peer's turn: a peer with eight connections
  gets no more than one with one. There are never more connections than the rate can
  feed; further ones are told that there is no room.
- With a `gate`, a request waits there before it is answered, and tells of its end.
- Answers are collected in one reused buffer and sent together as long as more
  requests are waiting, so that small objects cost neither a packet nor a system call
  each.

Not here: what is in the store, and who is allowed (`open_reader` and `allow` are called
from the connections' threads and must be thread-safe).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from tensorswarm.store.errors import LocalError, ProtocolError
from tensorswarm.store.reader import FileReader, ObjectReader

from ..limits.patience import MIN_READ_BYTES_PER_S, READ_PATIENCE_S, Patience
from ..limits.rates import FairGate, RateLimiter
from . import clear as bulk_clear
from . import http1
from .gate import Gate
from .http1_small import SmallServerExchange, read_request
from .send import Sender, shut_down
from .small_objects import SmallObjects, read_each
from .table import (
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    ConnectionTable,
    Limits,
    ServerStatistics,
)
from .tls import BulkIdentity, peer_id_of

__all__ = ["BulkServer", "ServerStatistics"]

HANDSHAKE_TIMEOUT_S = 5.0
"""Seconds for a handshake, and for a stranger's first request: ten slow round trips."""

IDLE_TIMEOUT_S = 60.0
"""Seconds that a peer may take to its next whole request: connecting anew is cheap."""

SEND_BUFFER_BYTES = 256 << 10
"""Room for answers, of each connection: some sixty small ones. Sizes up to 4 MiB were
measured and cost the same processor time."""

SEND_SLICE_BYTES = 128 << 10
"""Bytes sent between two looks at the clock."""

MIN_SHARE_BYTES_PER_S = 4 << 10
"""Part of a limited rate that a connection gets at least, or else none is accepted: a
peer that sees less than 4 KiB in 3 s takes us for dead."""

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

SENDERS = max(1, (os.cpu_count() or 1) // 2)
"""Threads that encrypt and send at a time; the other processors are for those who receive,
verify and read. What this gains and costs is in docs/design.md (The planner)."""

_SHORTEST_WAIT_S = 0.001  # a timeout of 0 would mean "do not wait at all"

_log = logging.getLogger(__name__)


class _Times(NamedTuple):
    handshake_timeout_s: float
    idle_timeout_s: float
    read_patience_s: float
    min_read_bytes_per_s: float


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
        Connections served at once; further ones are answered 503, or get the place of
        another (see `bulk.table`). Half of them may come from one address before
        anybody there was allowed anything.
    max_connections_per_peer : int, optional
        Connections of one peer id; further ones are answered 503.
    handshake_timeout_s, idle_timeout_s : float, optional
        Seconds for the handshake, and for the next whole request.
    read_patience_s, min_read_bytes_per_s : float, optional
        The rate that a reader must keep up, and by how many seconds it may be behind.
    limiter : RateLimiter, optional
        Holds what is sent in all below a rate.
    read_small : callable, optional
        Reads many small objects at once; by default, one after the other.
    may_have : callable, optional
        Tells whether a peer may have an object; if not, it is answered as missing.
    gate : Gate, optional
        Where requests for parts of objects wait for their turn.
    """

    def __init__(
        self,
        identity: BulkIdentity,
        open_reader: Callable[[bytes], ObjectReader | None],
        allow: Callable[[str], bool],
        *,
        host: str = "0.0.0.0",
        port: int = 0,
        max_connections: int = MAX_CONNECTIONS,
        max_connections_per_peer: int = MAX_CONNECTIONS_PER_PEER,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        read_patience_s: float = READ_PATIENCE_S,
        min_read_bytes_per_s: float = MIN_READ_BYTES_PER_S,
        limiter: RateLimiter | None = None,
        read_small: SmallObjects | None = None,
        may_have: Callable[[str, bytes], bool] = lambda _peer_id, _digest: True,
        gate: Gate | None = None,
    ) -> None:
        self._gate_of_requests = gate
        self._identity = identity
        self._open_reader = open_reader
        self._read_small = read_small or partial(read_each, open_reader)
        self._may_have = may_have
        self._allow = allow
        self._wanted_address = (host, port)
        self._times = _Times(
            handshake_timeout_s, idle_timeout_s, read_patience_s, min_read_bytes_per_s
        )
        self._limiter = limiter
        self._listener: socket.socket | None = None
        self._accept_thread: threading.Thread | None = None
        self._address = ("", 0)
        self._gate = FairGate(SENDERS)
        places = max_connections
        if limiter is not None:
            places = min(places, int(limiter.bytes_per_s / MIN_SHARE_BYTES_PER_S))
        self._table = ConnectionTable(
            Limits(places, max_connections_per_peer, max(1, max_connections // 2))
        )

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
            why = os.strerror(error.errno) if error.errno else error
            raise LocalError(
                f"cannot listen on {host} port {port} for bulk connections: {why}"
            ) from error
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
        if self._limiter is not None:
            self._limiter.close()  # nobody waits for a turn any more
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
            sock,
            host,
            self._identity,
            self._open_reader,
            self._allow,
            self._times,
            self._table,
            self._limiter,
            self._gate,
        )
        connection.read_small = self._read_small
        connection.may_have = self._may_have
        connection.gate = self._gate_of_requests
        if not self._table.admit(connection, time.monotonic()):
            sock.close()
            return
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.warning("cannot serve %s: %s", host, error)
            self._table.dismiss(connection, failed=True)
            sock.close()


class _Connection:
    """One accepted connection: its thread, its buffers, its one open reader."""

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        identity: BulkIdentity,
        open_reader: Callable[[bytes], ObjectReader | None],
        allow: Callable[[str], bool],
        times: _Times,
        table: ConnectionTable,
        limiter: RateLimiter | None,
        gate: FairGate,
    ) -> None:
        self._gate = gate
        self.host = host
        self.peer_id: str | None = None
        self.proved = False
        self.idle_since: float | None = None
        self.read_small: SmallObjects = partial(read_each, open_reader)
        self.may_have: Callable[[str, bytes], bool] = lambda _peer_id, _digest: True
        self.gate: Gate | None = None
        self._ticket: Hashable | None = None
        self.thread = threading.Thread(target=self._run, name=f"bulk-serve-{host}", daemon=True)
        self._raw = sock
        self._busy = False
        self._abort_lock = threading.Lock()
        self._identity = identity
        self._open_reader = open_reader
        self._allow = allow
        self._times = times
        self._patience = Patience(times.read_patience_s, times.min_read_bytes_per_s)
        self._table = table
        self._limiter = limiter
        self._name = ""
        self._is_clear = False
        self._reader: tuple[bytes, ObjectReader] | None = None
        self._input = bytearray(INPUT_BUFFER_BYTES)
        self._start = self._end = 0
        self._output = memoryview(b"")  # a stranger costs no more than its input
        self._filled = self._filled_requests = self._filled_bytes = 0

    def abort(self) -> None:
        """Cut the connection, from any thread; its own thread closes it."""
        with self._abort_lock, suppress(OSError):  # closed or cut already
            shut_down(self._raw, socket.SHUT_RDWR)

    def _run(self) -> None:
        failed = True
        try:
            self._socket = self._handshake()
            self._sender = Sender(self._socket, self._name, self._gate, self._patience)
            self._answer_all()
            failed = False
        except ProtocolError as error:
            _log.info("peer %s at %s %s", self._name, self.host, error)
        except LocalError as error:
            _log.warning("cut peer %s off: %s", self._name, error)
        except OSError as error:  # of the socket: ssl.SSLError and TimeoutError are such
            _log.info("lost peer %s at %s: %s", self._name, self.host, error)
        except Exception:
            _log.exception("serving peer %s failed", self._name)
        finally:
            # Counted before the peer sees the end: who waits for it finds it counted.
            self._table.dismiss(self, failed=failed and not self._table.is_closing())
            self._end_upload()
            self._drop_reader()
            with self._abort_lock:
                self._raw.close()

    def _handshake(self) -> socket.socket:
        deadline = time.monotonic() + self._times.handshake_timeout_s
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._raw.settimeout(self._times.handshake_timeout_s)
        with self._abort_lock:
            context = bulk_clear.context_for(self._identity, self._raw, server_side=True)
            secured = context.wrap_socket(
                self._raw, server_side=True, do_handshake_on_connect=False
            )
            self._raw = secured
        secured.do_handshake()
        self._name = peer_id_of(secured)
        self._busy = not self._table.identify(self, self._name, time.monotonic())
        self._output = memoryview(bytearray(SEND_BUFFER_BYTES))
        if not bulk_clear.agree(secured, self._identity, self._name, deadline, server_side=True):
            return secured
        bulk_clear.end_tls(secured, deadline)
        with self._abort_lock:  # no `abort` while the descriptor changes hands
            self._raw = bulk_clear.detach(secured)
        self._is_clear = True
        return self._raw

    def _answer_all(self) -> None:
        while (head := self._next_head()) is not None:
            try:
                exchange = read_request(head)
            except ProtocolError:
                self._finish(http1.bad_request())
                raise
            refusal = self._refusal_of_peer()
            if refusal is not None:
                self._finish(exchange.refusal(refusal))
                return
            if isinstance(exchange, SmallServerExchange):
                self._answer_small(exchange)
            else:
                self._answer(exchange)

    def _next_head(self) -> bytes | None:
        """Return the next request's head, or None when the peer is through."""
        head_end = http1.find_head(self._input, self._start, self._end)
        if head_end is None:
            self._flush()
            self._end_upload()
            times = self._times
            wait_s = times.idle_timeout_s if self.proved else times.handshake_timeout_s
            self.idle_since = time.monotonic()
            deadline = self.idle_since + wait_s
            while head_end is None:
                if not self._receive(deadline):
                    return None
                head_end = http1.find_head(self._input, self._start, self._end)
            self.idle_since = None
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
        if not self._allow(self._name):
            return http1.FORBIDDEN
        self._table.prove(self)
        return None

    def _answer(self, exchange: http1.ServerExchange) -> None:
        _, offset, length = exchange.request
        self._filled_requests += 1
        reader = self._reader_for(exchange.request)
        if reader is None:
            self._put(exchange.refusal(http1.NOT_FOUND))
        elif not reader.covers(offset, length):
            self._put(exchange.refusal(http1.RANGE_NOT_SATISFIABLE))
        else:
            self._begin_upload(exchange.request)
            self._put(exchange.partial_content(reader.size_bytes))
            self._put_body(reader, offset, length)

    def _begin_upload(self, request: http1.RangeRequest) -> None:
        """Wait at the gate, after what is collected has left: others wait for that."""
        if self.gate is None:
            return
        if self._ticket is not None:
            self._flush()
            self._end_upload()
        self._ticket = self.gate.ask(self._name, request.digest, request.offset)

    def _end_upload(self) -> None:
        ticket, self._ticket = self._ticket, None
        if self.gate is not None and ticket is not None:
            self.gate.end(ticket)

    def _answer_small(self, exchange: SmallServerExchange) -> None:
        body = self._next_body(exchange.body_bytes)
        try:
            request = exchange.read_body(body)
        except ProtocolError:
            self._finish(http1.bad_request())
            raise
        objects = request.objects
        found = [
            data if self.may_have(self._name, digest) else None
            for (digest, _), data in zip(objects, self.read_small(objects), strict=True)
        ]
        head, answer = exchange.answer(found)
        self._put(head)
        view = memoryview(answer)
        for start in range(0, len(view), SEND_BUFFER_BYTES // 2):
            piece = view[start : start + SEND_BUFFER_BYTES // 2]
            self._put(piece)
            self._filled_bytes += len(piece)
        self._filled_requests += 1

    def _next_body(self, size_bytes: int) -> bytes:
        """Return the body of a request; it fits the buffer for requests."""
        deadline = time.monotonic() + self._times.idle_timeout_s
        if self._end - self._start < size_bytes:
            self._flush()
        while self._end - self._start < size_bytes:
            if not self._receive(deadline):
                raise ProtocolError("did not finish a request")
        body = bytes(self._input[self._start : self._start + size_bytes])
        self._start += size_bytes
        return body

    def _reader_for(self, request: http1.RangeRequest) -> ObjectReader | None:
        """Return a reader, the last one if it will do.

        A reader knows what was proved when it was opened: one that does not cover the
        range is opened again, for the rest may have come since.
        """
        if not self.may_have(self._name, request.digest):
            return None
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

    def _put(self, data: bytes | memoryview) -> None:
        """Add what fits the buffer as a whole to the answers that wait to be sent."""
        if self._filled + len(data) > len(self._output):
            self._flush()
        self._output[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    def _put_body(self, reader: ObjectReader, offset: int, length: int) -> None:
        """Add an object's bytes, sending as often as the buffer is full."""
        if self._is_clear and (file := bulk_clear.sendable(reader, length)) is not None:
            self._send_file(file, offset, length)
            return
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

    def _send_file(self, reader: FileReader, offset: int, length: int) -> None:
        """Send an object's bytes without reading them, behind what is collected."""
        self._flush()
        most = self._most_at_once(bulk_clear.FILE_SLICE_BYTES)
        end = offset + length
        while offset < end:
            count = min(end - offset, most)
            if self._limiter is not None:
                self._limiter.take(self._name, count)
            self._table.count(self._name, 0, count)
            self._sender.send_file(reader, offset, count)
            offset += count

    def _most_at_once(self, most: int) -> int:
        return most if self._limiter is None else min(most, self._limiter.slice_bytes)

    def _flush(self) -> None:
        """Send what is collected, as fast as the limiter and the reader's patience allow."""
        if not self._filled:
            return
        # Before sending: a peer that has the bytes finds them counted.
        self._table.count(self._name, self._filled_requests, self._filled_bytes)
        most = self._most_at_once(SEND_SLICE_BYTES)
        start = 0
        while start < self._filled:
            stop = min(self._filled, start + most)
            if self._limiter is not None:
                self._limiter.take(self._name, stop - start)
            self._sender.send(self._output[start:stop])
            start = stop
        self._filled = self._filled_requests = self._filled_bytes = 0

    def _finish(self, refusal: bytes) -> None:
        """Send a last answer, and give the peer a moment to read it."""
        self._put(refusal)
        self._filled_requests += 1
        self._flush()
        deadline = time.monotonic() + LINGER_S
        thrown_away = 0
        with suppress(OSError):  # the peer may be gone already: nothing is lost
            shut_down(self._socket, socket.SHUT_WR)
            while thrown_away < MAX_LINGER_BYTES and (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                received = self._socket.recv_into(self._input)
                if not received:
                    return
                thrown_away += received
