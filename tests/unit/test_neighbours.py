"""The table of neighbours: one peer on two streams, and news for those who read slowly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.p2p.control.holdings import Holdings
from tensorswarm.p2p.control.neighbour import BLOB_REQUESTS_AHEAD
from tensorswarm.p2p.control.outbox import KNOWN_NEWS_S, MAX_NOTICES, Outbox
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import ProtocolError
from tests.support.control_world import PEER, World, in_world

MODEL = bytes(range(32))


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


def test_a_neighbour_is_greeted_anew_on_a_better_connection(tmp_path: Path) -> None:
    """Nobody hears of its leaving, and what it asked on the old stream counts on the new."""

    async def test(world: World) -> None:
        left: list[str] = []
        world.ours.left.append(left.append)
        await world.ours.renew(PEER)  # it is no neighbour: nothing happens
        first = await world.dial()
        await first.want([MODEL])
        before = world.ours.get(PEER)
        renewed = await world.taken_in(world.ours.renew(PEER))
        assert world.ours.get(PEER) is not before
        assert world.ours.wanting(MODEL) == [PEER]
        await first.get_peers(b"")  # the old stream is answered still
        await first.close()
        news = wire.HaveEntry(MODEL, 5, None, b"")
        world.ours.tell([news])
        while news not in world.heard.entries:
            await trio.lowlevel.checkpoint()
        assert left == []
        await renewed.close()
        while world.ours.all():
            await trio.lowlevel.checkpoint()
        assert left == [PEER]

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


def test_news_that_a_neighbour_hardly_needs_goes_along_with_other_news_or_soon_by_itself() -> None:
    async def main() -> None:
        box = Outbox()

        async def took() -> list[int]:
            messages = await box.take()
            box.sent()
            models = [each for each in messages if isinstance(each, wire.HaveModel)]
            return [start for model in models for start, _ in model.runs()]

        begun = trio.current_time()
        box.add_model_news(MODEL, 9, [(2, None)], is_known=True)
        box.add_model_news(MODEL, 9, [(5, None)])
        assert await took() == [2, 5]
        assert trio.current_time() == begun
        async with trio.open_nursery() as nursery:  # also when it comes while `take` waits
            nursery.start_soon(box_later, box)
            assert await took() == [7]
            assert trio.current_time() == pytest.approx(begun + 0.5 + KNOWN_NEWS_S)
        box.add_model_news(MODEL, 9, [(3, None)], is_known=True)
        with trio.move_on_after(0):
            await box.wait_sent()  # the last news of a download waits for nothing
        begun = trio.current_time()
        assert await took() == [3]
        assert trio.current_time() == begun
        await box.wait_sent()

    async def box_later(box: Outbox) -> None:
        await trio.sleep(0.5)
        box.add_model_news(MODEL, 9, [(7, None)], is_known=True)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_news_can_wait_for_a_neighbour_that_has_all_of_it() -> None:
    held = Holdings(4, [0])
    held.add(1, b"\x05")
    assert held.covers(0, None) and held.covers(0, b"\xff")
    assert held.covers(1, b"\x04") and not held.covers(1, b"\x06") and not held.covers(1, None)
    assert not held.covers(2, b"\x01")


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
