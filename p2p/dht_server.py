"""Our side of the DHT for others: records kept for them, questions answered.

Purpose
-------
`GuardedDht` is py-libp2p's `KadDHT`, used for its routing table and for answering
questions. Its own look-ups and its maintenance service are not used.

What is put right (py-libp2p 0.8.1)
-----------------------------------
- It takes 10 ADD_PROVIDER messages in 10 s from a peer, then resets the stream;
  ours takes `PROVIDER_MESSAGES_PER_WINDOW`.
- It answers 12 streams at once and resets all others, and Go nodes keep theirs
  open; ours answers `MAX_STREAMS`, of each peer `MAX_STREAMS_PER_PEER`, and ends
  those that say nothing for `IDLE_TIMEOUT_S`.
- It reads byte by byte, and each byte costs an encrypted window update: 1 ms for a
  message of 100 bytes. `BufferedStream` reads what there is and writes answers
  together.
- It takes whoever asks for a node that answers, so that clients fill the routing
  tables of servers; ours waits until identify says that the peer speaks the protocol.
- It keeps records without end, and values of 1 MiB under any name; see
  `ProviderRecords` and `ValueRecords`.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Record
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from tensorswarm.store.errors import NoSource, ProtocolError, RemoteError

from .addresses import believable
from .dht_rpc import KAD_PROTOCOL
from .host import Host, Stream

log = logging.getLogger(__name__)

PROVIDER_MESSAGES_PER_WINDOW = 2_000
"""ADD_PROVIDER messages taken from one peer in 10 s, at about 0.3 ms of CPU each."""

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

RECORD_LIFETIME_S = 48 * 3600.0
"""How long a provider record is kept (specification), in seconds."""

MAX_PROVIDERS_PER_KEY = 32
"""Providers kept of one key; the one not renewed for longest goes. More than the 20 of
the specification, because our own look-ups stop at 20 that can be reached."""

MAX_RECORDS = 100_000
"""Provider records kept in all, at about 750 bytes each; the oldest go."""

MAX_RECORDS_PER_PEER = 20_000
"""Records kept for one peer: some ten large models; more are not taken."""

MAX_VALUE_BYTES = 16 << 10
"""Longest value kept: IPNS allows 10 KiB."""

MAX_VALUES_BYTES = 32 << 20
"""All values together; the oldest go."""


class ProviderRecords(ProviderStore):
    """Who provides what, bounded. Takes the place of py-libp2p's store."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.libp2p)
        self._our_host = host
        self._own = ID.from_string(host.peer_id)
        self._own_keys: set[bytes] = set()
        self._by_key: dict[bytes, OrderedDict[ID, float]] = {}
        self._oldest_first: OrderedDict[tuple[bytes, ID], None] = OrderedDict()
        self._addrs: dict[ID, list[Multiaddr]] = {}
        self._count_of: Counter[ID] = Counter()

    def add_own(self, key: bytes) -> None:
        """Note that we provide a key: told to whoever asks us."""
        self._own_keys.add(key)

    def remove_own(self, key: bytes) -> None:
        """Note that we provide a key no longer."""
        self._own_keys.discard(key)

    def others(self, key: bytes) -> list[PeerInfo]:
        """Return the providers of a key that told us so, latest first."""
        return [info for info in self.get_providers(key) if info.peer_id != self._own]

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Keep a record that a peer sent of itself, with the addresses to be believed."""
        peer = provider.peer_id
        told_by = self._our_host.remote_host(str(peer))
        addrs = believable((str(addr) for addr in provider.addrs), told_by)
        is_new = peer not in self._by_key.get(key, ())
        if peer == self._own or (is_new and self._count_of[peer] >= MAX_RECORDS_PER_PEER):
            return
        self._addrs[peer] = [Multiaddr(addr) for addr in addrs]
        providers = self._by_key.setdefault(key, OrderedDict())
        providers[peer] = trio.current_time()
        providers.move_to_end(peer)
        self._oldest_first[(key, peer)] = None
        self._oldest_first.move_to_end((key, peer))
        if is_new:
            self._count_of[peer] += 1
        if len(providers) > MAX_PROVIDERS_PER_KEY:
            self._remove(key, next(iter(providers)))
        if len(self._oldest_first) > MAX_RECORDS:
            self._remove(*next(iter(self._oldest_first)))

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Return who provides a key, latest first; ourselves, if we do."""
        now = trio.current_time()
        found = [
            PeerInfo(peer, self._addrs[peer])
            for peer, added in reversed(self._by_key.get(key, OrderedDict()).items())
            if now - added < RECORD_LIFETIME_S
        ]
        if key in self._own_keys:
            ours = [Multiaddr(addr) for addr in self._our_host.advertised_addrs()]
            found.insert(0, PeerInfo(self._own, ours))
        return found

    def cleanup_expired(self) -> None:
        """Drop records older than `RECORD_LIFETIME_S`."""
        now = trio.current_time()
        while self._oldest_first:
            key, peer = next(iter(self._oldest_first))
            if now - self._by_key[key][peer] < RECORD_LIFETIME_S:
                return
            self._remove(key, peer)

    def size(self) -> int:
        """Return the number of records, without our own."""
        return len(self._oldest_first)

    def _remove(self, key: bytes, peer: ID) -> None:
        del self._oldest_first[(key, peer)]
        del self._by_key[key][peer]
        if not self._by_key[key]:
            del self._by_key[key]
        self._count_of[peer] -= 1
        if not self._count_of[peer]:
            del self._count_of[peer]
            del self._addrs[peer]


class ValueRecords(ValueStore):
    """Values kept for others (IPNS records, public keys), bounded by bytes."""

    def put_record(self, key: bytes, record: Record) -> None:
        """Keep a value that has passed its validator.

        Raises
        ------
        ValueError
            It is too long; py-libp2p then resets the stream.
        """
        if len(key) + len(record.value) > MAX_VALUE_BYTES:
            raise ValueError(f"a value of {len(record.value)} bytes")
        self.store.pop(key, None)  # to the end: the order is that of arrival
        super().put_record(key, record)
        kept = sum(entry.ByteSize() for entry, _ in self.store.values())
        for oldest in list(self.store):
            if kept <= MAX_VALUES_BYTES:
                break
            if oldest not in self.local_keys:
                kept -= self.store.pop(oldest)[0].ByteSize()


class GuardedDht(KadDHT):
    """py-libp2p's DHT node, bounded, on our own streams.

    Parameters
    ----------
    host : Host
        Ours.
    server : bool
        Whether to answer others.

    Attributes
    ----------
    on_node : callable
        Called when a node has been added to the routing table.
    """

    def __init__(self, host: Host, *, server: bool) -> None:
        self.on_node: Callable[[], None] = lambda: None
        # Constructed as a client: a server would register py-libp2p's own handler.
        super().__init__(host.libp2p, DHTMode.CLIENT, strict_validation=True)
        self._our_host = host
        self.records = ProviderRecords(host)
        self.provider_store = self.records
        self.value_store = ValueRecords(host.libp2p, self.local_peer_id)
        self._provider_rate_max = PROVIDER_MESSAGES_PER_WINDOW
        self._inbound_limiter = trio.CapacityLimiter(MAX_STREAMS)
        self._streams_of: Counter[str] = Counter()
        host.on_identified(self._consider)
        if server:
            self.mode = DHTMode.SERVER
            host.set_handler(KAD_PROTOCOL, self._answer)

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
            self.on_node()
        return added

    async def _answer(self, peer_id: str, stream: Stream) -> None:
        if self._streams_of[peer_id] >= MAX_STREAMS_PER_PEER:
            raise ProtocolError("too many DHT streams")
        self._streams_of[peer_id] += 1
        try:
            await self.handle_stream(BufferedStream(stream))
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]


class BufferedStream(INetStream):
    """What py-libp2p's handler takes for its stream: buffered, with deadlines.

    Answers are sent when the handler has to wait for the next question, or when
    `FLUSH_BYTES` have gathered.
    """

    metric_send_channel: trio.MemorySendChannel[Any] | None = None

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.muxed_conn = stream.muxed_conn
        self._received = bytearray()
        self._answers = bytearray()
        self._question_bytes = 0

    async def read(self, n: int | None = None) -> bytes:
        """Return up to `n` bytes, ``b""`` at the end."""
        if not self._received:
            await self._flush()
            try:
                with trio.fail_after(IDLE_TIMEOUT_S):
                    self._received += await self._stream.receive_some()
            except trio.TooSlowError as error:
                raise NoSource("nothing was asked for a while") from error
        data = bytes(self._received[:n])
        del self._received[:n]
        self._question_bytes += len(data)
        if self._question_bytes > MAX_REQUEST_BYTES:
            raise ProtocolError("a DHT message that is too long")
        return data

    async def write(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._question_bytes = 0
        self._answers += data
        if len(self._answers) > FLUSH_BYTES:
            await self._flush()

    async def close(self) -> None:
        """Send what is left, and end."""
        try:
            await self._flush()
        except RemoteError as error:
            log.debug("a last DHT answer was not taken: %s", error)
        await self._stream.aclose()

    async def reset(self) -> None:
        """Send the answers given so far, then end with an error."""
        try:
            await self._flush()
        except RemoteError as error:
            log.debug("a last DHT answer was not taken: %s", error)
        self._stream.abort()

    async def _flush(self) -> None:
        if not self._answers:
            return
        answers, self._answers = bytes(self._answers), bytearray()
        try:
            with trio.fail_after(WRITE_TIMEOUT_S):
                await self._stream.send(answers)
        except trio.TooSlowError as error:
            raise NoSource("the answer is not taken") from error

    def get_protocol(self) -> Any:
        """Return the protocol's name."""
        return KAD_PROTOCOL

    def set_protocol(self, protocol_id: Any) -> None:
        """Do nothing: it is set already."""

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return nothing: the handler does not ask."""
        return None
