"""A go-libp2p node, driven through the control socket of its daemon `p2pd`.

Each request is a connection of its own: one protobuf message, its length before it,
then one or more such messages as the answer. After STREAM_OPEN the connection is the
stream. (go-libp2p-daemon, specs/CONTROL.md and specs/DHT.md; the field numbers are those of
its p2pd.proto.)
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tests.support.interop import Lines, go_daemon

IDENTIFY, CONNECT, STREAM_OPEN, DHT, LIST_PEERS = 0, 1, 2, 4, 5
FIND_PROVIDERS, GET_CLOSEST_PEERS, PROVIDE = 2, 3, 8
DHT_VALUE, DHT_END = 1, 2

RAW = b"\x01\x55"
"""What makes a binary CID of a multihash: version 1, raw bytes."""

Fields = list[tuple[int, "int | bytes"]]


class GoError(Exception):
    """What the daemon refused, in its words."""


@dataclass(frozen=True, slots=True)
class GoPeer:
    """A running daemon.

    Attributes
    ----------
    peer_id : str
        Its libp2p peer id.
    addrs : tuple of str
        Multiaddrs with ``/p2p/``.
    """

    socket: Path
    peer_id: str
    addrs: tuple[str, ...]

    async def connect(self, address: str) -> None:
        """Connect it to the peer at a multiaddr with ``/p2p/``."""
        transport, _, peer_id = address.rpartition("/p2p/")
        peer: Fields = [(1, _raw(peer_id)), (2, Multiaddr(transport).to_bytes()), (3, 10)]
        await self._request([(1, CONNECT), (2, encode(peer))])

    async def connected(self) -> set[str]:
        """Return the ids of the peers it is connected to."""
        answer = await self._request([(1, LIST_PEERS)])
        return {_text(_field(decode(peer), 1)) for number, peer in answer if number == 6}  # type: ignore[arg-type]

    async def provide(self, key: bytes) -> None:
        """Announce a multihash on the DHT."""
        await self._request([(1, DHT), (5, encode([(1, PROVIDE), (3, RAW + key), (7, 15)]))])

    async def dht_has_nodes(self) -> None:
        """Wait until its routing table is not empty; the daemon tells only of failing."""
        while True:
            try:
                async with await self._closest_peers() as stream:
                    _checked(await _receive(stream))
                    return
            except GoError:
                await trio.sleep(0.02)

    async def _closest_peers(self) -> trio.SocketStream:
        wanted: Fields = [(1, GET_CLOSEST_PEERS), (4, b"any key"), (7, 15)]
        return await self._ask([(1, DHT), (5, encode(wanted))])

    async def find_providers(self, key: bytes, count: int = 20) -> list[str]:
        """Look a multihash up on the DHT; return the providers' peer ids."""
        wanted: Fields = [(1, FIND_PROVIDERS), (3, RAW + key), (6, count), (7, 15)]
        stream = await self._ask([(1, DHT), (5, encode(wanted))])
        found = []
        async with stream:
            _checked(await _receive(stream))
            while True:
                answer = await _receive(stream)
                if _field(answer, 1) == DHT_END:
                    return found
                found.append(_text(_field(decode(_bytes(_field(answer, 2))), 1)))

    async def open_stream(self, peer_id: str, protocol: str) -> trio.SocketStream:
        """Open a stream from it to a peer; what is written to it goes to that peer."""
        wanted: Fields = [(1, _raw(peer_id)), (2, protocol.encode()), (3, 10)]
        stream = await self._ask([(1, STREAM_OPEN), (3, encode(wanted))])
        _checked(await _receive(stream))
        return stream

    async def _request(self, request: Fields) -> Fields:
        async with await self._ask(request) as stream:
            return _checked(await _receive(stream))

    async def _ask(self, request: Fields) -> trio.SocketStream:
        stream = await trio.open_unix_socket(str(self.socket))
        body = encode(request)
        await stream.send_all(_varint(len(body)) + body)
        return stream


@asynccontextmanager
async def go_peer(*, server: bool = True) -> AsyncIterator[GoPeer]:
    """Run a daemon that is a server of the DHT, or a client only."""
    program = go_daemon()
    folder = Path(tempfile.mkdtemp(prefix="p2pd-"))  # a socket's path is short
    socket = folder / "control"
    command = [
        str(program),
        f"-listen=/unix{socket}",
        "-hostAddrs=/ip4/127.0.0.1/tcp/0",
        "-dhtServer" if server else "-dhtClient",
        "-bootstrapPeers=",  # else the public network's
        *(f"-{name}=false" for name in ("quic", "natPortMap", "relay", "relayService", "autonat")),
    ]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        lines = Lines(process.stdout)
        peer_id = await lines.after("Peer ID: ")
        await lines.after("Peer Addrs:")
        addr = await lines.next()
        yield GoPeer(socket, peer_id, (f"{addr}/p2p/{peer_id}",))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ---- protobuf, as far as it is needed: varints and length-delimited fields


def encode(fields: Fields) -> bytes:
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def decode(data: bytes) -> Fields:
    fields: Fields = []
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == 0:
            fields.append((tag >> 3, value))
        else:
            assert tag & 7 == 2, f"wire type {tag & 7}"
            fields.append((tag >> 3, data[at : at + value]))
            at += value
    return fields


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


async def _receive(stream: trio.SocketStream) -> Fields:
    head = b""
    while not head or head[-1] >= 0x80:
        head += await _exactly(stream, 1)
    return decode(await _exactly(stream, _read_varint(head, 0)[0]))


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    got = b""
    while len(got) < count:
        data = await stream.receive_some(count - len(got))
        assert data, "the daemon hung up"
        got += data
    return got


def _checked(answer: Fields) -> Fields:
    if _field(answer, 1) != 0:
        raise GoError(_bytes(_field(decode(_bytes(_field(answer, 2))), 1)).decode())
    return answer


def _field(fields: Sequence[tuple[int, int | bytes]], number: int) -> int | bytes:
    return dict(fields)[number]


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _raw(peer_id: str) -> bytes:
    return ID.from_string(peer_id).to_bytes()


def _text(raw: int | bytes) -> str:
    return str(ID(_bytes(raw)))
