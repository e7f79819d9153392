"""One question to one DHT node: the messages of libp2p's Kademlia, and how to ask.

Purpose
-------
The client side of ``/ipfs/kad/1.0.0`` (libp2p specifications, kad-dht): protobuf
messages, each behind its length as a varint. We speak it ourselves, instead of
through py-libp2p's DHT, to send many messages on one stream, to have deadlines of
our own, and to believe no address unchecked.

Rules
-----
- A message is at most `MAX_MESSAGE_BYTES` long; of the peers in an answer, at most
  `MAX_PEERS_PER_ANSWER` are read, with the addresses that `addresses.believable`
  leaves.
- Signed address records are neither sent nor read: Noise proves who answers at an
  address, and checking a signature costs more than the message.

What it does not do: decide whom to ask (`dht.lookup`), or keep records.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import NamedTuple

import trio
from google.protobuf.message import DecodeError
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, ProtocolError

from ..host.addresses import PeerAddress, believable, peer_id_text
from ..host.host import Host, Stream

KAD_PROTOCOL = "/ipfs/kad/1.0.0"

MAX_MESSAGE_BYTES = 1 << 20
"""Longest answer read: 60 peers with signed records and many addresses are 100 KB."""

MAX_PEERS_PER_ANSWER = 40
"""Peers read of one answer: the specification sends 20."""

MAX_RAW_ADDRS = 32
"""Addresses of one peer looked at, before those that cannot be used are left out."""

_MAX_ADDR_BYTES = 256
_MAX_VARINT_BYTES = 5

FIND_NODE = Message.MessageType.FIND_NODE
GET_PROVIDERS = Message.MessageType.GET_PROVIDERS
ADD_PROVIDER = Message.MessageType.ADD_PROVIDER
PING = Message.MessageType.PING


class Question(NamedTuple):
    """A question to a DHT node.

    Attributes
    ----------
    kind : int
        The message type, which the answer's has to be, too.
    data : bytes
        The framed message.
    """

    kind: int
    data: bytes


def find_node(key: bytes) -> Question:
    """Return the question for the nodes closest to a key."""
    return Question(FIND_NODE, framed(Message(type=FIND_NODE, key=key)))


def get_providers(key: bytes) -> Question:
    """Return the question for who provides a key."""
    return Question(GET_PROVIDERS, framed(Message(type=GET_PROVIDERS, key=key)))


def add_provider(key: bytes, peer_id: bytes, addrs: Iterable[bytes]) -> bytes:
    """Return the framed announcement that a peer provides a key."""
    provider = Message.Peer(id=peer_id, addrs=list(addrs))
    return framed(Message(type=ADD_PROVIDER, key=key, providerPeers=[provider]))


def framed(message: Message) -> bytes:
    """Return a message behind its length."""
    body = message.SerializeToString()
    length = len(body)
    prefix = bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


class Deframer:
    """Cuts a stream of bytes into messages. Does no I/O.

    Parameters
    ----------
    max_message_bytes : int
        Longest message taken.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._buffer = bytearray()
        self._max_message_bytes = max_message_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes as they came."""
        self._buffer += data

    def next_message(self) -> Message | None:
        """Return the next whole message, None if more bytes are needed.

        Raises
        ------
        ProtocolError
            The bytes are not such messages, or one is too long.
        """
        length = shift = 0
        for index, byte in enumerate(self._buffer[:_MAX_VARINT_BYTES]):
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return self._take(index + 1, length)
        if len(self._buffer) >= _MAX_VARINT_BYTES:
            raise ProtocolError("a DHT message with an impossible length")
        return None

    def _take(self, start: int, length: int) -> Message | None:
        if length > self._max_message_bytes:
            raise ProtocolError(f"a DHT message of {length} bytes")
        if len(self._buffer) < start + length:
            return None
        message = Message()
        try:
            message.ParseFromString(bytes(self._buffer[start : start + length]))
        except DecodeError as error:
            raise ProtocolError("a DHT message that cannot be read") from error
        del self._buffer[: start + length]
        return message


class DhtStream:
    """A stream to one DHT node, message by message."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._deframer = Deframer()

    async def send(self, data: bytes) -> None:
        """Send framed messages. As safe to cancel as `Stream.send`."""
        await self._stream.send(data)

    async def receive(self) -> Message:
        """Return the next message. Cancel-safe.

        Raises
        ------
        RemoteError
            The node ended the stream, or sent nonsense.
        """
        while (message := self._deframer.next_message()) is None:
            data = await self._stream.receive_some()
            if not data:
                raise NoSource(f"DHT node {self._stream.peer_id} ended the stream")
            self._deframer.feed(data)
        return message


@asynccontextmanager
async def dht_stream(host: Host, peer_id: str, timeout_s: float) -> AsyncIterator[DhtStream]:
    """Open a stream to a DHT node for the length of the block."""
    stream = await host.open_stream(peer_id, KAD_PROTOCOL, timeout_s)
    try:
        yield DhtStream(stream)
    except BaseException:
        stream.abort()
        raise
    await stream.aclose()


async def ask(host: Host, peer_id: str, question: Question, timeout_s: float) -> Message:
    """Ask a DHT node one question.

    Parameters
    ----------
    host : Host
        Ours.
    peer_id : str
        The node.
    question : Question
        What is asked.
    timeout_s : float
        Time for everything, connecting included, in seconds.

    Raises
    ------
    RemoteError
        It cannot be reached, does not answer in time, or sends nonsense.
    """
    with trio.move_on_after(timeout_s):
        async with dht_stream(host, peer_id, timeout_s) as stream:
            await stream.send(question.data)
            answer = await stream.receive()
            if answer.type != question.kind:
                raise ProtocolError(f"DHT node {peer_id} answered something else")
            return answer
    raise NoSource(f"DHT node {peer_id} did not answer within {timeout_s:g} s")


def peers_in(
    peers: Sequence[Message.Peer], told_by: str | None, limit: int = MAX_PEERS_PER_ANSWER
) -> list[PeerAddress]:
    """Read peers out of an answer, those without usable addresses included.

    Parameters
    ----------
    peers : sequence
        ``closerPeers`` or ``providerPeers``.
    told_by : str or None
        The IP address of whoever answered.
    limit : int
        How many are read.
    """
    found: list[PeerAddress] = []
    for peer in peers[:limit]:
        peer_id = id_text(peer.id)
        if peer_id is not None:
            claimed = (addr_text(raw) for raw in peer.addrs[:MAX_RAW_ADDRS])
            addrs = believable((text for text in claimed if text is not None), told_by)
            found.append(PeerAddress(peer_id, addrs))
    return found


def id_text(raw: bytes) -> str | None:
    """Return a binary peer id as text, None if it is not one."""
    try:
        return peer_id_text(raw)
    except ValueError:
        return None


@lru_cache(maxsize=4_096)  # neighbours are named in every answer; reading one costs 50 µs
def addr_text(raw: bytes) -> str | None:
    """Return a binary multiaddr as text, None if it is not one."""
    if len(raw) > _MAX_ADDR_BYTES:
        return None
    try:
        text = str(Multiaddr(raw))
    except Exception:  # the library raises many kinds; all mean "not a multiaddr"
        return None
    return text if text.isprintable() else None
