"""Announcing on the DHT, and making sure of it.

Purpose
-------
Have the nodes closest to each of our keys keep a record that we provide it, and
count a key as announced only when a node other than ourselves, asked for its
providers, names us. (py-libp2p's own `provide` says True for 60 keys of which the
receivers keep 10.)

Rules
-----
- One stream per receiving node and batch of `KEYS_PER_STREAM`: all announcements,
  then the questions to read some of them back. Each key is read back at one node,
  and at another one if that does not confirm it.
- Where the nodes closest to a key are known, no look-up is made: in a network of at
  most `K` nodes, never; in larger ones, once per region of the key space.
- Stock py-libp2p nodes take 10 announcements in 10 s and then reset the stream. So
  each node gets the keys in another order, and what is not confirmed is announced
  again later, first after `RETRY_S`, then ever more rarely while nothing is gained.
- Confirmed keys are announced again after `REPUBLISH_S`.
- A key whose list of providers is full of others can be found without us; it is
  tried again after `CROWDED_RETRY_S`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.store.cid import dht_key
from tensorswarm.store.errors import NoSource, ProtocolError, RemoteError

from .dht_lookup import K, Regions, closest, kad_id
from .dht_rpc import (
    ADD_PROVIDER,
    GET_PROVIDERS,
    MAX_PEERS_PER_ANSWER,
    DhtStream,
    add_provider,
    dht_stream,
    get_providers,
    id_text,
)
from .host import Host

log = logging.getLogger(__name__)

KEYS_PER_STREAM = 500
"""Keys announced on one stream: at most 150 KB, which the receiver's window of 256 KiB
takes whole, so that nobody waits for the other while both write."""

KEYS_PER_ROUND = 2_000
"""Keys announced in one go by the background task, before others get their turn."""

PARALLEL_NODES = 8
"""Nodes that announcements are sent to at once."""

OPEN_TIMEOUT_S = 5.0
"""Time to reach a node and open a stream, in seconds."""

PROGRESS_TIMEOUT_S = 10.0
"""Time for each next answer of a node that is taking announcements, in seconds."""

CHECK_ROUNDS = 3
"""Nodes at which a key is read back before it counts as not announced."""

STOCK_ALLOWANCE = 10
"""Announcements that stock py-libp2p takes at once."""

RETRY_S = 11.0
"""Shortest wait before unconfirmed keys are announced again: stock py-libp2p's window
of 10 s, and a little."""

MAX_RETRY_S = 600.0
"""Longest wait before unconfirmed keys are announced again."""

CROWDED_RETRY_S = 3600.0
"""Wait for keys that have many providers already."""

REPUBLISH_S = 22 * 3600.0
"""When confirmed keys are announced again (specification: 22 h of 48 h)."""

MAX_OWN_KEYS = 200_000
"""Keys we provide: hundreds of large models. More are not announced."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What became of announcing some keys.

    Attributes
    ----------
    asked : int
        How many keys were to be announced, without those too many.
    confirmed : frozenset of bytes
        The digests that another node names us as a provider of.
    nodes : int
        How many DHT nodes were told.
    """

    asked: int
    confirmed: frozenset[bytes]
    nodes: int = 0


@dataclass(slots=True)
class _Receipt:
    """What one node did with what it was sent."""

    confirmed: set[bytes] = field(default_factory=set)
    crowded: set[bytes] = field(default_factory=set)
    checked: set[bytes] = field(default_factory=set)
    echoes: int = 0
    is_reached: bool = False
    is_intact: bool = False


@dataclass(slots=True)
class _Round:
    """One round of announcements: who is told what, and what came of it.

    Keys are DHT keys here (multihashes), not digests.
    """

    nodes_of: dict[bytes, list[str]]
    confirmed: set[bytes] = field(default_factory=set)
    crowded: set[bytes] = field(default_factory=set)
    tried: dict[bytes, set[str]] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    not_taken: set[tuple[str, bytes]] = field(default_factory=set)

    def take(self, node: str, keys: Sequence[bytes], receipt: _Receipt) -> None:
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


@dataclass(slots=True)
class _OwnKey:
    due: float
    is_confirmed: bool = False


class Publisher:
    """Keeps our keys announced.

    Parameters
    ----------
    host : Host
        Ours.
    known_nodes : callable
        Returns the DHT nodes known at the moment.
    look_up : callable
        Finds the nodes closest to a key.
    """

    def __init__(
        self,
        host: Host,
        known_nodes: Callable[[], list[str]],
        look_up: Callable[[bytes], Awaitable[list[str]]],
    ) -> None:
        self._host = host
        self._known_nodes = known_nodes
        self._look_up = look_up
        self._own: dict[bytes, _OwnKey] = {}
        self._turn = trio.Lock()
        self._limiter = trio.CapacityLimiter(PARALLEL_NODES)
        self._retry_s = RETRY_S
        self._wake = trio.Event()

    def add(self, digests: Iterable[bytes]) -> list[bytes]:
        """Take digests to be announced; return those taken, each once."""
        taken = []
        for digest in dict.fromkeys(digests):
            if digest in self._own or len(self._own) < MAX_OWN_KEYS:
                # Due soon by itself, should the announcing be cancelled before its turn.
                self._own[digest] = _OwnKey(trio.current_time() + RETRY_S)
                taken.append(digest)
        return taken

    def remove(self, digests: Iterable[bytes]) -> None:
        """Announce these no more; records of them run out by themselves."""
        for digest in digests:
            self._own.pop(digest, None)

    def nodes_have_come(self) -> None:
        """Try unconfirmed keys again soon: there are new nodes to tell."""
        self._retry_s = RETRY_S
        for own in self._own.values():
            if not own.is_confirmed:
                own.due = 0
        self._wake.set()

    async def publish(self, digests: Sequence[bytes]) -> Announcement:
        """Announce digests taken before, once, and schedule what is to be done again."""
        async with self._turn:
            try:
                done = await self._round([dht_key(digest) for digest in digests])
            except BaseException:
                self._schedule(digests, set(), set())
                raise
            confirmed = {digest for digest in digests if dht_key(digest) in done.confirmed}
            crowded = {digest for digest in digests if dht_key(digest) in done.crowded}
            self._schedule(digests, confirmed, crowded)
        nodes = {node for nodes in done.nodes_of.values() for node in nodes} - done.unusable
        return Announcement(len(digests), frozenset(confirmed), len(nodes))

    async def run(self) -> None:
        """Announce again whatever is due, until cancelled."""
        while True:
            now = trio.current_time()
            due = [digest for digest, own in self._own.items() if own.due <= now]
            if due and self._known_nodes():
                await self.publish(due[:KEYS_PER_ROUND])
                continue
            upcoming = min((own.due for own in self._own.values()), default=now + REPUBLISH_S)
            self._wake = trio.Event()
            with trio.move_on_after(RETRY_S if due else max(upcoming - now, 0.01)):
                await self._wake.wait()

    def _schedule(
        self, digests: Sequence[bytes], confirmed: set[bytes], crowded: set[bytes]
    ) -> None:
        now = trio.current_time()
        self._retry_s = RETRY_S if confirmed else min(2 * self._retry_s, MAX_RETRY_S)
        for digest in digests:
            own = self._own.get(digest)
            if own is None:
                continue  # removed in the meantime
            own.is_confirmed = digest in confirmed
            if own.is_confirmed:
                own.due = now + REPUBLISH_S
            else:
                own.due = now + (CROWDED_RETRY_S if digest in crowded else self._retry_s)
        self._wake.set()

    # ---- one round

    async def _round(self, keys: Sequence[bytes]) -> _Round:
        this = _Round(await self._nodes_for(keys))
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
                nursery.start_soon(self._tell, this, node, ordered, checks.get(node, []))
        for _ in range(CHECK_ROUNDS - 1):
            async with trio.open_nursery() as nursery:
                for node, its_keys in this.next_checks().items():
                    nursery.start_soon(self._tell, this, node, [], its_keys)
        return this

    async def _nodes_for(self, keys: Sequence[bytes]) -> dict[bytes, list[str]]:
        """Return, for each key, the nodes to keep its record."""
        nodes = self._known_nodes()
        if len(nodes) <= K:
            return dict.fromkeys(keys, nodes) if nodes else {}
        regions = Regions()
        found: dict[bytes, list[str]] = {}
        for key in sorted(keys, key=kad_id):
            point = kad_id(key)
            chosen = regions.peers_for(point)
            if chosen is None:
                chosen = await self._look_up(key) or closest(point, nodes)
                regions.learn(point, chosen)
            found[key] = chosen
        return found

    async def _tell(
        self, this: _Round, node: str, keys: Sequence[bytes], checks: Sequence[bytes]
    ) -> None:
        """Announce keys to a node and read others back, a stream for each batch."""
        async with self._limiter:
            to_check = set(checks)
            for start in range(0, max(len(keys), 1), KEYS_PER_STREAM):
                batch = keys[start : start + KEYS_PER_STREAM]
                mine = [key for key in batch if key in to_check]
                if not keys:
                    mine = list(checks)[:KEYS_PER_STREAM]  # the rest at the next time
                receipt = _Receipt()
                try:
                    await self._exchange(node, batch, mine, receipt)
                except RemoteError as error:
                    log.debug("announcing to %s: %s", node, error)
                    if not receipt.is_reached:
                        this.unusable.add(node)
                        return
                this.take(node, batch, receipt)
                if not receipt.is_intact:
                    # It has had enough for now: what follows is not even sent.
                    rest = keys[start + KEYS_PER_STREAM :]
                    this.not_taken.update((node, key) for key in rest)
                    return

    async def _exchange(
        self, node: str, keys: Sequence[bytes], checks: Sequence[bytes], receipt: _Receipt
    ) -> None:
        """Send one batch, and read back `checks`, or else its last key.

        That question is also a fence: its answer shows that all before it was read.
        """
        own_id = ID.from_string(self._host.peer_id).to_bytes()
        addrs = [Multiaddr(addr).to_bytes() for addr in self._host.advertised_addrs()]
        questions = list(checks) or list(keys[-1:])
        data = b"".join(add_provider(key, own_id, addrs) for key in keys)
        data += b"".join(get_providers(key).data for key in questions)
        try:
            async with dht_stream(self._host, node, OPEN_TIMEOUT_S) as stream:
                receipt.is_reached = True
                with trio.fail_after(PROGRESS_TIMEOUT_S):
                    await stream.send(data)
                for key in questions:
                    answer = await _next_answer(stream, receipt, len(keys))
                    self._note(key, answer, receipt)
        except trio.TooSlowError as error:
            raise NoSource(f"{node} takes announcements too slowly") from error
        receipt.is_intact = True

    def _note(self, key: bytes, answer: Message, receipt: _Receipt) -> None:
        """Note whether an answer names us as a provider."""
        if answer.key and answer.key != key:
            raise ProtocolError("a DHT answer about another key")
        named = {id_text(peer.id) for peer in answer.providerPeers[:MAX_PEERS_PER_ANSWER]}
        receipt.checked.add(key)
        if self._host.peer_id in named:
            receipt.confirmed.add(key)
        elif len(named) >= K:
            receipt.crowded.add(key)


async def _next_answer(stream: DhtStream, receipt: _Receipt, announced: int) -> Message:
    """Return the next answer to a question; count the echoes before it."""
    while True:
        with trio.fail_after(PROGRESS_TIMEOUT_S):
            message = await stream.receive()
        if message.type == GET_PROVIDERS:
            return message
        receipt.echoes += 1
        if message.type != ADD_PROVIDER or receipt.echoes > announced:
            raise ProtocolError("a DHT answer that was not asked for")
