"""DCUtR: what two peers say to each other who meet through a relay and want a direct way.

Purpose: libp2p's Direct Connection Upgrade through Relay, without I/O: what is said, in
what order, and when to dial. Two peers behind NAT dial each other at the same
moment, each from the port that its NAT knows it by: each dial opens the way in its own NAT
for the other's, and TCP joins the two (simultaneous open, RFC 9293, section 3.5).
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md

Who is who: A has connected to B through a relay, so B can be found through the relay only.
B begins. It sends CONNECT with its addresses; A answers CONNECT with its own; B sends SYNC.
A dials when SYNC arrives, B half a round trip after it sent it, which is the same moment.
For all that is spoken on the connection then, A is the client and B the server, though
both have dialled.

Rules
- A message out of its turn is an error. A round trip longer than `MAX_ROUND_TRIP_S` is one,
  too: half of it says nothing about the moment.
- Whoever could not be reached directly is left in peace for a while, longer each time.

Not here: bytes (`dcutr_wire`), sockets, streams and the clock (`punch`), and which addresses to
believe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from tensorswarm.store.errors import ProtocolError

DCUTR_PROTOCOL = "/libp2p/dcutr"

MAX_ROUND_TRIP_S = 10.0
"""Longest round trip through the relay that is still worth a try."""

ATTEMPTS = 3
"""How often B begins before it gives up (specification)."""

BACK_OFF_S = (60.0, 300.0, 1800.0)
"""Pauses after a peer could not be reached directly; then the last one repeats. A NAT that
does not let it through today seldom does in a minute."""

MAX_BACK_OFFS = 500
"""Peers of which that is remembered; the oldest are forgotten first."""


class Kind(IntEnum):
    """What a message is."""

    CONNECT = 100
    SYNC = 300


@dataclass(frozen=True, slots=True)
class HolePunch:
    """A message.

    Attributes
    ----------
    kind : Kind
        What it is.
    addrs : tuple of str
        Multiaddrs at which the sender expects to be seen, without ``/p2p/``.
    """

    kind: Kind
    addrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dial:
    """What to do at the end of an attempt's messages.

    Attributes
    ----------
    at : float
        When to dial.
    addrs : tuple of str
        Where the other side says it is.
    as_client : bool
        Whether we are the client of whatever connection comes of it.
    """

    at: float
    addrs: tuple[str, ...]
    as_client: bool


class Beginner:
    """B's side of one attempt.

    Parameters
    ----------
    own_addrs : sequence of str
        Where we expect to be seen.
    """

    def __init__(self, own_addrs: Sequence[str]) -> None:
        self._own_addrs = tuple(own_addrs)
        self._sent_at: float | None = None

    def connect(self, now: float) -> HolePunch:
        """Return what to send first; the round trip is measured from `now` on."""
        self._sent_at = now
        return HolePunch(Kind.CONNECT, self._own_addrs)

    def receive(self, now: float, message: HolePunch) -> tuple[HolePunch, Dial]:
        """Take A's answer; return what to send, and when to dial afterwards.

        Raises
        ------
        ProtocolError
            It is no CONNECT, or came too late.
        """
        if self._sent_at is None or message.kind is not Kind.CONNECT:
            raise ProtocolError(f"a {message.kind.name} where CONNECT should come")
        round_trip_s = now - self._sent_at
        if not 0 <= round_trip_s <= MAX_ROUND_TRIP_S:
            raise ProtocolError(f"a round trip of {round_trip_s:.1f} s, too long to meet half-way")
        self._sent_at = None
        dial = Dial(now + round_trip_s / 2, message.addrs, as_client=False)
        return HolePunch(Kind.SYNC), dial


class Answerer:
    """A's side of the attempts on one stream.

    Parameters
    ----------
    own_addrs : sequence of str
        Where we expect to be seen.
    """

    def __init__(self, own_addrs: Sequence[str]) -> None:
        self._own_addrs = tuple(own_addrs)
        self._theirs: tuple[str, ...] | None = None

    def receive(self, now: float, message: HolePunch) -> HolePunch | Dial:
        """Take B's next message; return what to send, or to dial.

        Raises
        ------
        ProtocolError
            It is not that message's turn.
        """
        if message.kind is Kind.CONNECT and self._theirs is None:
            self._theirs = message.addrs
            return HolePunch(Kind.CONNECT, self._own_addrs)
        if message.kind is Kind.SYNC and self._theirs is not None:
            theirs, self._theirs = self._theirs, None
            return Dial(now, theirs, as_client=True)
        raise ProtocolError(f"a {message.kind.name} out of its turn")


@dataclass(slots=True)
class BackOffs:
    """Whom to leave in peace, and until when."""

    _until: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)

    def may_try(self, now: float, peer_id: str) -> bool:
        """Tell whether a peer's turn has come again."""
        return now >= self._until.get(peer_id, (now, 0))[0]

    def failed(self, now: float, peer_id: str) -> float:
        """Note that a peer could not be reached directly; return the pause, in seconds."""
        _, failures = self._until.pop(peer_id, (now, 0))
        pause_s = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
        self._until[peer_id] = (now + pause_s, failures + 1)
        while len(self._until) > MAX_BACK_OFFS:
            self._until.popitem(last=False)
        return pause_s

    def succeeded(self, peer_id: str) -> None:
        """Forget that a peer ever failed."""
        self._until.pop(peer_id, None)
