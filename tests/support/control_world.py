"""A table of neighbours, and peers that open control streams to it in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import trio
from trio.testing import memory_stream_pair

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.control.access import Access
from tensorswarm.p2p.control.answers import Answers
from tensorswarm.p2p.control.neighbour import MODELS, Neighbour
from tensorswarm.p2p.control.neighbours import Neighbours
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.errors import NoSource
from tensorswarm.store.object_table import ObjectTable
from tensorswarm.store.store import Store

from .store_world import DEADLINE_S

ME = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"


class MemoryStream:
    """One end of a stream between two nodes, as `host.Stream` looks."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner
        self.is_stuck = False

    async def send(self, data: bytes) -> None:
        if self.is_stuck:
            await trio.sleep_forever()
        try:
            await self._inner.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise NoSource("the stream broke") from error

    async def receive_some(self) -> bytes:
        try:
            return bytes(await self._inner.receive_some(1 << 16))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise NoSource("the stream broke") from error

    async def aclose(self) -> None:
        await self._inner.aclose()


class FakeHost:
    """Hands streams to the table of neighbours, as if they came in from a peer."""

    peer_id = ME

    def remote_host(self, _peer_id: str) -> str | None:
        return "127.0.0.1"

    def __init__(self) -> None:
        self.accept: Callable[[str, Stream], Awaitable[None]]
        self.opened: list[trio.abc.Stream] = []

    def set_handler(self, _protocol: str, handler: Callable[[str, Stream], Any]) -> None:
        self.accept = handler

    async def open_stream(self, _peer_id: str, _protocol: str, _timeout_s: float) -> MemoryStream:
        """Open a stream to a peer; its end is left for `World.taken_in`."""
        here, there = memory_stream_pair()
        self.opened.append(there)
        return MemoryStream(here)


class Heard:
    """What a peer at the other end hears of us."""

    def __init__(self) -> None:
        self.entries: list[wire.HaveEntry] = []
        self.models: list[wire.HaveModel] = []
        self.notices: list[wire.Offer | wire.Pass] = []

    def on_have(self, _peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        self.entries += entries

    def on_have_model(self, _peer_id: str, message: wire.HaveModel, _table: ObjectTable) -> None:
        self.models.append(message)

    def on_offer(self, _peer_id: str, message: wire.Offer | wire.Pass) -> None:
        self.notices.append(message)

    def peers_for(self, _digest: bytes, _asker: str) -> list[wire.PeerEntry]:
        return []


def hello() -> wire.Hello:
    return wire.Hello(1, "test", (), (), (MODELS,))


class World:
    """Our table of neighbours, and one peer that opens streams to us."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.store = store
        self.host = FakeHost()
        self.answers = Answers(store, Access(store))
        self.ours = Neighbours(cast(Host, self.host), self.answers, hello)
        self.heard = Heard()
        self._nursery = nursery

    async def dial(self, peer_id: str = PEER) -> Neighbour:
        """Let a peer open one more stream to us; returns its end, in use."""
        here, there = memory_stream_pair()
        self.latest = MemoryStream(here)
        self._nursery.start_soon(self.host.accept, peer_id, cast(Stream, self.latest))
        end = Neighbour(ME, cast(Stream, MemoryStream(there)), self.answers, self.heard)
        await end.greet(hello())
        self._nursery.start_soon(end.run)
        return end

    async def taken_in(self, meeting: Awaitable[object]) -> Neighbour:
        """Let us open a stream to the peer; returns its end, in use."""

        async def meet() -> None:
            await meeting

        async with trio.open_nursery() as nursery:
            nursery.start_soon(meet)
            while not self.host.opened:
                await trio.lowlevel.checkpoint()
            stream = MemoryStream(self.host.opened.pop())
            end = Neighbour(ME, cast(Stream, stream), self.answers, self.heard)
            await end.greet(hello())
        self._nursery.start_soon(end.run)
        return end


def in_world(store_folder: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with Store(store_folder) as store, trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                world = World(store, nursery)
                await nursery.start(world.ours.run)
                await test(world)
                nursery.cancel_scope.cancel()

    trio.run(main)
