"""How a peer's bytes are fetched: over its bulk plane, or over a libp2p stream.

Purpose: choose, for each peer, the way that is there. The bulk plane is tried first, at
every address that may be dialled; a peer that tells of none, or answers at none, is asked
over a stream on the libp2p connection there is to it, which may lead through a relay or
through a hole punched in two NATs.

Rules
- A bulk plane that could not be reached is left alone for `UNREACHABLE_S`, by all fetches
  of the node; meanwhile the peer is asked over streams at once.
- Who was found through a relay is asked over streams at once, too, though it is connected
  directly now: nobody can dial it, so nobody reaches the port of its bulk plane either.
- A peer behind a relay may become directly reachable any moment. Until `held_until` its bytes
  wait for that; whoever listens in `changed` hears when it is settled, either way.
- Bulk addresses are a peer's claims. Tried are those no more private than the address at
  which we see the peer (see `addresses.believable`), nearest first: this machine, private
  networks, the Internet.

Not here: what is asked, and when a source is given up (`download`).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum, IntEnum

from .bulk.dial import MAX_ADDRESSES
from .bulk.peer_source import PeerSource
from .bulk.stream_source import StreamSource
from .bulk.tls import BulkIdentity
from .control import wire_limits
from .host.addresses import Scope, is_circuit, scope_of, tcp_host
from .host.host import Stream
from .limits.rates import RateLimiter
from .swarm.source import Report, Sink, SourceWorker

UNREACHABLE_S = 60.0
"""How long a bulk plane that could not be reached is not tried again, in seconds: finding
that out again would cost every fetch two seconds and a half."""

MAX_UNREACHABLE = 1_000
"""Peers of which that is remembered; the oldest are tried again first."""


class Via(Enum):
    """The way a peer's bytes take, as `sources` shows it."""

    BULK = "bulk"
    STREAM = "stream"
    PUNCHED = "punched"
    RELAY = "relay"


class Distance(IntEnum):
    """How far a source is, in what its bytes cost others: the nearest first."""

    LOCAL = 0
    WIDE = 1
    ORIGIN = 2


class Routes:
    """Makes the workers that fetch from peers.

    Parameters
    ----------
    identity : BulkIdentity
        Our certificate on the bulk plane.
    bulk_addresses : callable
        From a peer id to its bulk-plane addresses, best first; none if it has none.
    open_stream : callable
        From a peer id to a new stream of the bulk protocol to it.
    start_soon : callable
        Runs an operation in the background, as `Host.start_soon` does.
    is_relayed : callable
        From a peer id to whether all connections to it lead through a relay.
    is_punched : callable
        From a peer id to whether the connection to it goes through a punched hole.
    is_shut : callable
        From a peer id to whether it can be dialled at no port.
    held_until : callable
        From a peer id to when its bytes need not wait any longer for a better way.
    seen_at : callable
        From a peer id to the IP address at which we see it; None if that is not known.
    limiter : RateLimiter, optional
        Holds what all sources receive together below a rate.

    Attributes
    ----------
    changed : list of callables
        Hear, by peer id, when the way to a peer may have become another.
    """

    def __init__(
        self,
        identity: BulkIdentity,
        bulk_addresses: Callable[[str], Sequence[tuple[str, int]]],
        open_stream: Callable[[str], Awaitable[Stream]],
        start_soon: Callable[[Callable[[], Awaitable[object]]], object],
        is_relayed: Callable[[str], bool] = lambda _peer_id: False,
        is_punched: Callable[[str], bool] = lambda _peer_id: False,
        is_shut: Callable[[str], bool] = lambda _peer_id: False,
        held_until: Callable[[str], float] = lambda _peer_id: 0.0,
        seen_at: Callable[[str], str | None] = lambda _peer_id: None,
        limiter: RateLimiter | None = None,
    ) -> None:
        self._identity = identity
        self._bulk_addresses = bulk_addresses
        self._open_stream = open_stream
        self._start_soon = start_soon
        self._is_relayed = is_relayed
        self._is_punched = is_punched
        self._is_shut = is_shut
        self.held_until = held_until
        self._seen_at = seen_at
        self._limiter = limiter
        self.changed: list[Callable[[str], object]] = []
        self._unreachable: OrderedDict[str, float] = OrderedDict()

    def start(
        self, now: float, peer_id: str, sink: Sink, report: Report
    ) -> tuple[Via, SourceWorker]:
        """Return a worker for a peer, and the way it takes."""
        is_out = self._is_unreachable(now, peer_id) or self._is_shut(peer_id)
        addresses = [] if is_out else self._bulk_addresses(peer_id)
        if addresses:
            return Via.BULK, PeerSource(
                peer_id, addresses, self._identity, sink, report, limiter=self._limiter
            )
        worker = StreamSource(
            peer_id,
            lambda: self._open_stream(peer_id),
            self._start_soon,
            sink,
            report,
            limiter=self._limiter,
        )
        return self.without_bulk(peer_id), worker

    def distance(self, peer_id: str) -> Distance:
        """Tell whether a peer is in our local network, as far as its address says."""
        host = None if self._is_relayed(peer_id) else self._seen_at(peer_id)
        is_local = host is not None and scope_of(host) is not Scope.GLOBAL
        return Distance.LOCAL if is_local else Distance.WIDE

    def without_bulk(self, peer_id: str) -> Via:
        """Return the way that streams to a peer take now."""
        if self._is_relayed(peer_id):
            return Via.RELAY
        return Via.PUNCHED if self._is_punched(peer_id) else Via.STREAM

    def tell_changed(self, peer_id: str) -> None:
        """Tell whoever listens that the way to a peer may have become another."""
        for listener in list(self.changed):
            listener(peer_id)

    def bulk_failed(self, now: float, peer_id: str) -> None:
        """Note that a peer's bulk plane could not be reached."""
        self._unreachable[peer_id] = now
        self._unreachable.move_to_end(peer_id)
        while len(self._unreachable) > MAX_UNREACHABLE:
            self._unreachable.popitem(last=False)

    def _is_unreachable(self, now: float, peer_id: str) -> bool:
        return now - self._unreachable.get(peer_id, -UNREACHABLE_S) < UNREACHABLE_S


def bulk_candidates(told: Iterable[str], seen_at: str | None) -> list[tuple[str, int]]:
    """Choose, of the bulk addresses a peer tells, those to try, nearest first.

    Parameters
    ----------
    told : iterable of str
        As in its hello: ``host:port``, or ``:port`` for the address we see it at.
    seen_at : str or None
        The IP address at which we see it; None through a relay.

    Returns
    -------
    list of (str, int)
        Numeric hosts and ports, each once.
    """
    innermost = Scope.GLOBAL if seen_at is None else max(scope_of(seen_at), Scope.LOOPBACK)
    found: dict[tuple[str, int], Scope] = {}
    for text in told:
        host, port = wire_limits.split_bulk_address(text)
        if not host:
            if seen_at is not None:
                found[seen_at, port] = scope_of(seen_at)
            continue
        try:
            ipaddress.ip_address(host)
        except ValueError:
            continue  # a name: who looks it up tells a stranger's server about itself
        if (scope := scope_of(host)) >= innermost:
            found.setdefault((host, port), scope)
    return sorted(found, key=lambda place: found[place])[:MAX_ADDRESSES]


def bulk_told(listening: Iterable[str], port: int) -> tuple[str, ...]:
    """Return the bulk addresses to tell peers.

    Parameters
    ----------
    listening : iterable of str
        Multiaddrs that are told to peers; the bulk plane listens on the same interfaces.
    port : int
        Its port.

    Returns
    -------
    tuple of str
        First the one that means "where you see me".
    """
    told = [f":{port}"]
    for addr in listening:
        if is_circuit(addr):
            continue  # bytes go over streams there
        host, _ = tcp_host(addr)
        told.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return tuple(dict.fromkeys(told))[:MAX_ADDRESSES]
