"""How a wire is kept full: bytes asked for ahead, and connections, from what was measured.

A wire holds its rate times its round trip. Less than that asked for ahead leaves it idle;
much more only delays a change of mind: what is on the wire comes, though somebody else has
brought it meanwhile, and takes the place of what is needed. So twice that is asked for,
within bounds, and what is measured is the rate at which verified bytes come and the round
trip of the handshake.

A connection that is cut needs three round trips until bytes come again, and a window that
grows by doubling. From `FAR_S` on a second connection keeps the wire full meanwhile; on
still longer wires a single connection's window may be smaller than what the wire holds.

No I/O, no clock.
"""

from __future__ import annotations

FAR_S = 0.02
"""Round trip from which one connection is not enough: three of them cost as much as the
bytes of a fast wire's whole request."""

VERY_FAR_S = 0.15
"""Round trip from which two are not: Linux lets a window grow to 6 MiB, 40 MB/s here."""

MAX_CONNECTIONS = 4
"""Connections to one peer: half of what a server allows one."""

MIN_BYTES_AHEAD = 4 << 20
"""Bytes asked for ahead at least, over a wire that is not near."""

NEAR_BYTES_AHEAD = 16 << 20
"""Bytes asked for ahead at most where the round trip says nothing, being shorter than `FAR_S`:
the peer's own pauses are what has to be bridged, 16 ms at 1 GB/s."""

NEAR_AHEAD_S = 0.25
"""Seconds of the rate asked for ahead of such a peer: it may be near and slow, for its uplink
is limited. Of 24 MiB that four fetched at once from one with 9.6 MB/s, one of them got up to
15 twice when 16 MiB were asked for at any rate."""

MIN_NEAR_BYTES_AHEAD = 1 << 20
"""Bytes asked for ahead of such a peer at least: a chunk, and half of the next."""

FIRST_BYTES_AHEAD = 2 << 20
"""Bytes asked for ahead of a near peer of which nothing is known. As much as has come from it
is asked for next, so that a fast one is at the most within 16 MiB; a limited one may begin
with a burst, so that the rate of its first bytes says nothing."""

MAX_BYTES_AHEAD = 64 << 20
"""Bytes asked for ahead at most: 1 Gbit/s over 250 ms, twice."""

RATE_WINDOW_S = 0.5
"""Time over which the rate is measured."""


def connections_for(round_trip_s: float) -> int:
    """Return how many connections a peer at this distance is worth."""
    if round_trip_s < FAR_S:
        return 1
    return 2 if round_trip_s < VERY_FAR_S else MAX_CONNECTIONS


class Pace:
    """Rate and round trip of one connection, and what follows from them.

    Attributes
    ----------
    round_trip_s : float
        As far as it is known; set by the owner.
    """

    def __init__(self) -> None:
        self.round_trip_s = 0.0
        self._bytes_per_s = 0.0
        self._since = 0.0
        self._byte_count = 0

    def begin(self, now: float, round_trip_s: float) -> None:
        """Note a new connection; the rate of the one before is believed for now."""
        self.round_trip_s = round_trip_s
        self._since = now
        self._byte_count = 0

    def note(self, now: float, byte_count: int) -> None:
        """Note bytes that came."""
        self._byte_count += byte_count
        elapsed_s = now - self._since
        if elapsed_s >= RATE_WINDOW_S:
            self._bytes_per_s = self._byte_count / elapsed_s
            self._since = now
            self._byte_count = 0

    def bytes_ahead(self) -> int:
        """Return how many bytes to ask for beyond the answer being read."""
        if self.round_trip_s < FAR_S:
            if not self._bytes_per_s:
                return max(FIRST_BYTES_AHEAD, min(self._byte_count, NEAR_BYTES_AHEAD))
            wanted = int(NEAR_AHEAD_S * self._bytes_per_s)
            return max(MIN_NEAR_BYTES_AHEAD, min(wanted, NEAR_BYTES_AHEAD))
        wanted = int(2 * self._bytes_per_s * self.round_trip_s)
        return max(MIN_BYTES_AHEAD, min(wanted, MAX_BYTES_AHEAD))
