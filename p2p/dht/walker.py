"""Asking our way to the nodes closest to a key.

Purpose
-------
Drives `lookup.Lookup` with real questions, remembers which nodes are dead, and sees to
it that a crowd round a key (`crowding`) has not the last word about it.

Rules
-----
- A node is asked with a deadline of `PEER_TIMEOUT_S`; one that fails, or has not answered
  within `SLOW_S` when its look-up ends, is left alone for `DEAD_S`.
- A look-up first goes straight to the key. Where it ends in a crowd, or gets nowhere in the
  time for that (`SLOW_S`, `STRAIGHT_SHARE`) or with `lookup.MAX_ASKED` questions (invented
  nodes, where nobody answers), the region of the key is learned from nodes beside it, and
  asked all over; then it is over.
- Where no more than `K` are heard of, all are asked anyway, and nobody can be hidden: busy
  nodes that are slow to answer are no crowd, and more questions would make them slower.
- Questions of one look-up: at most `lookup.MAX_ASKED` straight to the key, and in a crowd
  `MAX_ASKED_IN_CROWD` besides.
- Only addresses that `addresses.believable` leaves are remembered.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from contextlib import suppress

import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from tensorswarm.store.errors import BadInput, RemoteError, TensorswarmError

from ..host.addresses import tcp_host
from ..host.host import Host
from .crowding import KEYS_BESIDE, MAX_WIDENED, SPAN, Reach, keys_beside, spread
from .lookup import ALPHA, MAX_ASKED, K, Lookup, closest, kad_id, peer_kad_id
from .provider_table import group_of
from .rpc import FIND_NODE, KAD_PROTOCOL, Question, find_node, peers_in
from .server import GuardedDht
from .streams import DhtStreams

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 5.0
"""Time for one node to answer one question, connecting included, in seconds."""

DEAD_S = 60.0
"""How long a node that did not answer is left alone, in seconds."""

MAX_DEAD = 1_000
"""Nodes remembered as dead; the oldest are tried again first."""

SLOW_S = 1.5
"""Time to get to a key by the straight way, and for each step round a crowd, in seconds: a
look-up takes 0.1 s where nodes answer. Three of these fit into a round of a search."""

STRAIGHT_SHARE = 1 / 4
"""Share of a look-up's time for the straight way, if that is more: nobody waits for the
look-ups behind an announcement, and going round on a busy machine makes it busier."""

LOOK_UPS_ELSEWHERE = 2
"""Look-ups of random keys where there is a crowd: those made before may have met it, too."""

MAX_ASKED_IN_CROWD = (KEYS_BESIDE + LOOK_UPS_ELSEWHERE) * MAX_ASKED + KEYS_BESIDE * K + MAX_WIDENED
"""Questions that a crowd round a key costs besides, at most; 160 where nodes answer."""

OnAnswer = Callable[[str, Message], None]


class Walker:
    """Finds nodes.

    Parameters
    ----------
    host : Host
        Ours.
    dht : GuardedDht
        Has the routing table.
    rng : random.Random
        Source of all random choices.

    Attributes
    ----------
    streams : DhtStreams
        On which nodes are asked.
    crowds : int
        Look-ups so far that ended in a crowd, or got nowhere.
    """

    def __init__(self, host: Host, dht: GuardedDht, rng: random.Random) -> None:
        self._host = host
        self._dht = dht
        self._rng = rng
        self._reach = Reach()
        self._dead: dict[str, float] = {}
        self._being_asked: set[str] = set()
        self.streams = DhtStreams(host)
        self.crowds = 0

    # ---- what is known

    def known_nodes(self) -> list[str]:
        """Return all DHT nodes known: the routing table, and who is connected."""
        known = dict.fromkeys(str(peer) for peer in self._dht.routing_table.get_peer_ids())
        for peer in self._host.connected():
            if KAD_PROTOCOL in self._host.protocols_of(peer):
                known[peer] = None
        alive = [node for node in known if not self._is_dead(node)]
        return alive or list(known)  # with nobody left, the network may have been ours

    def is_crowd(self, point: int, found: list[str]) -> bool:
        """Tell whether the nodes closest to a point, nearest first, were made for it."""
        return self._reach.is_crowd(point, found)

    def is_being_asked(self, node: str) -> bool:
        """Tell whether a question of ours to a node is open."""
        return node in self._being_asked

    def lives(self, node: str) -> None:
        """Note that a node is there after all."""
        self._dead.pop(node, None)

    def _is_dead(self, node: str) -> bool:
        return trio.current_time() - self._dead.get(node, -DEAD_S) < DEAD_S

    def _group_of(self, node: str) -> str:
        """Return the part of the network that a node is in, as we or others see it."""
        host = self._host.remote_host(node)
        if host is None:
            for addr in self._host.addrs_of(node):
                with suppress(BadInput, ValueError):  # a circuit: it may be anywhere
                    return group_of(tcp_host(addr)[0], node)
        return group_of(host, node)

    # ---- one question

    async def ask(self, node: str, question: Question) -> Message:
        """Ask a node, and remember whether it is there.

        Raises
        ------
        RemoteError
            It does not answer.
        """
        self._being_asked.add(node)
        begun = trio.current_time()
        try:
            answer = await self.streams.ask(node, question, PEER_TIMEOUT_S)
            self._dead.pop(node, None)
            addrs = [Multiaddr(addr) for addr in self._host.addrs_of(node)]
            await self._dht.add_node(PeerInfo(ID.from_string(node), addrs))
        except RemoteError:
            self._bury(node)
            raise
        except trio.Cancelled:
            if trio.current_time() - begun >= SLOW_S:  # all others had answered meanwhile
                self._bury(node)
            raise
        finally:
            self._being_asked.discard(node)
        return answer

    def _bury(self, node: str) -> None:
        self._dead[node] = trio.current_time()
        if len(self._dead) > MAX_DEAD:
            del self._dead[next(iter(self._dead))]
        self._dht.routing_table.remove_peer(ID.from_string(node))

    def learn(self, node: str, answer: Message) -> list[str]:
        """Remember the addresses of the nodes in an answer; return who may be asked."""
        closer = []
        for peer in peers_in(answer.closerPeers, self._host.remote_host(node)):
            if peer.peer_id == self._host.peer_id or self._is_dead(peer.peer_id):
                continue
            if not self._host.is_connected(peer.peer_id):  # or we know it at first hand
                if not peer.addrs:
                    continue
                self._host.add_peer_addrs(peer.peer_id, peer.addrs)
            closer.append(peer.peer_id)
        return closer

    # ---- look-ups

    async def look_up(
        self,
        key: bytes,
        question: Question,
        start: Iterable[str],
        timeout_s: float,
        on_answer: OnAnswer = lambda _node, _answer: None,
    ) -> list[str]:
        """Ask the nodes closest to a key; return those that answered, nearest first.

        They are at most `K`, in a crowd `K` and `MAX_WIDENED`.

        Parameters
        ----------
        key : bytes
            What is looked up.
        question : Question
            What each is asked.
        start : iterable of str
            Nodes to begin with, besides those known.
        timeout_s : float
            Time for it, in seconds.
        on_answer : callable
            Called with each node and its answer.
        """
        straight = self._lookup(key, start)
        widely: list[str] = []
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                arrived = trio.Event()
                nursery.start_soon(self._go, straight, question, on_answer, arrived)
                gets_there = await self._gets_there(straight, arrived, timeout_s)
                found = straight.result()
                if question.kind == FIND_NODE and arrived.is_set() and not straight.is_exhausted:
                    self._reach.learn(kad_id(key), found)
                if not gets_there or await self._ends_in_crowd(key, found):
                    self.crowds += 1
                    await self._go_round(key, question, found, on_answer, widely)
                nursery.cancel_scope.cancel()
        found, reach = straight.result(), self._reach.beside(kad_id(key)) or SPAN
        found += (each for each in widely if peer_kad_id(each) ^ kad_id(key) < reach)
        return closest(kad_id(key), dict.fromkeys(found), len(found))

    async def _gets_there(self, lookup: Lookup, arrived: trio.Event, timeout_s: float) -> bool:
        """Wait while a look-up goes straight to its key; False if it gets nowhere."""
        patience_s = max(SLOW_S, timeout_s * STRAIGHT_SHARE)
        is_moving = True
        while is_moving and not arrived.is_set():
            count = lookup.answer_count
            with trio.move_on_after(patience_s):
                await arrived.wait()
            is_moving = lookup.asks_everybody and lookup.answer_count > count
        return not lookup.is_exhausted and (arrived.is_set() or lookup.asks_everybody)

    def _lookup(self, key: bytes, start: Iterable[str] = ()) -> Lookup:
        return Lookup(key, (*self.known_nodes(), *start), self._host.peer_id, self._group_of)

    async def _go(
        self, lookup: Lookup, question: Question, on_answer: OnAnswer, arrived: trio.Event
    ) -> None:
        """Take a look-up to its end."""
        running = 0
        changed = trio.Event()

        async def query(node: str) -> None:
            nonlocal running
            try:
                closer = await self._answer_of(node, question, on_answer)
                if closer is None:
                    lookup.failed(node)
                else:
                    lookup.answered(node, closer)
            finally:
                running -= 1
                changed.set()

        async with trio.open_nursery() as nursery:
            while True:
                while running < ALPHA and (node := lookup.next_peer()) is not None:
                    running += 1
                    nursery.start_soon(query, node)
                if not running:
                    break
                await changed.wait()
                changed = trio.Event()
        arrived.set()

    async def _answer_of(
        self, node: str, question: Question, on_answer: OnAnswer
    ) -> list[str] | None:
        """Ask a node; return whom it names, None if it did not answer."""
        try:
            answer = await self.ask(node, question)
        except TensorswarmError as error:
            log.debug("DHT node %s: %s", node, error)
            return None
        closer = self.learn(node, answer)
        on_answer(node, answer)
        return closer

    # ---- past a crowd

    async def _ends_in_crowd(self, key: bytes, found: list[str]) -> bool:
        point = kad_id(key)
        if len(found) >= K and self._reach.beside(point) is None:
            await self._nodes_near(self._any_key())
            if self._reach.beside(point) is None:
                return True  # that got nowhere: we are surrounded
        return self._reach.is_crowd(point, found)

    def _any_key(self) -> bytes:
        return b"\x12\x20" + self._rng.randbytes(32)  # in the form of a peer id

    async def _nodes_near(self, key: bytes) -> list[str]:
        """Return the nodes closest to some key, and learn how far they reach."""
        lookup, arrived = self._lookup(key), trio.Event()
        with trio.move_on_after(SLOW_S):
            await self._go(lookup, find_node(key), lambda _node, _answer: None, arrived)
        found = lookup.result()
        if arrived.is_set() and not lookup.is_exhausted:
            self._reach.learn(kad_id(key), found)
        return found

    async def _go_round(
        self,
        key: bytes,
        question: Question,
        asked: Iterable[str],
        on_answer: OnAnswer,
        answered: list[str],
    ) -> None:
        """Ask all over the region of a key; who is there is learned beside it, not from it.

        Adds to `answered` who answers, those beside the region included.
        """
        point = kad_id(key)
        reach = self._reach.beside(point) or SPAN
        known_before = self.known_nodes()
        heard = set(known_before)
        seen = set(asked)

        async def ask_one(node: str) -> None:
            closer = await self._answer_of(node, question, on_answer)
            if closer is not None:
                heard.update(closer)
                answered.append(node)

        async def ask_all(nodes: Iterable[str]) -> None:
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    if node not in seen:
                        seen.add(node)
                        nursery.start_soon(ask_one, node)

        async def ask_beside(near: bytes) -> None:
            nodes = await self._nodes_near(near)
            with trio.move_on_after(SLOW_S):
                await ask_all(nodes)

        async with trio.open_nursery() as nursery:
            for near in keys_beside(point, reach, self._rng):
                nursery.start_soon(ask_beside, near)
            for _ in range(LOOK_UPS_ELSEWHERE):
                nursery.start_soon(self._nodes_near, self._any_key())
        reach = self._reach.beside(point) or SPAN
        # Whom we know has answered us before: of those only heard of, some may be invented.
        known = spread(point, reach, known_before, self._group_of)[: MAX_WIDENED // 2]
        others = spread(point, reach, heard, self._group_of)
        await ask_all(tuple(dict.fromkeys((*known, *others)))[:MAX_WIDENED])
