"""Our side of the DHT for others: questions answered, announcements taken.

Purpose
-------
`GuardedDht` is py-libp2p's `KadDHT`, used for its routing table and for values (IPNS).
Nodes, providers and announcements are answered here; py-libp2p's own look-ups and its
maintenance service are not used.

What is put right (py-libp2p 0.8.1)
-----------------------------------
- It takes 10 ADD_PROVIDER messages in 10 s from a peer, then resets the stream. Ours
  drops none for its rate: who sends more than `Pace` allows is read more slowly, and
  waits.
- It spends 0.3 ms and more on each message, most of it on reading the same addresses
  again, on signed records that nobody needs, and on sorting its table. Ours takes
  0.05 ms for an announcement.
- It answers 12 streams at once and resets all others, and Go nodes keep theirs
  open; ours answers `MAX_STREAMS`, of each peer `MAX_STREAMS_PER_PEER`. When all are
  taken, the one on which nothing was asked for longest makes room.
- It reads byte by byte, and each byte costs an encrypted window update; ours reads
  what there is, and gathers answers.
- It takes whoever asks for a node that answers, so that clients fill the routing
  tables of servers; ours waits until identify says that the peer speaks the protocol.
- It keeps records without end, in a file that it writes whole at each change, and
  values of 1 MiB under any name; see `dht.records`.
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, ProtocolError

from ..host.host import Host, Stream
from .file import DhtFile
from .lookup import K, kad_id
from .records import ProviderRecords, ValueRecords
from .rpc import (
    ADD_PROVIDER,
    FIND_NODE,
    GET_PROVIDERS,
    KAD_PROTOCOL,
    PING,
    Deframer,
    framed,
)

log = logging.getLogger(__name__)

MAX_STREAMS = 512
"""DHT streams answered at once: those of 500 peers that keep theirs open."""

MAX_STREAMS_PER_PEER = 32
"""DHT streams answered at once for one peer: some look-ups at a time, one each."""

IDLE_TIMEOUT_S = 60.0
"""A stream on which nothing is asked for so long is ended, as Go does."""

WRITE_TIMEOUT_S = 10.0
"""Time for a peer to take an answer, in seconds."""

MAX_REQUEST_BYTES = 64 << 10
"""Longest message read from a peer: an IPNS record has 10 KiB at most."""

FLUSH_BYTES = 32 << 10
"""Answers gathered before they are sent, while there are questions left to read."""

MAX_KEY_BYTES = 128
"""Longest key of a question, as in Go."""

MAX_ANNOUNCED_KEY_BYTES = 80
"""Longest key of an announcement (specification)."""

ANNOUNCEMENT_BURST = 5_000
"""Announcements taken from one peer as fast as they come: 0.3 s of CPU."""

ANNOUNCEMENTS_PER_S = 500.0
"""Announcements taken from one peer in the long run: a thirtieth of a processor."""

LEAST_PAUSE_S = 0.1
"""Shortest pause made: shorter ones gather, so that answers still leave together."""

MAX_PACES = 2_000
"""Peers whose pace is remembered; who is forgotten starts with a new burst."""


class Pace:
    """How fast announcements of each peer are read: a token bucket each. Does no I/O."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, now: float, peer_id: str) -> float:
        """Count one announcement; return how long to wait before the next, in seconds."""
        left, then = self._left.pop(peer_id, (float(ANNOUNCEMENT_BURST), now))
        left = min(left + (now - then) * ANNOUNCEMENTS_PER_S, ANNOUNCEMENT_BURST) - 1
        self._left[peer_id] = (left, now)
        if len(self._left) > MAX_PACES:
            self._left.popitem(last=False)
        return max(0.0, -left / ANNOUNCEMENTS_PER_S)


class GuardedDht(KadDHT):
    """py-libp2p's DHT node, bounded, on our own streams.

    Parameters
    ----------
    host : Host
        Ours.
    server : bool
        Whether to answer others.
    clock : callable
        Gives the time in seconds since 1970, for records.
    rng : random.Random, optional
        Source of all random choices.
    file : DhtFile, optional
        Where records survive.

    Attributes
    ----------
    on_node : callable
        Called with a node's id when it has been added to the routing table.
    """

    def __init__(
        self,
        host: Host,
        *,
        server: bool,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        file: DhtFile | None = None,
    ) -> None:
        self.on_node: Callable[[str], None] = lambda _peer_id: None
        # Constructed as a client: a server would register py-libp2p's own handler.
        super().__init__(host.libp2p, DHTMode.CLIENT, strict_validation=True)
        self._our_host = host
        self.records = ProviderRecords(host, clock=clock, rng=rng, file=file)
        self.value_store = ValueRecords(host, self.local_peer_id)
        self._pace = Pace()
        self._streams_of: Counter[str] = Counter()
        self._idle: OrderedDict[trio.CancelScope, None] = OrderedDict()
        host.on_identified(self._consider)
        if server:
            self.mode = DHTMode.SERVER
            host.set_handler(KAD_PROTOCOL, self._answer)

    # ---- the routing table

    def _consider(self, peer_id: str) -> None:
        if KAD_PROTOCOL in self._our_host.protocols_of(peer_id):
            self._our_host.start_soon(lambda: self.add_peer(ID.from_string(peer_id)))

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        """Add a peer to the routing table, if identify says that it answers.

        py-libp2p calls this for whoever opens a stream, which is often too early to
        know; so it is called again when identify has run.
        """
        if KAD_PROTOCOL not in self._our_host.protocols_of(str(peer_id)):
            return False
        addrs = [Multiaddr(addr) for addr in self._our_host.addrs_of(str(peer_id))]
        return await self.add_node(PeerInfo(peer_id, addrs))

    async def add_node(self, node: PeerInfo) -> bool:
        """Add a peer that answers DHT questions to the routing table."""
        is_new = not self.routing_table.peer_in_table(node.peer_id)
        added = await self.routing_table.add_peer(node, skip_server_mode_check=True)
        if added and is_new:
            self.on_node(str(node.peer_id))
        return added

    # ---- answering

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        if self._streams_of[peer_id] >= MAX_STREAMS_PER_PEER:
            raise ProtocolError("too many DHT streams")
        if self._streams_of.total() >= MAX_STREAMS:
            if not self._idle:
                raise ProtocolError("all DHT streams are in use")
            self._idle.popitem(last=False)[0].cancel()
        self._streams_of[peer_id] += 1
        try:
            await self._converse(peer_id, stream)
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]

    async def _converse(self, peer_id: str, stream: Stream) -> None:
        """Answer the questions on a stream, until it ends or turns out to be nonsense."""
        await self.add_peer(ID.from_string(peer_id))
        deframer = Deframer(MAX_REQUEST_BYTES)
        answers = bytearray()
        try:
            while True:
                message = deframer.next_message()
                if message is None:
                    await self._send(stream, answers)
                    data = await self._next_question(stream)
                    if not data:
                        return
                    deframer.feed(data)
                    continue
                if message.type == ADD_PROVIDER:
                    pause_s = self._pace.take(trio.current_time(), peer_id)
                    if pause_s > LEAST_PAUSE_S:
                        await self._send(stream, answers)
                        await trio.sleep(pause_s)
                answers += await self._reply(peer_id, stream, message)
                if len(answers) > FLUSH_BYTES:
                    await self._send(stream, answers)
        except ProtocolError:
            await self._send(stream, answers)  # those before the nonsense
            raise

    async def _next_question(self, stream: Stream) -> bytes:
        with trio.CancelScope() as idle:
            self._idle[idle] = None
            try:
                with trio.fail_after(IDLE_TIMEOUT_S):
                    return await stream.receive_some()
            except trio.TooSlowError as error:
                raise NoSource("nothing was asked for a while") from error
            finally:
                self._idle.pop(idle, None)
        raise NoSource("it made room for another stream")

    async def _send(self, stream: Stream, answers: bytearray) -> None:
        if not answers:
            return
        await self.records.settle()
        data = bytes(answers)
        answers.clear()
        try:
            with trio.fail_after(WRITE_TIMEOUT_S):
                await stream.send(data)
        except trio.TooSlowError as error:
            raise NoSource("the answer is not taken") from error

    async def _reply(self, peer_id: str, stream: Stream, message: Message) -> bytes:
        """Return the framed answer to one message.

        Raises
        ------
        ProtocolError
            The message makes no sense; the stream is to be reset (specification).
        """
        if message.type == PING:
            return framed(Message(type=PING))
        if message.type not in (ADD_PROVIDER, GET_PROVIDERS, FIND_NODE):
            return await self._reply_of_libp2p(stream, message)
        longest = MAX_ANNOUNCED_KEY_BYTES if message.type == ADD_PROVIDER else MAX_KEY_BYTES
        if not 0 < len(message.key) <= longest:
            raise ProtocolError("a DHT message with an impossible key")
        if message.type == ADD_PROVIDER:
            # Of the providers in an announcement, only the sender's own word counts.
            for provider in message.providerPeers[:K]:
                if ID(provider.id) == ID.from_string(peer_id):
                    self.records.take(message.key, peer_id, provider.addrs)
                    break
            return framed(Message(type=ADD_PROVIDER, key=message.key))
        answer = Message(type=message.type, key=message.key)
        if message.type == GET_PROVIDERS:
            for raw_id, addrs in self.records.answer(message.key, peer_id):
                answer.providerPeers.add(id=raw_id, addrs=addrs)
        self._add_closer(answer, message.key, peer_id)
        return framed(answer)

    def _add_closer(self, answer: Message, key: bytes, asker: str) -> None:
        """Name the nodes closest to a key; for a node's own id, that node first."""
        target = kad_id(key)
        nodes = self.routing_table.get_peer_ids()
        chosen = heapq.nsmallest(K, nodes, key=lambda node: _place_of(node.to_bytes()) ^ target)
        if answer.type == FIND_NODE and (wanted := ID(key)) not in chosen:
            chosen.insert(0, wanted)
        for node in chosen:
            name = str(node)
            if name == asker:
                continue
            is_own = name == self._our_host.peer_id
            addrs = self._our_host.advertised_addrs() if is_own else self._our_host.addrs_of(name)
            if addrs:
                answer.closerPeers.add(
                    id=node.to_bytes(),
                    addrs=[_binary(addr) for addr in addrs],
                    connection=(
                        Message.ConnectionType.CONNECTED
                        if self._our_host.is_connected(name)
                        else Message.ConnectionType.CAN_CONNECT
                    ),
                )

    async def _reply_of_libp2p(self, stream: Stream, message: Message) -> bytes:
        """Have py-libp2p answer what concerns values."""
        replay = _Replay(stream, framed(message))
        await self._do_handle_stream(replay)
        if replay.is_reset:
            raise ProtocolError("a DHT message that makes no sense")
        return bytes(replay.answers)


class _Replay(INetStream):
    """What py-libp2p's handler takes for its stream: one message, then the end."""

    metric_send_channel: trio.MemorySendChannel[Any] | None = None

    def __init__(self, stream: Stream, question: bytes) -> None:
        self.muxed_conn = stream.muxed_conn
        self.answers = bytearray()
        self.is_reset = False
        self._question = question

    async def read(self, n: int | None = None) -> bytes:
        """Return up to `n` bytes, ``b""`` at the end."""
        data = self._question if n is None else self._question[:n]
        self._question = self._question[len(data) :]
        return data

    async def write(self, data: bytes) -> None:
        """Take a part of an answer."""
        self.answers += data

    async def close(self) -> None:
        """Do nothing: the stream goes on."""

    async def reset(self) -> None:
        """Note that the message made no sense."""
        self.is_reset = True

    def get_protocol(self) -> Any:
        """Return the protocol's name."""
        return KAD_PROTOCOL

    def set_protocol(self, protocol_id: Any) -> None:
        """Do nothing: it is set already."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return nothing: the handler does not ask."""
        return None


@lru_cache(maxsize=16_384)
def _place_of(raw_id: bytes) -> int:
    return kad_id(raw_id)


@lru_cache(maxsize=16_384)
def _binary(addr: str) -> bytes:
    return bytes(Multiaddr(addr).to_bytes())
