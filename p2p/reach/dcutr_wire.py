"""DCUtR's messages as bytes: libp2p's protobuf, with multiaddrs in binary.

Purpose: write and read the messages of `dcutr`.
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md

Rules
- A message is 4 KiB at most, as the specification says, and `MAX_ADDRS` addresses of it are
  read.
- Addresses that are not plain TCP on an IP address are left out: there are others who
  speak QUIC. What else cannot be read is an error.
"""

from __future__ import annotations

import logging

from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch as Message
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput, ProtocolError

from ..host.addresses import multiaddr_of, tcp_host
from .dcutr import HolePunch, Kind

MAX_MESSAGE_BYTES = 4 << 10
"""Longest message, its length prefix not counted (specification)."""

MAX_ADDRS = 16
"""Addresses read from one message: a host with a few interfaces and two observers names six."""

_HOSTS = ("/ip4/", "/ip6/")

_log = logging.getLogger(__name__)


def encode(message: HolePunch) -> bytes:
    """Return a message as protobuf, without its length.

    Raises
    ------
    BadInput
        An address is not plain TCP.
    """
    raw = [Multiaddr(multiaddr_of(*tcp_host(addr))).to_bytes() for addr in message.addrs]
    kind = Message.Type.Value(message.kind.name)
    return Message(type=kind, ObsAddrs=raw[:MAX_ADDRS]).SerializeToString()


def parse(data: bytes) -> HolePunch:
    """Read a message as `encode` makes it, and as other implementations do.

    Raises
    ------
    ProtocolError
        It is too long, no protobuf, or of no known kind.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a hole punching message of over {MAX_MESSAGE_BYTES} bytes")
    message = Message()
    try:
        message.ParseFromString(data)
        kind = Kind[Message.Type.Name(message.type)]
    except DecodeError as error:
        raise ProtocolError("a hole punching message that is no protobuf") from error
    if not message.HasField("type"):
        raise ProtocolError("a hole punching message of unknown kind")
    addrs: dict[str, None] = {}
    for raw in message.ObsAddrs:
        addr = _parsed_addr(raw)
        if addr is not None and len(addrs) < MAX_ADDRS:
            addrs[addr] = None
    return HolePunch(kind, tuple(addrs))


def _parsed_addr(raw: bytes) -> str | None:
    """Return a binary multiaddr as text; None if it is not plain TCP on an IP address."""
    try:
        addr = str(Multiaddr(raw))
        host, port = tcp_host(addr)
    except BadInput:
        return None  # another transport, a circuit, a web socket
    except Exception as error:  # the library raises many kinds; all mean "unreadable"
        _log.debug("an address that cannot be read: %s", error)
        return None
    return multiaddr_of(host, port) if port and addr.startswith(_HOSTS) else None
