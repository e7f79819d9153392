"""One connection to a bulk server: a thread that reads requests and sends proved bytes.

Rules
- The handshake proves the peer id (see `tls`); every request is allowed anew, so that
  access taken back takes effect at once.
- Only ranges are served of which the reader says that they are proved.
- Answers are collected in one reused buffer and sent together as long as more requests are
  waiting, so that small objects cost neither a packet nor a system call each.
- Every wait has a deadline; a reader that is too slow uses its `Patience` up.
- A refusal is the last answer, and the peer gets a moment to read it.

Not here: who gets a place, and who makes room (see `table`).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass

from tensorswarm.store.errors import LocalError, ProtocolError
from tensorswarm.store.reader import FileReader, ObjectReader

from ..limits.patience import Patience
from ..limits.rates import FairGate, RateLimiter
from . import clear as bulk_clear
from . import http1
from .gate import Gate
from .http1_small import SmallServerExchange, read_request
from .peer_reader import PeerReader
from .send import Sender, shut_down
from .small_objects import SmallObjects
from .table import ConnectionTable
from .tls import BulkIdentity, peer_id_of

SEND_BUFFER_BYTES = 256 << 10
"""Room for answers, of each connection: some sixty small ones. Sizes up to 4 MiB were
measured and cost the same processor time."""

SEND_SLICE_BYTES = 128 << 10
"""Bytes sent between two looks at the clock."""

LINGER_S = 1.0
"""Seconds to wait for the peer to read a refusal before the socket is closed: closing
with unread requests would reset the connection and could destroy the answer."""

MAX_LINGER_BYTES = 64 << 10
"""Bytes of further requests thrown away meanwhile: what fits a pipeline of ours."""

INPUT_BUFFER_BYTES = 32 << 10
"""Room for requests: an unfinished head and a whole TLS record behind it."""

_SHORTEST_WAIT_S = 0.001  # a timeout of 0 would mean "do not wait at all"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Service:
    """What a server's connections share; `BulkServer` says what each is for.

    Attributes
    ----------
    table : ConnectionTable
        Who is connected.
    senders : FairGate
        Lets few threads send at a time.
    """

    identity: BulkIdentity
    open_reader: Callable[[bytes], ObjectReader | None]
    read_small: SmallObjects
    allow: Callable[[str], bool]
    may_have: Callable[[str, bytes], bool]
    table: ConnectionTable
    limiter: RateLimiter | None
    senders: FairGate
    gate: Gate | None
    handshake_timeout_s: float
    idle_timeout_s: float
    read_patience_s: float
    min_read_bytes_per_s: float


class ServedConnection:
    """One accepted connection: its thread, its buffers, its one open reader.

    Parameters
    ----------
    sock : socket.socket
        What was accepted; it is closed when the thread ends.
    host : str
        Address at the other end.
    service : Service
        What it shares with the server's other connections.

    Attributes
    ----------
    host, peer_id, proved, idle_since, thread
        What the table knows of it, see `bulk.table.Connection`. Whoever makes a
        connection admits it to the table and then starts its thread.
    """

    def __init__(self, sock: socket.socket, host: str, service: Service) -> None:
        self.host = host
        self.peer_id: str | None = None
        self.proved = False
        self.idle_since: float | None = None
        self.thread = threading.Thread(target=self._run, name=f"bulk-serve-{host}", daemon=True)
        self._service = service
        self._table = service.table
        self._raw = sock
        self._abort_lock = threading.Lock()
        self._patience = Patience(service.read_patience_s, service.min_read_bytes_per_s)
        self._name = ""
        self._busy = False
        self._is_clear = False
        self._ticket: Hashable | None = None
        self._reader = PeerReader(
            "", service.open_reader, service.read_small, service.may_have, service.gate
        )
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
            self._sender = Sender(self._socket, self._name, self._service.senders, self._patience)
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
            self._reader.close()
            with self._abort_lock:
                self._raw.close()

    def _handshake(self) -> socket.socket:
        deadline = time.monotonic() + self._service.handshake_timeout_s
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._raw.settimeout(self._service.handshake_timeout_s)
        with self._abort_lock:
            context = bulk_clear.context_for(self._service.identity, self._raw, server_side=True)
            secured = context.wrap_socket(
                self._raw, server_side=True, do_handshake_on_connect=False
            )
            self._raw = secured
        secured.do_handshake()
        self._name = self._reader.peer_id = peer_id_of(secured)
        self._busy = not self._table.identify(self, self._name, time.monotonic())
        self._output = memoryview(bytearray(SEND_BUFFER_BYTES))
        identity = self._service.identity
        if not bulk_clear.agree(secured, identity, self._name, deadline, server_side=True):
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
            service = self._service
            wait_s = service.idle_timeout_s if self.proved else service.handshake_timeout_s
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
        if not self._service.allow(self._name):
            return http1.FORBIDDEN
        self._table.prove(self)
        return None

    def _answer(self, exchange: http1.ServerExchange) -> None:
        _, offset, length = exchange.request
        self._filled_requests += 1
        reader = self._reader.reader_for(exchange.request)
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
        if self._service.gate is None:
            return
        if self._ticket is not None:
            self._flush()
            self._end_upload()
        self._ticket = self._service.gate.ask(self._name, request.digest, request.offset)

    def _end_upload(self) -> None:
        ticket, self._ticket = self._ticket, None
        if self._service.gate is not None and ticket is not None:
            self._service.gate.end(ticket)

    def _answer_small(self, exchange: SmallServerExchange) -> None:
        body = self._next_body(exchange.body_bytes)
        try:
            request = exchange.read_body(body)
        except ProtocolError:
            self._finish(http1.bad_request())
            raise
        head, answer = exchange.answer(self._reader.small(request.objects))
        self._put(head)
        view = memoryview(answer)
        for start in range(0, len(view), SEND_BUFFER_BYTES // 2):
            piece = view[start : start + SEND_BUFFER_BYTES // 2]
            self._put(piece)
            self._filled_bytes += len(piece)
        self._filled_requests += 1

    def _next_body(self, size_bytes: int) -> bytes:
        """Return the body of a request; it fits the buffer for requests."""
        deadline = time.monotonic() + self._service.idle_timeout_s
        if self._end - self._start < size_bytes:
            self._flush()
        while self._end - self._start < size_bytes:
            if not self._receive(deadline):
                raise ProtocolError("did not finish a request")
        body = bytes(self._input[self._start : self._start + size_bytes])
        self._start += size_bytes
        return body

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
            if self._service.limiter is not None:
                self._service.limiter.take(self._name, count)
            self._table.count(self._name, 0, count)
            self._sender.send_file(reader, offset, count)
            offset += count

    def _most_at_once(self, most: int) -> int:
        limiter = self._service.limiter
        return most if limiter is None else min(most, limiter.slice_bytes)

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
            if self._service.limiter is not None:
                self._service.limiter.take(self._name, stop - start)
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
