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

How one connection is served is in `connection`.

Not here: what is in the store, and who is allowed (`open_reader` and `allow` are called
from the connections' threads and must be thread-safe).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from tensorswarm.store.errors import LocalError
from tensorswarm.store.reader import ObjectReader

from ..limits.patience import MIN_READ_BYTES_PER_S, READ_PATIENCE_S
from ..limits.rates import FairGate, RateLimiter
from .connection import ServedConnection, Service
from .gate import Gate
from .small_objects import SmallObjects, read_each
from .table import (
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    ConnectionTable,
    Limits,
    ServerStatistics,
)
from .tls import BulkIdentity

__all__ = ["BulkServer", "ServerStatistics"]

HANDSHAKE_TIMEOUT_S = 5.0
"""Seconds for a handshake, and for a stranger's first request: ten slow round trips."""

IDLE_TIMEOUT_S = 60.0
"""Seconds that a peer may take to its next whole request: connecting anew is cheap."""

MIN_SHARE_BYTES_PER_S = 4 << 10
"""Part of a limited rate that a connection gets at least, or else none is accepted: a
peer that sees less than 4 KiB in 3 s takes us for dead."""

ACCEPT_POLL_S = 0.5
"""Seconds between looks at the closing flag, where shutting a listening socket down
does not wake the thread that accepts (everywhere but Linux)."""

BACKLOG = 128
"""Connections the kernel keeps for us before they are accepted."""

SENDERS = max(1, (os.cpu_count() or 1) // 2)
"""Threads that encrypt and send at a time; the other processors are for those who receive,
verify and read. What this gains and costs is in docs/design.md (The planner)."""

_log = logging.getLogger(__name__)


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
        self._wanted_address = (host, port)
        self._limiter = limiter
        self._listener: socket.socket | None = None
        self._accept_thread: threading.Thread | None = None
        self._address = ("", 0)
        places = max_connections
        if limiter is not None:
            places = min(places, int(limiter.bytes_per_s / MIN_SHARE_BYTES_PER_S))
        self._table = ConnectionTable(
            Limits(places, max_connections_per_peer, max(1, max_connections // 2))
        )
        self._service = Service(
            identity=identity,
            open_reader=open_reader,
            read_small=read_small or partial(read_each, open_reader),
            allow=allow,
            may_have=may_have,
            table=self._table,
            limiter=limiter,
            senders=FairGate(SENDERS),
            gate=gate,
            handshake_timeout_s=handshake_timeout_s,
            idle_timeout_s=idle_timeout_s,
            read_patience_s=read_patience_s,
            min_read_bytes_per_s=min_read_bytes_per_s,
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

    def is_serving(self, peer_id: str) -> bool:
        """Tell whether a peer has a request open, or had one a moment ago."""
        return self._table.is_serving(peer_id, time.monotonic())

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
        connection = ServedConnection(sock, host, self._service)
        if not self._table.admit(connection, time.monotonic()):
            sock.close()
            return
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.warning("cannot serve %s: %s", host, error)
            self._table.dismiss(connection, failed=True)
            sock.close()
