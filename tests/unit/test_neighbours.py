"""The table of neighbours: one peer on two streams, and news for those who read slowly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import memory_stream_pair

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.p2p.control.answers import Answers
from tensorswarm.p2p.control.neighbour import BLOB_REQUESTS_AHEAD, Neighbour
from tensorswarm.p2p.control.neighbours import Neighbours
from tensorswarm.p2p.control.outbox import MAX_NOTICES, Outbox
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import NoSource, ProtocolError
from tensorswarm.store.store import Store
from tests.support.store_world import DEADLINE_S

ME = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
PEER = "12D3KooWH3uVF6wv47WnArKHk5p6cvgCJEb74UTmxztmQDc298L3"
MODEL = bytes(range(32))


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

    def __init__(self) -> None:
        self.accept: Callable[[str, Stream], Awaitable[None]]

    def set_handler(self, _protocol: str, handler: Callable[[str, Stream], Any]) -> None:
        self.accept = handler


class Heard:
    """What a peer at the other end hears of us."""

    def __init__(self) -> None:
        self.entries: list[wire.HaveEntry] = []
        self.notices: list[wire.Offer | wire.Pass] = []

    def on_have(self, _peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        self.entries += entries

    def on_offer(self, _peer_id: str, message: wire.Offer | wire.Pass) -> None:
        self.notices.append(message)

    def peers_for(self, _digest: bytes, _asker: str) -> list[wire.PeerEntry]:
        return []


def hello() -> wire.Hello:
    return wire.Hello(1, "test", (), (), ())


class World:
    """Our table of neighbours, and one peer that opens streams to us."""

    def __init__(self, store: Store, nursery: trio.Nursery) -> None:
        self.store = store
        self.host = FakeHost()
        self.answers = Answers(store)
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


def in_world(store_folder: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with Store(store_folder) as store, trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                world = World(store, nursery)
                await nursery.start(world.ours.run)
                await test(world)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_what_is_asked_on_either_of_two_streams_counts(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        first = await world.dial()
        await first.want([MODEL])
        second = await world.dial()
        await second.get_peers(b"")  # answered: so it is in the table
        assert world.ours.wanting(MODEL) == [PEER]
        world.ours.tell([wire.HaveEntry(MODEL, 5, None, b"")])
        await second.unwant([MODEL])
        await second.get_peers(b"")
        assert world.ours.wanting(MODEL) == []

    in_world(tmp_path, test)


def test_a_peer_stays_while_one_of_its_streams_does(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        has_left = trio.Event()
        world.ours.left.append(lambda _peer_id: has_left.set())
        first = await world.dial()
        await first.get_peers(b"")
        second = await world.dial()
        await second.want([MODEL])
        later = world.ours.get(PEER)
        await second.close()
        while world.ours.get(PEER) is later:
            await trio.lowlevel.checkpoint()
        assert world.ours.wanting(MODEL) == [PEER]
        assert not has_left.is_set()
        await first.close()
        await has_left.wait()
        assert not world.ours.all()

    in_world(tmp_path, test)


def test_who_reads_nothing_keeps_nobody_from_the_news(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        other = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
        slow = await world.dial()
        await slow.want([MODEL])
        world.latest.is_stuck = True
        quick = await world.dial(other)
        await quick.want([MODEL])
        for bits in (b"\x01", b"\x03", b"\x07"):
            news = wire.HaveEntry(MODEL, 3 << 20, bits, MODEL)
            world.ours.tell([news])
            while news not in world.heard.entries:
                await trio.lowlevel.checkpoint()

    in_world(tmp_path, test)


def test_news_of_an_object_replaces_older_news_of_it_and_notices_go_first() -> None:
    async def main() -> None:
        box = Outbox()
        await box.wait_sent()
        old, new = wire.HaveEntry(MODEL, 9, b"\1", MODEL), wire.HaveEntry(MODEL, 9, b"\3", MODEL)
        box.add_news([old])
        box.add_news([new])
        for chunk in range(2 * MAX_NOTICES):
            box.add_notice(wire.Offer(MODEL, chunk))
        *notices, have = await box.take()
        assert have == wire.Have(0, (new,), last=True)
        assert notices == [wire.Offer(MODEL, c) for c in range(MAX_NOTICES, 2 * MAX_NOTICES)]
        box.add_news([old])
        box.sent()
        with trio.move_on_after(0):
            await box.wait_sent()
            raise AssertionError("there is more to send")
        await box.take()
        box.sent()
        await box.wait_sent()

    trio.run(main)


# ---- many questions at once


def test_many_blobs_are_asked_for_in_several_requests_at_a_time(tmp_path: Path) -> None:
    blobs = [b"chunk list %d" % i for i in range(2 * wire_limits.MAX_BLOB_ITEMS + 5)]
    wanted = {digest_of(data): len(data) for data in blobs}

    async def test(world: World) -> None:
        end = await world.dial()
        world.store.note_chunk_lists(blobs)
        world.store.put_blob(b"the index has taken all that went before")
        unknown = digest_of(b"nobody has this")
        under_way = highest = 0
        asking = end._asking

        @asynccontextmanager
        async def counted(make: Callable[[int], wire.Request]) -> AsyncIterator[Any]:
            nonlocal under_way, highest
            async with asking(make) as frames:
                under_way += 1
                highest = max(highest, under_way)
                try:
                    yield frames
                finally:
                    under_way -= 1

        end._asking = counted  # type: ignore[method-assign]
        found = await end.get_blobs({**wanted, unknown: 10})
        assert found == {digest_of(data): data for data in blobs}
        assert 1 < highest <= BLOB_REQUESTS_AHEAD

    in_world(tmp_path / "store", test)


def test_a_blob_longer_than_said_ends_all_requests_with_one_error(tmp_path: Path) -> None:
    blobs = [b"chunk list %d" % i for i in range(3 * wire_limits.MAX_BLOB_ITEMS)]

    async def test(world: World) -> None:
        end = await world.dial()
        world.store.note_chunk_lists(blobs)
        world.store.put_blob(b"the index has taken all that went before")
        with pytest.raises(ProtocolError, match="not asked for like this"):
            await end.get_blobs({digest_of(data): 3 for data in blobs})

    in_world(tmp_path / "store", test)
