"""One bulk connection, on the asking side.

Purpose: connect to a peer's bulk address, prove who is there, and carry pipelined
range requests: the bytes of an answer go from the socket into the caller's buffer.

Rules
- One thread uses a connection; `abort` alone may be called from another.
- No wait without an end: connecting and the handshake have one deadline together, the
  head of an answer has the stall deadline as a whole, and so has every send. Of a body
  `MIN_PIECE_BYTES` must come within it: a byte now and then is a stall too.
- Foreign errors (ssl, socket) become the ones below, which say what the peer did.
- After any error but `Lacks` the connection is of no more use.

Not here: whether the bytes are the right ones (`peer_source` and its sink decide),
and what to ask for.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

from tensorswarm.store.errors import NoSource, ProtocolError, Refused, RemoteError

from . import clear as bulk_clear
from . import http1
from .http1 import RangeRequest
from .http1_small import SmallClientExchange, SmallRequest, bitmap_bytes
from .tls import BulkIdentity, peer_id_of

CONNECT_TIMEOUT_S = 5.0
"""Seconds for the TCP connection and the TLS handshake: three round trips, and two
retransmissions of a lost SYN (after 1 s and 3 s)."""

STALL_TIMEOUT_S = 3.0
"""Seconds without a byte after which a peer counts as stalled."""

MIN_PIECE_BYTES = 4 << 10
"""Bytes of a body that must come within the stall deadline: 1.4 kB/s. A peer with a limited
rate gives every connection at least three times that."""

RECEIVE_BUFFER_BYTES = 32 << 10
"""Room for heads: an unfinished one and a whole TLS record (16 KiB) behind it."""

NEAR_ROUND_TRIP_S = 0.001
"""Round trip up to which a peer counts as near: this machine, or its own network."""

NEAR_RECEIVE_BYTES = 4 << 20
"""The kernel's receive buffer for a near peer: 4 GB/s at that round trip. Left to
itself Linux lets it grow to 32 MiB, which is more than a processor's cache holds; one
connection on one machine then verifies and stores 810 MB/s instead of 940. For peers
further away the kernel decides: there the bytes under way need the room."""

_TCP_RTT_OFFSET = 68  # of ``tcpi_rtt`` (microseconds) in Linux's ``struct tcp_info``
_SHORTEST_WAIT_S = 0.001  # a timeout of 0 would mean "do not wait at all"


class Lacks(RemoteError):
    """The peer does not have the bytes asked for; the connection goes on."""


class Denied(Refused):
    """The peer does not let us have anything (exit 7)."""


class Busy(RemoteError):
    """The peer has no capacity for another connection."""


class Stalled(RemoteError):
    """The peer stopped answering."""


class Closed(RemoteError):
    """The connection was cut, by the peer, by the network or by `abort`."""


class Unreachable(NoSource):
    """Nobody answered at the address, or no TLS connection came about (exit 4)."""


class BulkConnection:
    """A connection to a peer's bulk server: TLS, or begun so. Made by `connect`."""

    def __init__(
        self,
        identity: BulkIdentity,
        expected_peer_id: str,
        stall_timeout_s: float,
        max_receive_bytes: int | None,
    ) -> None:
        self._identity = identity
        self._peer_id = expected_peer_id
        self._stall_timeout_s = stall_timeout_s
        self._max_receive_bytes = max_receive_bytes
        self._abort_lock = threading.Lock()
        self._aborted = False
        self._raw: socket.socket | None = None
        self._socket: socket.socket
        self.round_trip_s = math.inf
        self._first_sent_at: float | None = None
        self._has_answered = False
        self._outstanding: deque[http1.ClientExchange | SmallClientExchange] = deque()
        self._body_left = 0
        self._buffer = bytearray(RECEIVE_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @classmethod
    def connect(
        cls,
        address: tuple[str, int],
        identity: BulkIdentity,
        expected_peer_id: str,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        max_receive_bytes: int | None = None,
        watch: Callable[[BulkConnection], None] | None = None,
    ) -> BulkConnection:
        """Connect, shake hands, and check who is there.

        Parameters
        ----------
        address : tuple of str and int
            Numeric IPv4 or IPv6 address, and port. Names are not looked up: that
            wait could not be bounded, and peers tell numbers.
        identity : BulkIdentity
            Our certificate.
        expected_peer_id : str
            Peer id that must be there, in base58.
        timeout_s, stall_timeout_s : float, optional
            Seconds for connecting, and for every later wait.
        max_receive_bytes : int, optional
            Most that the kernel may receive ahead of us, for when we limit our rate.
        watch : callable, optional
            Called with the connection before the first wait, so that another thread
            can `abort` it while it is being made.

        Raises
        ------
        Unreachable
            No TLS connection came about in time.
        ProtocolError
            Somebody else is there, or somebody without a libp2p certificate.
        """
        connection = cls(identity, expected_peer_id, stall_timeout_s, max_receive_bytes)
        if watch is not None:
            watch(connection)
        try:
            connection._open(address, time.monotonic() + timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, address: tuple[str, int], deadline: float) -> None:
        host, port = address
        try:
            ip = ipaddress.ip_address(host)
            raw = socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6)
        except (ValueError, OSError) as error:
            raise Unreachable(f"{host} port {port}: {error}") from error
        self._adopt(raw)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._max_receive_bytes is not None:  # before connecting: it sets the window
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._max_receive_bytes)
            raw.settimeout(_left_s(deadline))
            started = time.monotonic()
            raw.connect((host, port))
            round_trip_s = _round_trip_s(raw) or time.monotonic() - started
            is_near = round_trip_s < NEAR_ROUND_TRIP_S and self._max_receive_bytes is None
            if is_near and _is_granted(NEAR_RECEIVE_BYTES):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_RECEIVE_BYTES)
            raw.settimeout(_left_s(deadline))
            with self._abort_lock:
                context = bulk_clear.context_for(self._identity, raw, server_side=False)
                secured = context.wrap_socket(raw, do_handshake_on_connect=False)
                self._raw = self._socket = secured
            shaking_since = time.monotonic()
            secured.do_handshake()
            # TLS 1.3 takes one round trip, to whoever is really there: a middleman may
            # have answered the TCP connection. The first answer may correct it.
            self.round_trip_s = time.monotonic() - shaking_since
            found = peer_id_of(secured)
            if found != self._peer_id:
                raise ProtocolError(f"is {found} at {host} port {port}, not {self._peer_id}")
            if bulk_clear.agree(secured, self._identity, found, deadline, server_side=False):
                self._leave_tls(secured, deadline)
        except TimeoutError as error:
            raise Unreachable(f"{host} port {port}: no answer in time") from error
        except (OSError, OverflowError) as error:  # the latter: a port beyond 65535
            raise Unreachable(f"{host} port {port}: {error}") from error
        self._socket.settimeout(self._stall_timeout_s)

    def _leave_tls(self, secured: ssl.SSLSocket, deadline: float) -> None:
        bulk_clear.end_tls(secured, deadline)
        with self._abort_lock:  # no `abort` while the descriptor changes hands
            if self._aborted:
                raise Closed("aborted while connecting")
            self._raw = self._socket = bulk_clear.detach(secured)

    def _adopt(self, raw: socket.socket) -> None:
        with self._abort_lock:
            self._raw = raw
            if self._aborted:
                raise Closed("aborted while connecting")

    @property
    def is_clear(self) -> bool:
        """Whether the connection has left TLS; see `bulk.clear`."""
        return not isinstance(self._socket, ssl.SSLSocket)

    @property
    def outstanding(self) -> int:
        """Requests sent whose answers' heads were not read yet."""
        return len(self._outstanding)

    def send_get(self, digest: bytes, offset: int, length: int) -> None:
        """Ask for `length` bytes of an object, behind what was asked before.

        Raises
        ------
        Closed, Stalled
            The request could not be sent.
        """
        self.send_gets([RangeRequest(digest, offset, length)])

    def send_gets(self, requests: Iterable[RangeRequest | SmallRequest]) -> None:
        """Send several requests at once, in order; see `send_get`.

        The peer may stop receiving while it sends: have no more requests outstanding
        than the sockets' buffers hold (some 64 KiB; 200 bytes for a range, and 40 for
        each small object).
        """
        exchanges = [self._exchange(request) for request in requests]
        if self._first_sent_at is None:
            self._first_sent_at = time.monotonic()
        with self._translated():
            self._socket.sendall(b"".join(exchange.encoded for exchange in exchanges))
        self._outstanding.extend(exchanges)

    def _exchange(
        self, request: RangeRequest | SmallRequest
    ) -> http1.ClientExchange | SmallClientExchange:
        if isinstance(request, SmallRequest):
            return SmallClientExchange(request, self._peer_id)
        return http1.ClientExchange(request, self._peer_id)

    def read_small_head(self) -> list[int]:
        """Receive the beginning of an answer to a `SmallRequest`.

        Returns
        -------
        list of int
            Which of its objects follow, by their position in it; take all their bytes
            with `read_into`.

        Raises
        ------
        Denied, Busy, Stalled, Closed, ProtocolError
            No proper answer came.
        """
        exchange = self._outstanding[0]
        assert isinstance(exchange, SmallClientExchange)  # the caller knows what it asked
        self.read_head()
        given = bytearray(bitmap_bytes(len(exchange.request.objects)))
        self.read_into(memoryview(given))
        return exchange.read_bitmap(given)

    def read_head(self) -> None:
        """Receive the head of the oldest outstanding request's answer.

        The bytes asked for follow; take all of them with `read_into` before the next
        `read_head`.

        Raises
        ------
        Lacks, Denied, Busy
            The peer refused this request.
        Stalled, Closed, ProtocolError
            No proper answer came.
        """
        if self._body_left:
            raise RuntimeError("the body of the answer before was not read")
        exchange = self._outstanding.popleft()
        head = self._receive_head()
        if not self._has_answered and self._first_sent_at is not None:
            self._has_answered = True
            self.round_trip_s = min(self.round_trip_s, time.monotonic() - self._first_sent_at)
        answer = exchange.read_head(head)
        if answer is http1.Answer.CONTENT:
            self._body_left = exchange.body_bytes
        elif isinstance(exchange, http1.ClientExchange) and answer is http1.Answer.LACKS:
            digest, offset, length = exchange.request
            raise Lacks(
                f"does not have bytes {offset}-{offset + length - 1} of object {digest.hex()}"
            )
        elif answer is http1.Answer.DENIED:
            raise Denied("refuses us access")
        else:
            raise Busy("has no capacity for another connection")

    def _receive_head(self) -> bytes:
        head_end = http1.find_head(self._buffer, self._start, self._end)
        if head_end is None:
            deadline = time.monotonic() + self._stall_timeout_s
            while head_end is None:
                self._receive_more(deadline)
                head_end = http1.find_head(self._buffer, self._start, self._end)
            self._socket.settimeout(self._stall_timeout_s)
        head = bytes(self._view[self._start : head_end])
        self._start = head_end
        return head

    def _receive_more(self, deadline: float) -> None:
        rest = bytes(self._view[self._start : self._end])
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)
        with self._translated():
            self._socket.settimeout(_left_s(deadline))
            received = self._socket.recv_into(self._view[self._end :])
        if not received:
            raise Closed("closed the connection")
        self._end += received

    def read_into(self, view: memoryview, within_s: float = math.inf) -> int:
        """Fill `view` with the next bytes of the current answer's body.

        Parameters
        ----------
        view : memoryview
            Of bytes; at most as long as what is left of the body.
        within_s : float, optional
            Seconds after which less is returned too, if it is `MIN_PIECE_BYTES` or more.

        Returns
        -------
        int
            Number of bytes that came.

        Raises
        ------
        Stalled, Closed, ProtocolError
            The bytes did not come.
        """
        wanted = len(view)
        if wanted > self._body_left:
            raise ValueError(f"{wanted} bytes wanted, {self._body_left} left of the answer")
        filled = min(wanted, self._end - self._start)
        view[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        begun = time.monotonic()
        look_at = begun + min(within_s, self._stall_timeout_s)
        with self._translated():
            while filled < wanted:  # once for each TLS record of 16 KiB: the hottest loop
                received = self._socket.recv_into(view[filled:])
                if not received:
                    raise Closed(
                        "closed the connection "
                        f"{self._body_left - filled} bytes before the end of an answer"
                    )
                filled += received
                now = time.monotonic()
                if (
                    now >= look_at
                    and filled < wanted
                    and self._is_enough(filled, now - begun, within_s)
                ):
                    break
        self._body_left -= filled
        return filled

    def _is_enough(self, filled: int, waited_s: float, within_s: float) -> bool:
        """Tell whether a part is to be handed on; raise when too little came."""
        if waited_s >= within_s and filled >= MIN_PIECE_BYTES:
            return True
        stalls = waited_s / self._stall_timeout_s
        if stalls >= 1 and filled < stalls * MIN_PIECE_BYTES:
            raise Stalled(f"sent only {filled} bytes in {waited_s:.1f} s")
        return False

    def abort(self) -> None:
        """Cut the connection, from any thread: whoever waits on it gets `Closed`."""
        with self._abort_lock:
            self._aborted = True
            if self._raw is not None:
                with suppress(OSError):  # not connected yet, closed, or cut already
                    # Below TLS: the method of ssl.SSLSocket would drop the TLS state
                    # as well, and the waiting thread would go on in the clear.
                    socket.socket.shutdown(self._raw, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. For the thread that uses the connection."""
        with self._abort_lock:
            self._aborted = True
            if self._raw is not None:
                self._raw.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise Stalled(f"nothing moved for {self._stall_timeout_s:g} s") from error
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise Closed("closed the connection") from error
        except ssl.SSLError as error:
            if self._aborted:
                raise Closed("aborted") from error
            raise ProtocolError(f"broke TLS: {error.reason or error}") from error
        except OSError as error:
            raise Closed(f"lost the connection: {error.strerror or error}") from error


def _left_s(deadline: float) -> float:
    return max(_SHORTEST_WAIT_S, deadline - time.monotonic())


def _round_trip_s(connected: socket.socket) -> float | None:
    """Return the round trip that the kernel measured, None where it does not tell.

    Better than a clock of our own: that one also counts the wait for the interpreter.
    """
    if not sys.platform.startswith("linux"):
        return None
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_RTT_OFFSET + 4)
    if len(info) < _TCP_RTT_OFFSET + 4:
        return None
    return int.from_bytes(info[_TCP_RTT_OFFSET:], sys.byteorder) / 1e6


@cache
def _is_granted(receive_bytes: int) -> bool:
    """Tell whether the system allows a receive buffer of that size.

    Asked on a socket of its own: a smaller one than wanted could not be given back to
    the kernel's care.
    """
    with socket.socket() as probe, suppress(OSError):  # macOS refuses instead of giving less
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        return probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= receive_bytes
    return False
