"""Messages of circuit relay v2, AutoNAT and the like: protobuf behind a length.

Purpose: read and write one small message on a stream, and keep what comes behind it, which
belongs to whatever the stream carries next.

The message types are libp2p's (https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md),
generated from its protobuf definitions.
"""

from __future__ import annotations

from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.peer.envelope import Envelope, make_unsigned
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Voucher

from tensorswarm.store.errors import NoSource, ProtocolError

from ..host.host import Host, Stream

HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/stop"

MAX_MESSAGE_BYTES = 8 << 10
"""Longest message read: a reservation with 16 addresses and a voucher has under 2 KiB."""

MESSAGE_TIMEOUT_S = 10.0
"""Seconds for a whole message: three slow round trips and a busy relay."""

_VOUCHER_DOMAIN = "libp2p-relay-rsvp"
_VOUCHER_TYPE = b"\x03\x02"  # multicodec 0x0302, as a varint

M = TypeVar("M", bound=Message)


class MessageStream:
    """A stream on which messages are exchanged first.

    Attributes
    ----------
    stream : Stream
        The stream itself.
    rest : bytes
        What came behind the last message read.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.rest = b""

    async def read(self, kind: type[M]) -> M:
        """Read one message.

        Raises
        ------
        ProtocolError
            It is too long, or not such a message.
        NoSource
            It did not come whole and in time.
        """
        data = await self.read_bytes(kind.__name__)
        message = kind()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise ProtocolError(f"{self.stream.peer_id} sent no {kind.__name__}") from error
        return message

    async def write(self, message: Message) -> None:
        """Send one message.

        Raises
        ------
        NoSource
            The peer does not take it.
        """
        await self.write_bytes(message.SerializeToString())

    async def read_bytes(self, what: str) -> bytes:
        """Read one message as it is; `what` it should be is for errors."""
        try:
            with trio.fail_after(MESSAGE_TIMEOUT_S):
                return await self._read_delimited()
        except trio.TooSlowError as error:
            raise NoSource(f"{self.stream.peer_id} sent no {what} in time") from error

    async def write_bytes(self, data: bytes) -> None:
        """Send one message as it is."""
        try:
            with trio.fail_after(MESSAGE_TIMEOUT_S):
                await self.stream.send(_varint(len(data)) + data)
        except trio.TooSlowError as error:
            raise NoSource(f"{self.stream.peer_id} does not take what is sent") from error

    async def _read_delimited(self) -> bytes:
        while True:
            found = _delimited(self.rest)
            if found is not None:
                data, self.rest = found
                return data
            more = await self.stream.receive_some()
            if not more:
                raise NoSource(f"{self.stream.peer_id} closed the stream before it answered")
            self.rest += more


def _delimited(data: bytes) -> tuple[bytes, bytes] | None:
    """Split off a message behind its length; None while it is not whole."""
    length = 0
    for position, byte in enumerate(data[:3]):
        length |= (byte & 0x7F) << (7 * position)
        if length > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"a message of over {MAX_MESSAGE_BYTES} bytes")
        if not byte & 0x80:
            start = position + 1
            if len(data) < start + length:
                return None
            return data[start : start + length], data[start + length :]
    if len(data) >= 3:
        raise ProtocolError(f"a message of over {MAX_MESSAGE_BYTES} bytes")
    return None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def voucher(host: Host, peer_id_raw: bytes, expires_at_s: int) -> bytes:
    """Return a relay's signed word that a peer has a reservation (specification: vouchers).

    Parameters
    ----------
    host : Host
        The relay.
    peer_id_raw : bytes
        The peer, as bytes.
    expires_at_s : int
        When the reservation ends, in seconds since 1970.
    """
    content = Voucher(
        relay=host.libp2p.get_id().to_bytes(), peer=peer_id_raw, expiration=expires_at_s
    ).SerializeToString()
    signed = make_unsigned(_VOUCHER_DOMAIN, _VOUCHER_TYPE, content)
    return Envelope(
        public_key=host.key_pair.public_key,
        payload_type=_VOUCHER_TYPE,
        raw_payload=content,
        signature=host.key_pair.private_key.sign(signed),
    ).marshal_envelope()
