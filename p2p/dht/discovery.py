"""Finding peers through the DHT: who provides a digest, and that we do.

Purpose
-------
`Discovery` is the node's view of the Kademlia DHT: bootstrap into it, announce
digests, find providers, and (as a server) keep records and answer questions for
others. The DHT key of a digest is its multihash (`store.cid.dht_key`).

Rules
-----
- Look-ups ask the network. They are never answered from our own announcements or
  from what an earlier look-up found; records that other peers left with us count,
  as they would at any node.
- Only addresses that `addresses.believable` leaves are ever dialled or passed on.
- What an answer says is a hint: nobody named in it is believed to hold anything.

The parts: `dht.walker` (asking one's way to a key), `dht.hearsay` (whose word is passed
on), `dht.publish` (announcing), `dht.server` (answering).

What it does not do: decide what is announced, or connect to providers.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID

from tensorswarm.store.cid import dht_key
from tensorswarm.store.errors import RemoteError, TensorswarmError

from ..host.addresses import PeerAddress
from ..host.host import Host
from .file import DhtFile
from .hearsay import Hearsay
from .lookup import closest, kad_id
from .publish import Announcement, Publisher
from .rpc import find_node, get_providers, peers_in
from .server import GuardedDht
from .walker import Walker

__all__ = ["Announcement", "Bootstrapped", "Discovery", "Provider"]

log = logging.getLogger(__name__)

BOOTSTRAP_TIMEOUT_S = 10.0
"""Time to connect to a bootstrap peer, in seconds."""

LOOKUP_TIMEOUT_S = 30.0
"""Time for a look-up of nodes, in seconds."""

MAX_PARALLEL_BOOTSTRAPS = 16
"""Bootstrap peers connected to at once."""

REFRESH_S = 600.0
"""How often the routing table is refreshed (specification: 10 minutes), in seconds."""

LEAST_REFRESH_S = 30.0
"""Shortest time from one look round to the next. A node that comes to us and was not known
before may cause one; while it does the time doubles, up to `REFRESH_S`: where a hundred
join at once, everybody would otherwise look for everybody without end."""

NEWCOMERS_ASKED = 3
"""Newcomers asked for nodes near us before that: a newcomer may belong to a network that did
not know of ours, but nearly always it has just joined ours, and knows nobody we don't.
Three questions tell; a look round costs twenty, and connections."""

MAX_NEWCOMERS = 256
"""Newcomers that wait to be asked; who does not fit in is forgotten."""

DEFAULT_PROVIDERS = 200
"""Providers a search ends with, unless told otherwise. Far more than the 20 of one
answer: whoever came first under a key need not be whoever has the bytes."""


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that is said to provide what was looked for.

    Attributes
    ----------
    peer_id : str
        Who.
    addrs : tuple of str
        Multiaddrs that may be dialled; empty for a peer that is connected.
    """

    peer_id: str
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """What became of bootstrapping.

    Attributes
    ----------
    connected : tuple of str
        The addresses that worked.
    failed : dict of str to str
        The others, and why.
    nodes : int
        DHT nodes known afterwards.
    """

    connected: tuple[str, ...]
    failed: dict[str, str]
    nodes: int


class Discovery:
    """A node of the DHT.

    Parameters
    ----------
    host : Host
        Ours, running.
    server : bool
        Whether to answer others. False for short-lived nodes and those that
        nobody can reach: they ask only.
    clock : callable
        Gives the time in seconds since 1970, for records.
    rng : random.Random, optional
        Source of all random choices.
    file : DhtFile, optional
        Where records survive the process.

    Attributes
    ----------
    searches, looks_round : int
        Searches for providers made so far, and look-ups of our own neighbourhood.
    listeners : list of callables
        Called whenever a node was met or a round of announcements has ended: look at
        `statistics` for what is new.
    """

    def __init__(
        self,
        host: Host,
        *,
        server: bool = True,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        file: DhtFile | None = None,
    ) -> None:
        self._host = host
        self._dht = GuardedDht(host, server=server, clock=clock, rng=rng, file=file)
        self._rng = rng or random.Random()
        self._walker = Walker(host, self._dht, self._rng)
        self.searches = 0
        self.looks_round = 0
        self.listeners: list[Callable[[], None]] = []
        self._publisher = Publisher(
            host, self._walker, self._find_nodes, clock=clock, rng=rng, file=file
        )
        self._publisher.on_round = self._tell_listeners
        self._dht.on_node = self._node_has_come
        self._newcomers: dict[str, None] = {}
        self._newcomers_came = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the routing table fresh and our keys announced, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._publisher.run)
            task_status.started()
            pause_s = LEAST_REFRESH_S
            while True:
                is_due = await self._is_due(pause_s)
                pause_s = LEAST_REFRESH_S if is_due else min(2 * pause_s, REFRESH_S)
                self._dht.records.expire()
                await self._dht.records.settle()
                self._dht.value_store.cleanup_expired()
                await self._find_nodes(self._own_key())
                self.looks_round += 1
                if is_due:
                    await self._find_nodes(_random_peer_id())

    async def _is_due(self, pause_s: float) -> bool:
        """Wait for the next look round; tell whether it is the regular one.

        That, or one that newcomers cause: `pause_s` from now, or later.
        """
        begun = trio.current_time()
        with trio.move_on_at(begun + REFRESH_S):
            await trio.sleep(pause_s)
            while True:
                await self._newcomers_came.wait()
                if await self._newcomers_bring_news():
                    return False
                await trio.sleep(LEAST_REFRESH_S)
        return True

    async def _newcomers_bring_news(self) -> bool:
        """Ask newcomers who is near us; tell whether they name a node that we lack."""
        waiting = list(self._newcomers)
        asked = self._rng.sample(waiting, min(NEWCOMERS_ASKED, len(waiting)))
        for node in asked:
            del self._newcomers[node]
        if not self._newcomers:
            self._newcomers_came = trio.Event()
        own_key = self._own_key()
        known = set(self._walker.known_nodes())
        for node in asked:
            try:
                named = self._walker.learn(node, await self._walker.ask(node, find_node(own_key)))
            except RemoteError as error:
                log.debug("DHT node %s: %s", node, error)
                continue
            nearest = closest(kad_id(own_key), known.union(named))
            if not known.issuperset(nearest):
                return True
        return False

    def _own_key(self) -> bytes:
        return ID.from_string(self._host.peer_id).to_bytes()

    def _node_has_come(self, node: str) -> None:
        self._publisher.node_has_come(node)
        self._tell_listeners()
        is_ours = self._walker.is_being_asked(node)  # our own look-up led to it: no news
        if not is_ours and len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers[node] = None
            self._newcomers_came.set()

    def _tell_listeners(self) -> None:
        for listener in list(self.listeners):
            listener()

    @property
    def dht(self) -> GuardedDht:
        """The DHT node behind this, for other uses of the same DHT (names, IPNS)."""
        return self._dht

    def routing_table_size(self) -> int:
        """Return the number of nodes in the routing table."""
        return int(self._dht.get_routing_table_size())

    # ---- joining

    async def bootstrap(
        self, addresses: Sequence[str], timeout_s: float = BOOTSTRAP_TIMEOUT_S
    ) -> Bootstrapped:
        """Join the DHT through peers at known addresses. Never raises for a peer.

        Connects to all of them at once, then looks up our own id, which fills the
        routing table with the nodes that matter most to us.

        Parameters
        ----------
        addresses : sequence of str
            Multiaddrs with ``/p2p/``.
        timeout_s : float
            Time to connect to each, in seconds.
        """
        connected: dict[str, str] = {}
        failed: dict[str, str] = {}
        limiter = trio.CapacityLimiter(MAX_PARALLEL_BOOTSTRAPS)

        async def join(address: str) -> None:
            async with limiter:
                try:
                    peer_id = await self._host.connect(address, timeout_s)
                except TensorswarmError as error:
                    failed[address] = str(error)
                else:
                    connected[address] = peer_id
                    self._walker.lives(peer_id)

        async with trio.open_nursery() as nursery:
            for address in dict.fromkeys(addresses):
                nursery.start_soon(join, address)
        await self._find_nodes(self._own_key(), connected.values())
        return Bootstrapped(tuple(connected), failed, len(self._walker.known_nodes()))

    # ---- announcing

    async def announce(self, digests: Sequence[bytes]) -> Announcement:
        """Announce that we provide these.

        What cannot be confirmed now is announced again by `run`, and so is
        everything when its records are about to run out.

        Parameters
        ----------
        digests : sequence of bytes
            BLAKE3 digests.

        Returns
        -------
        Announcement
            What another node confirms at once: nothing, when there is no other.
        """
        taken = self._publisher.add(digests)
        for digest in taken:
            self._dht.records.add_own(dht_key(digest))
        return await self._publisher.publish(taken)

    def withdraw(self, digests: Iterable[bytes]) -> None:
        """Stop announcing these; what others keep of them runs out within two days."""
        gone = list(digests)
        self._publisher.remove(gone)
        for digest in gone:
            self._dht.records.remove_own(dht_key(digest))

    def announce_again(self) -> None:
        """Announce everything anew, because our addresses have changed."""
        self._publisher.announce_again()

    async def check_sample(self) -> int:
        """Look for a sample of what we announced; return how many of it are gone."""
        return await self._publisher.check_sample()

    def wake(self) -> None:
        """Look at once whether anything is to be announced: the clock was moved."""
        self._publisher.wake()

    def statistics(self) -> dict[str, int | float]:
        """Return counters: nodes known, look-ups made, records kept, keys announced."""
        return {
            "nodes": self.routing_table_size(),
            "searches": self.searches,
            "looks_round": self.looks_round,
            "crowds_met": self._walker.crowds,
            "questions_asked": self._walker.streams.asked,
            "streams_opened": self._walker.streams.opened,
            "records_kept": self._dht.records.size(),
            **self._publisher.statistics(),
        }

    # ---- finding

    @asynccontextmanager
    async def find_providers(
        self, digest: bytes, *, timeout_s: float, limit: int = DEFAULT_PROVIDERS
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Provider]]:
        """Look for peers that provide a digest.

        Parameters
        ----------
        digest : bytes
            What is looked for.
        timeout_s : float
            Time for the search, in seconds.
        limit : int
            Providers to end with.

        Yields
        ------
        trio.MemoryReceiveChannel
            Gives each `Provider` once, as soon as a node names it, never ourselves;
            ends with the search. Leaving the block ends the search.
        """
        self.searches += 1
        send, receive = trio.open_memory_channel[Provider](limit)
        scope = trio.CancelScope()
        self._host.start_soon(lambda: self._search(dht_key(digest), send, scope, timeout_s, limit))
        try:
            yield receive
        finally:
            scope.cancel()
            receive.close()

    async def _search(
        self,
        key: bytes,
        send: trio.MemorySendChannel[Provider],
        scope: trio.CancelScope,
        timeout_s: float,
        limit: int,
    ) -> None:
        hearsay = Hearsay(self._host.peer_id, limit)

        def reachable(peers: Iterable[PeerAddress]) -> Iterator[PeerAddress]:
            for peer in peers:
                addrs = peer.addrs or self._host.addrs_of(peer.peer_id)
                if addrs or self._host.is_connected(peer.peer_id):
                    yield PeerAddress(peer.peer_id, addrs)

        def pass_on(peers: Iterable[PeerAddress]) -> None:
            for peer in peers:
                send.send_nowait(Provider(peer.peer_id, peer.addrs))  # has room for all
            if hearsay.is_full:
                scope.cancel()

        def take(node: str, answer: Message) -> None:
            if not scope.cancel_called:
                named = peers_in(answer.providerPeers, self._host.remote_host(node))
                pass_on(hearsay.take(reachable(named)))

        with send, scope:
            pass_on(hearsay.take(reachable(self._dht.records.others(key))))
            await self._walker.look_up(key, get_providers(key), (), timeout_s, take)
            pass_on(hearsay.rest())

    async def _find_nodes(self, key: bytes, start: Iterable[str] = ()) -> list[str]:
        """Return the nodes closest to a key, nearest first."""
        return await self._walker.look_up(key, find_node(key), start, LOOKUP_TIMEOUT_S)


def _random_peer_id() -> bytes:
    """Return a peer id that nobody has, to look up somewhere in the key space."""
    return b"\x12\x20" + secrets.token_bytes(32)
