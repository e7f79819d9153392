"""One round of announcements: nodes are told, and asked what they were told.

Purpose
-------
Send records of keys to the nodes that are to keep them, read some back, and say which keys
are confirmed: a node other than ourselves, asked for their providers, named us.

Rules
-----
- One stream per receiving node, kept for all its keys: `KEYS_PER_BATCH` announcements,
  then the questions to read some of them back, then the next batch. Each key is read
  back at one node, and at another one if that does not confirm it.
- A node gets no more than it takes (`announce_schedule.Appetites`). Stock py-libp2p
  takes ten, then resets the stream; so each node gets the keys in another order.
- A few keys go over a stream that a look-up left open, if there is one: opening one costs more
  than telling them.
- A node that cannot be reached, is too slow or breaks the protocol costs its own part.

Not here: which nodes keep a key, and when a key is due (`publish`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.errors import ProtocolError, RemoteError

from ..host.host import Host
from .announce_schedule import STOCK_ALLOWANCE, Appetites
from .lookup import K
from .rpc import (
    ADD_PROVIDER,
    GET_PROVIDERS,
    MAX_PEERS_PER_ANSWER,
    DhtStream,
    add_provider,
    dht_stream,
    get_providers,
    id_text,
)
from .streams import DhtStreams

log = logging.getLogger(__name__)

KEYS_PER_BATCH = 500
"""Keys announced before answers are read: at most 150 KB, which the receiver's window of
256 KiB takes whole, so that nobody waits for the other while both write."""

FEW_KEYS = 4
"""Keys that may be told over a stream on which others were told before: stock py-libp2p takes
ten on each."""

PARALLEL_NODES = 8
"""Nodes that announcements are sent to at once."""

OPEN_TIMEOUT_S = 5.0
"""Time to reach a node and open a stream, in seconds."""

PROGRESS_TIMEOUT_S = 10.0
"""Time for each next answer of a node that is taking announcements, in seconds."""

CHECK_ROUNDS = 3
"""Nodes at which a key is read back before it counts as not announced."""


@dataclass(slots=True)
class Counters:
    """What announcing has cost and come to, since the start.

    Attributes
    ----------
    rounds, look_ups : int
        Sweeps made, and the look-ups that they needed.
    streams, records_sent, questions_sent : int
        What was sent.
    records_echoed : int
        Announcements that receivers acknowledged.
    not_taken : int
        Announcements that receivers had no appetite for.
    unreachable : int
        Nodes that could not be told.
    announced_late : int
        Keys that could not be announced at first, and then were.
    newcomers_told : int
        Nodes told because they were new or had lost their records.
    samples, samples_missing : int
        Keys looked for afterwards, and those of them that were gone.
    """

    rounds: int = 0
    look_ups: int = 0
    streams: int = 0
    records_sent: int = 0
    records_echoed: int = 0
    questions_sent: int = 0
    not_taken: int = 0
    unreachable: int = 0
    announced_late: int = 0
    newcomers_told: int = 0
    samples: int = 0
    samples_missing: int = 0


@dataclass(slots=True)
class Receipt:
    """What one node did with what it was sent."""

    confirmed: set[bytes] = field(default_factory=set)
    crowded: set[bytes] = field(default_factory=set)
    checked: set[bytes] = field(default_factory=set)
    echoes: int = 0
    is_reached: bool = False
    is_intact: bool = False


@dataclass(slots=True)
class Round:
    """One round of announcements: who is told what, and what came of it.

    Keys are DHT keys here (multihashes), not digests.
    """

    nodes_of: dict[bytes, list[str]]
    confirmed: set[bytes] = field(default_factory=set)
    crowded: set[bytes] = field(default_factory=set)
    tried: dict[bytes, set[str]] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    not_taken: set[tuple[str, bytes]] = field(default_factory=set)

    def take(self, node: str, keys: Sequence[bytes], receipt: Receipt) -> None:
        """Note what a node did."""
        self.confirmed |= receipt.confirmed
        self.crowded |= receipt.crowded
        for key in receipt.checked:
            self.tried.setdefault(key, set()).add(node)
        if not receipt.is_intact:
            # It stopped somewhere after its last echo that we saw.
            may_have = 2 * max(receipt.echoes, STOCK_ALLOWANCE)
            self.not_taken.update((node, key) for key in keys[may_have:])

    def next_checks(self) -> dict[str, list[bytes]]:
        """Return, for each node, the keys to read back there next."""
        checks: dict[str, list[bytes]] = {}
        for index, (key, nodes) in enumerate(self.nodes_of.items()):
            if key in self.confirmed or key in self.crowded:
                continue
            left = [
                node
                for node in nodes
                if node not in self.unusable
                and node not in self.tried.get(key, ())
                and (node, key) not in self.not_taken
            ]
            if left:
                checks.setdefault(left[index % len(left)], []).append(key)
        return checks


class Teller:
    """Tells nodes what they are to keep, and reads it back.

    Parameters
    ----------
    host : Host
        Ours.
    streams : DhtStreams
        Those that look-ups left open.
    clock : callable
        Gives the time in seconds since 1970.

    Attributes
    ----------
    counters : Counters
        What announcing has cost and come to; those of its rounds are counted here.
    """

    def __init__(self, host: Host, streams: DhtStreams, clock: Callable[[], float]) -> None:
        self._host = host
        self._streams = streams
        self._clock = clock
        self._appetites = Appetites()
        self._limiter = trio.CapacityLimiter(PARALLEL_NODES)
        self.counters = Counters()

    async def announce(self, this: Round) -> None:
        """Tell each node of a round its keys, and read each key back."""
        self.counters.rounds += 1
        told: dict[str, list[bytes]] = {}
        for key, nodes in this.nodes_of.items():
            for node in nodes:
                told.setdefault(node, []).append(key)
        checks = this.next_checks()
        async with trio.open_nursery() as nursery:
            for index, (node, its_keys) in enumerate(told.items()):
                # Another order for each: one that takes only ten takes another ten.
                start = index * len(its_keys) // len(told)
                ordered = its_keys[start:] + its_keys[:start]
                nursery.start_soon(self.tell, this, node, ordered, checks.get(node, []))
        await self.read_back(this, CHECK_ROUNDS - 1)

    async def read_back(self, this: Round, rounds: int = CHECK_ROUNDS) -> None:
        """Ask for keys that nobody has confirmed, each at one more node a round."""
        for _ in range(rounds):
            async with trio.open_nursery() as nursery:
                for node, its_keys in this.next_checks().items():
                    nursery.start_soon(self.tell, this, node, [], its_keys)

    async def tell(
        self, this: Round, node: str, keys: Sequence[bytes], checks: Sequence[bytes]
    ) -> None:
        """Announce keys to a node and read others back, all on one stream."""
        now = self._clock()
        portion = self._appetites.portion(now, node, len(keys))
        this.not_taken.update((node, key) for key in keys[portion:])
        self.counters.not_taken += len(keys) - portion
        keys = keys[:portion]
        to_check = set(checks) & set(keys) if keys else set(checks)
        batches = [
            (batch, [key for key in batch if key in to_check] or batch[-1:])
            for batch in _batches(keys)
        ] or [([], batch) for batch in _batches(checks)]
        if not batches:
            return
        receipt = Receipt()
        async with self._limiter:
            try:
                async with self._stream_to(node, len(keys)) as stream:
                    self.counters.streams += 1
                    for batch, questions in batches:
                        receipt = Receipt(is_reached=True)
                        await self._exchange(stream, batch, questions, receipt)
                        this.take(node, batch, receipt)
                        batches = batches[1:]
            except trio.TooSlowError:
                log.debug("%s takes announcements too slowly", node)
            except RemoteError as error:
                log.debug("announcing to %s: %s", node, error)
        if batches:
            self._note_failure(this, node, [key for batch, _ in batches for key in batch], receipt)
        if keys:
            self._appetites.took(now, node, len(keys), receipt.echoes, not batches)

    def _stream_to(self, node: str, count: int) -> AbstractAsyncContextManager[DhtStream]:
        if count > FEW_KEYS:
            return dht_stream(self._host, node, OPEN_TIMEOUT_S)
        return self._streams.lend(node, OPEN_TIMEOUT_S)

    def _note_failure(
        self, this: Round, node: str, keys: Sequence[bytes], receipt: Receipt
    ) -> None:
        """Note that a node could not be reached, or stopped in the middle."""
        if not receipt.is_reached:
            this.unusable.add(node)
            self.counters.unreachable += 1
            return
        receipt.is_intact = False
        this.take(node, keys, receipt)
        self.counters.not_taken += max(0, len(keys) - receipt.echoes)

    async def _exchange(
        self,
        stream: DhtStream,
        keys: Sequence[bytes],
        questions: Sequence[bytes],
        receipt: Receipt,
    ) -> None:
        """Send one batch, and read back some of its keys.

        The last question is also a fence: its answer shows that all before it was read.
        """
        own_id = ID.from_string(self._host.peer_id).to_bytes()
        addrs = [Multiaddr(addr).to_bytes() for addr in self._host.advertised_addrs()]
        data = b"".join(add_provider(key, own_id, addrs) for key in keys)
        data += b"".join(get_providers(key).data for key in questions)
        self.counters.records_sent += len(keys)
        self.counters.questions_sent += len(questions)
        with trio.fail_after(PROGRESS_TIMEOUT_S):
            await stream.send(data)
        for key in questions:
            answer = await self._next_answer(stream, receipt, len(keys))
            self._note(key, answer, receipt)
        receipt.is_intact = True

    def _note(self, key: bytes, answer: Message, receipt: Receipt) -> None:
        """Note whether an answer names us as a provider."""
        if answer.key and answer.key != key:
            raise ProtocolError("a DHT answer about another key")
        named = {id_text(peer.id) for peer in answer.providerPeers[:MAX_PEERS_PER_ANSWER]}
        receipt.checked.add(key)
        if self._host.peer_id in named:
            receipt.confirmed.add(key)
        elif len(named) >= K:
            receipt.crowded.add(key)

    async def _next_answer(self, stream: DhtStream, receipt: Receipt, announced: int) -> Message:
        """Return the next answer to a question; count the echoes before it."""
        while True:
            with trio.fail_after(PROGRESS_TIMEOUT_S):
                message = await stream.receive()
            if message.type == GET_PROVIDERS:
                return message
            receipt.echoes += 1
            self.counters.records_echoed += 1
            if message.type != ADD_PROVIDER or receipt.echoes > announced:
                raise ProtocolError("a DHT answer that was not asked for")


def _batches(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [keys[at : at + KEYS_PER_BATCH] for at in range(0, len(keys), KEYS_PER_BATCH)]
