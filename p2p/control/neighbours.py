"""The table of neighbours: who is here, how they are met, what they told us.

A neighbour is met by dialling it or by being dialled; either way both say hello
first. The table is bounded, and so is what it remembers of each neighbour. Only
peers in this table are served on the bulk plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import trio

from tensorswarm.store.errors import NoSource, RemoteError
from tensorswarm.store.object_table import ObjectTable

from ..host.addresses import PeerAddress, is_circuit
from ..host.host import Host, Stream
from ..host.places import Places, Standing
from . import wire, wire_limits
from .answers import Answers, held_part
from .neighbour import Neighbour
from .object_set import ObjectSet

MAX_NEIGHBOURS = 200
"""Neighbours at once. Below the 250 connections at which a py-libp2p hub stops."""

MAX_HELD_DIGESTS = 1 << 17
"""Objects remembered as held by one neighbour: the largest models have 100,000 tensors."""

MAX_HELD_MODELS = 16
"""Models of which it is remembered what one neighbour holds; the oldest are forgotten."""

MAX_TOLD_DIGESTS = 1 << 17
"""Objects remembered as told to be whole, until somebody asks which they were."""

MEET_TIMEOUT_S = 5.0
"""Time to connect and open the stream, in seconds."""

GIVING_S = 30.0
"""A neighbour that has given good bytes so short a time ago is in the middle of a transfer."""

HaveListener = Callable[[str, Sequence[wire.HaveEntry]], None]
HaveModelListener = Callable[[str, wire.HaveModel], None]
OfferListener = Callable[[str, wire.Offer | wire.Pass], None]


class Neighbours:
    """All neighbours of a node.

    Parameters
    ----------
    host : Host
        Opens connections and streams.
    answers : Answers
        What neighbours may learn.
    hello : callable
        Makes our hello, with the addresses of the moment.

    Attributes
    ----------
    is_served : callable
        Tells whether a neighbour is being given bytes; to be set by whoever gives them.
    joined, left : list of callables
        Hear of each neighbour, by peer id, as it comes and goes.
    have_listeners : list of callables
        Hear what neighbours say they hold.
    have_model_listeners : list of callables
        Hear what they say they hold of a model, by its manifest.
    offer_listeners : list of callables
        Hear of uploads that neighbours offer, and of offers that they pass on.
    want_listeners : list of callables
        Hear of each neighbour, by peer id, that has begun to want something, or something more.
    """

    def __init__(self, host: Host, answers: Answers, hello: Callable[[], wire.Hello]) -> None:
        self._host = host
        self._answers = answers
        self._hello = hello
        self._table: dict[str, Neighbour] = {}
        self._meeting: dict[str, trio.Lock] = {}
        self._held: dict[str, ObjectSet] = {}
        self._told_whole: set[bytes] = set()
        self._places = Places(MAX_NEIGHBOURS, self._standing_here)
        self._numbers: dict[str, int] = {}
        self._gave_at: dict[str, float] = {}
        self._dialled: set[str] = set()
        self.is_served: Callable[[str], bool] = lambda _peer_id: False
        self._nursery: trio.Nursery | None = None
        self.joined: list[Callable[[str], None]] = []
        self.left: list[Callable[[str], None]] = []
        self.have_listeners: list[HaveListener] = []
        self.have_model_listeners: list[HaveModelListener] = []
        self.offer_listeners: list[OfferListener] = []
        self.want_listeners: list[Callable[[str], None]] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take in neighbours until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._host.set_handler(wire_limits.PROTOCOL_ID, self._accept)
            task_status.started()
            await trio.sleep_forever()

    # ---- who is here

    def get(self, peer_id: str) -> Neighbour | None:
        """Return a neighbour by its peer id."""
        return self._table.get(peer_id)

    def all(self) -> list[Neighbour]:
        """Return all neighbours."""
        return list(self._table.values())

    @property
    def me(self) -> str:
        """Our own peer id."""
        return self._host.peer_id

    def wanting(self, digest: bytes) -> list[str]:
        """Return the neighbours that want to hear news of an object or a model."""
        return [peer_id for peer_id, each in self._table.items() if digest in each.interests]

    def holds_anything(self, peer_id: str) -> bool:
        """Tell whether a neighbour has said that it holds anything."""
        held = self._held.get(peer_id)
        return held is not None and held.has_objects()

    def somebody_listens(self) -> bool:
        """Tell whether any neighbour wants to hear news of anything."""
        return any(each.interests for each in self._table.values())

    def is_neighbour(self, peer_id: str) -> bool:
        """Tell whether a peer has said hello and is still here (any thread may ask)."""
        return peer_id in self._table

    def standing(self, peer_id: str) -> Standing:
        """Tell what a peer has shown so far: whoever has shown least makes room first."""
        if peer_id not in self._table:
            return Standing.STRANGER
        return max(Standing.NEIGHBOUR, self._standing_here(peer_id))

    def _standing_here(self, peer_id: str) -> Standing:
        """Do the same among neighbours: saying hello is nothing to speak of there."""
        gave_at = self._gave_at.get(peer_id)
        if self.is_served(peer_id) or (
            gave_at is not None and trio.current_time() - gave_at < GIVING_S
        ):
            return Standing.BUSY
        if gave_at is not None:
            return Standing.PROVED
        return Standing.NEIGHBOUR if peer_id in self._dialled else Standing.STRANGER

    def has_given(self, peer_id: str) -> None:
        """Note that a neighbour gave bytes that match their hash."""
        if peer_id in self._table:
            self._gave_at[peer_id] = trio.current_time()

    def _take_place(self, neighbour: Neighbour, *, dialled: bool) -> bool:
        """Give a neighbour a place at the table; tell whether there was one."""
        peer_id = neighbour.peer_id
        if peer_id not in self._numbers:
            host = self._host.remote_host(peer_id) or ""
            number = self._places.enter(
                peer_id, host, trio.current_time(), lambda: self._send_away(peer_id)
            )
            if number is None:
                return False
            self._numbers[peer_id] = number
        if dialled:
            self._dialled.add(peer_id)
        return True

    def _send_away(self, peer_id: str) -> None:
        """Have a neighbour leave that makes room for another."""
        self._numbers.pop(peer_id, None)
        neighbour = self._table.get(peer_id)
        if neighbour is None:
            return
        bye = wire.Bye(wire_limits.CODE_TOO_MANY, "too many neighbours")
        assert self._nursery is not None, "neighbours before run()"
        self._nursery.start_soon(neighbour.close, bye)
        if neighbour.earlier is not None:
            self._nursery.start_soon(neighbour.earlier.close, bye)

    def seen_at(self, peer_id: str) -> str | None:
        """Return the IP address a connected peer is seen at."""
        return self._host.remote_host(peer_id)

    # ---- meeting

    async def meet(self, peer: PeerAddress, timeout_s: float = MEET_TIMEOUT_S) -> Neighbour:
        """Return the neighbour, connecting and saying hello if it is not one yet.

        Raises
        ------
        RemoteError
            It cannot be reached, or does not speak our protocol.
        """
        known = self._table.get(peer.peer_id)
        if known is not None:
            return known
        if peer.peer_id == self._host.peer_id:
            raise NoSource("that is this node's own address")
        lock = self._meeting.setdefault(peer.peer_id, trio.Lock())
        try:
            with trio.fail_after(timeout_s):
                async with lock:
                    return self._table.get(peer.peer_id) or await self._dial(peer, timeout_s)
        except trio.TooSlowError as error:
            raise NoSource(f"peer {peer.peer_id} did not answer within {timeout_s:g} s") from error
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._meeting.pop(peer.peer_id, None)

    async def _dial(self, peer: PeerAddress, timeout_s: float) -> Neighbour:
        if peer.peer_id not in self._host.connected():
            await self._host.connect_peer(peer, timeout_s)
        return await self._say_hello(peer.peer_id, timeout_s)

    async def renew(self, peer_id: str, timeout_s: float = MEET_TIMEOUT_S) -> None:
        """Say hello to a neighbour once more, on the best connection that there is now.

        The earlier stream is answered until it ends. Nothing happens if it is no neighbour.

        Raises
        ------
        RemoteError
            It does not answer; the earlier stream stays in use.
        """
        if peer_id in self._table:
            await self._say_hello(peer_id, timeout_s)

    async def _say_hello(self, peer_id: str, timeout_s: float) -> Neighbour:
        stream = await self._host.open_stream(peer_id, wire_limits.PROTOCOL_ID, timeout_s)
        neighbour = Neighbour(peer_id, stream, self._answers.to(peer_id), self)
        try:
            await neighbour.greet(self._hello())
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await neighbour.close()
            raise
        if not self._take_place(neighbour, dialled=True):
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await neighbour.close(wire.Bye(wire_limits.CODE_TOO_MANY, "too many neighbours"))
            raise NoSource(f"{MAX_NEIGHBOURS} neighbours already")
        assert self._nursery is not None, "meet() before run()"
        self._add(neighbour)
        self._nursery.start_soon(self._keep, neighbour)
        return neighbour

    async def _accept(self, peer_id: str, stream: Stream) -> None:
        neighbour = Neighbour(peer_id, stream, self._answers.to(peer_id), self)
        try:
            await neighbour.greet(self._hello())
        except RemoteError:
            await neighbour.close()
            return
        if not self._take_place(neighbour, dialled=False):
            await neighbour.close(wire.Bye(wire_limits.CODE_TOO_MANY, "too many neighbours"))
            return
        self._add(neighbour)
        await self._keep(neighbour)

    def _add(self, neighbour: Neighbour) -> None:
        peer_id = neighbour.peer_id
        earlier = self._table.get(peer_id)
        is_new = earlier is None
        if earlier is not None and not earlier.is_closed:
            # Both dialled at once. The later stream is used, the earlier is answered until it
            # ends, and what the peer asked to hear of on either counts for both.
            neighbour.interests, neighbour.asked = earlier.interests, earlier.asked
            neighbour.earlier, earlier.earlier = earlier, None
        self._table[peer_id] = neighbour
        self._held.setdefault(peer_id, ObjectSet())
        if is_new:
            for listener in list(self.joined):
                listener(peer_id)

    async def _keep(self, neighbour: Neighbour) -> None:
        try:
            await neighbour.run()
        finally:
            earlier, neighbour.earlier = neighbour.earlier, None
            if self._table.get(neighbour.peer_id) is not neighbour:
                pass
            elif earlier is not None and not earlier.is_closed:
                self._table[neighbour.peer_id] = earlier
            else:
                del self._table[neighbour.peer_id]
                self._held.pop(neighbour.peer_id, None)
                self._gave_at.pop(neighbour.peer_id, None)
                self._dialled.discard(neighbour.peer_id)
                self._places.left(self._numbers.pop(neighbour.peer_id, 0))
                for listener in list(self.left):
                    listener(neighbour.peer_id)

    # ---- what neighbours say, and what we tell them (the Owner of each Neighbour)

    def on_have(self, peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        """Remember who holds what, and pass it on."""
        held = self._held.get(peer_id)
        if held is not None and len(held) + len(entries) <= MAX_HELD_DIGESTS:
            held.add(entry.digest for entry in entries)
        for listener in list(self.have_listeners):
            listener(peer_id, entries)

    def on_have_model(self, peer_id: str, message: wire.HaveModel, table: ObjectTable) -> None:
        """Remember who holds what of a model, and pass it on."""
        held = self._held.get(peer_id)
        if held is not None:
            known = held.part_of(message.model, table)
            for run in message.runs():
                known.add_run(*run)
            for index, proved in message.parts:
                known.add(index, proved)
            held.forget_oldest(MAX_HELD_MODELS)
        for listener in list(self.have_model_listeners):
            listener(peer_id, message)

    def peers_for(self, digest: bytes, asker: str) -> list[wire.PeerEntry]:
        """Return neighbours that hold or want an object; any, for an empty digest."""
        if digest and not self._answers.to(asker).may_have(digest):
            return []
        return [
            wire.PeerEntry(peer_id, self._addrs_of(neighbour)[: wire_limits.MAX_PEER_ADDRS])
            for peer_id, neighbour in self._table.items()
            if peer_id != asker
            and neighbour.hello.addrs
            and (
                not digest or digest in neighbour.interests or digest in self._held.get(peer_id, ())
            )
        ]

    def _addrs_of(self, neighbour: Neighbour) -> tuple[str, ...]:
        """Return where a neighbour says it is: a relay it found since hello comes first."""
        known = self._host.addrs_of(neighbour.peer_id)
        circuits = [addr for addr in known if is_circuit(addr)]
        return tuple(dict.fromkeys((*circuits, *neighbour.hello.addrs)))

    def on_offer(self, peer_id: str, message: wire.Offer | wire.Pass) -> None:
        """Pass on an upload that a neighbour offers, or does not take from us."""
        for listener in list(self.offer_listeners):
            listener(peer_id, message)

    def on_want(self, peer_id: str) -> None:
        """Pass on that a neighbour has begun to want something."""
        for listener in list(self.want_listeners):
            listener(peer_id)

    def tell(self, entries: Iterable[wire.HaveEntry]) -> None:
        """Tell every neighbour the news it asked to hear, each at the pace it reads."""
        news = list(entries)
        placed: dict[bytes, list[tuple[bytes, int, bytes | None]]] = {}
        if len(self._told_whole) <= MAX_TOLD_DIGESTS:
            self._told_whole.update(entry.digest for entry in news if entry.bitmap is None)
        for neighbour in self.all():
            may_have = self._answers.to(neighbour.peer_id).may_have
            wanted = [
                entry
                for entry in news
                if neighbour.interests.names(entry.digest) and may_have(entry.digest)
            ]
            if wanted:
                neighbour.tell(wanted)
            for model, table, chosen in neighbour.interests.models():
                if model not in placed:  # the same for all who want the model
                    placed[model] = _places(table, news)
                told = [
                    (index, proved)
                    for digest, index, proved in placed[model]
                    if index in chosen and may_have(digest)
                ]
                if told:
                    held = self._held[neighbour.peer_id].of_model(model)
                    is_known = held is not None and all(held.covers(*each) for each in told)
                    neighbour.tell_model(model, len(table), told, is_known=is_known)

    def take_told_whole(self) -> set[bytes]:
        """Return which objects were told to be whole since the last call, or most of them."""
        told, self._told_whole = self._told_whole, set()
        return told

    async def wait_told(self) -> None:
        """Wait until every neighbour has been told all news."""
        async with trio.open_nursery() as nursery:
            for neighbour in self.all():
                nursery.start_soon(neighbour.wait_told)


def _places(
    table: ObjectTable, news: Iterable[wire.HaveEntry]
) -> list[tuple[bytes, int, bytes | None]]:
    """Return digest, index and bitmap of what can be told by a model's manifest."""
    places = []
    for digest, size_bytes, proved, chunk_list in news:
        index = table.find(digest)
        if index < 0 or size_bytes != table.sizes[index]:
            continue
        if proved is not None:
            proved = held_part(table, index, size_bytes, proved, chunk_list)
            if proved is None:
                continue
        places.append((digest, index, proved))
    return places
