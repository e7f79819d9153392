"""DCUtR: what two peers say to each other who meet through a relay and want a direct way.

Purpose: libp2p's Direct Connection Upgrade through Relay, without I/O: its messages, the
order in which they come, and when to dial. Two peers behind NAT dial each other at the same
moment, each from the port that its NAT knows it by: each dial opens the way in its own NAT
for the other's, and TCP joins the two (simultaneous open, RFC 9293, section 3.5).
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md

Who is who: A has connected to B through a relay, so B can be found through the relay only.
B begins. It sends CONNECT with its addresses; A answers CONNECT with its own; B sends SYNC.
A dials when SYNC arrives, B half a round trip after it sent it, which is the same moment.
For all that is spoken on the connection then, A is the client and B the server, though
both have dialled.

Rules
- A message is 4 KiB at most, as the specification says, and names `MAX_ADDRS` addresses.
- Addresses that are not plain TCP on an IP address are left out: there are others who
  speak QUIC. What else cannot be read is an error.
- A message out of its turn is an error. A round trip longer than `MAX_ROUND_TRIP_S` is one,
  too: half of it says nothing about the moment.
- Whoever could not be reached directly is left in peace for a while, longer each time.

Not here: sockets, streams and the clock (`punch`), and which addresses to believe.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from tensorswarm.store.errors import ProtocolError

from ..host.addresses import multiaddr_of, tcp_host

DCUTR_PROTOCOL = "/libp2p/dcutr"

MAX_MESSAGE_BYTES = 4 << 10
"""Longest message, its length prefix not counted (specification)."""

MAX_ADDRS = 16
"""Addresses read from one message: a host with a few interfaces and two observers names six."""

MAX_ROUND_TRIP_S = 10.0
"""Longest round trip through the relay that is still worth a try."""

ATTEMPTS = 3
"""How often B begins before it gives up (specification)."""

BACK_OFF_S = (60.0, 300.0, 1800.0)
"""Pauses after a peer could not be reached directly; then the last one repeats. A NAT that
does not let it through today seldom does in a minute."""

MAX_BACK_OFFS = 500
"""Peers of which that is remembered; the oldest are forgotten first."""

_IP4, _TCP, _IP6, _P2P = 0x04, 0x06, 0x29, 0x01A5  # multicodec codes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


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


def encode(message: HolePunch) -> bytes:
    """Return a message as protobuf, without its length.

    Raises
    ------
    BadInput
        An address is not plain TCP.
    """
    out = bytearray(b"\x08" + _varint(message.kind))
    for addr in message.addrs[:MAX_ADDRS]:
        raw = _encoded_addr(addr)
        out += b"\x12" + _varint(len(raw)) + raw
    return bytes(out)


def parse(data: bytes) -> HolePunch:
    """Read a message as `encode` makes it, and as other implementations do.

    Raises
    ------
    ProtocolError
        It is too long, no protobuf, or of no known kind.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a hole punching message of over {MAX_MESSAGE_BYTES} bytes")
    kind: int | None = None
    addrs: dict[str, None] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            kind = value
        elif number == 2 and isinstance(value, bytes):
            addr = _parsed_addr(value)
            if addr is not None and len(addrs) < MAX_ADDRS:
                addrs[addr] = None
    try:
        return HolePunch(Kind(kind if kind is not None else 0), tuple(addrs))
    except ValueError as error:
        raise ProtocolError(f"a hole punching message of unknown kind {kind}") from error


# ---- the two sides of an attempt


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


# ---- protobuf and binary multiaddrs, as far as they are needed


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message by number (protobuf's encoding guide)."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ProtocolError(f"a hole punching message with field number {number}")
        if wire_type == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, at = _read_varint(data, at)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ProtocolError(f"a hole punching message with wire type {wire_type}")
        yield number, _slice(data, at, length)
        at += length


def _parsed_addr(raw: bytes) -> str | None:
    """Return a binary multiaddr as text; None if it is not plain TCP on an IP address."""
    try:
        code, at = _read_varint(raw, 0)
        if code not in (_IP4, _IP6):
            return None
        length = 4 if code == _IP4 else 16
        host = ipaddress.ip_address(_slice(raw, at, length))
        transport, at = _read_varint(raw, at + length)
        if transport != _TCP:
            return None
        port = int.from_bytes(_slice(raw, at, 2), "big")
        at += 2
        if at < len(raw):
            code, at = _read_varint(raw, at)
            length, at = _read_varint(raw, at)
            if code != _P2P or at + length != len(raw):
                return None  # a circuit, a web socket: not a plain address
    except ProtocolError:
        return None
    return multiaddr_of(str(host), port) if port else None


def _encoded_addr(addr: str) -> bytes:
    host, port = tcp_host(addr)
    ip = ipaddress.ip_address(host.partition("%")[0])
    code = _IP4 if ip.version == 4 else _IP6
    return _varint(code) + ip.packed + _varint(_TCP) + port.to_bytes(2, "big")


def _slice(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise ProtocolError("a hole punching message that ends too soon")
    return data[at : at + length]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint at a place, of 64 bits at most, and the place behind it."""
    value = 0
    for position in range(10):
        (byte,) = _slice(data, at + position, 1)
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + position + 1
    raise ProtocolError("a hole punching message with a number of over 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
