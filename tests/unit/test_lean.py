"""The leaner ways through py-libp2p: locks without a turn of the loop, reads ahead."""

from __future__ import annotations

import random

import trio
import trio.testing
from libp2p.io.trio import TrioTCPStream

from tensorswarm.p2p.host.lean import READ_AHEAD_BYTES, QuickLock, make_lean


def test_a_free_lock_is_taken_without_giving_way() -> None:
    async def main() -> None:
        lock = QuickLock()
        turns: list[str] = []

        async def other() -> None:
            turns.append("other")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            async with lock:
                turns.append("first")
            async with lock.write_lock():
                turns.append("second")
        assert turns == ["first", "second", "other"]

    trio.run(main)


def test_waiters_get_the_lock_in_the_order_of_asking_and_never_two_at_once() -> None:
    async def main() -> None:
        lock = QuickLock()
        inside = 0
        order: list[int] = []

        async def one(number: int) -> None:
            nonlocal inside
            async with lock:
                inside += 1
                assert inside == 1
                order.append(number)
                await trio.testing.wait_all_tasks_blocked()
                inside -= 1

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(one, number)
                await trio.testing.wait_all_tasks_blocked()
        assert order == [0, 1, 2, 3, 4]

    trio.run(main)


def test_a_waiter_that_is_cancelled_does_not_keep_the_lock() -> None:
    async def main() -> None:
        lock = QuickLock()
        entered = trio.Event()

        async def waiter(scope: trio.CancelScope) -> None:
            with scope:
                async with lock:
                    raise AssertionError("it was held")

        async def later() -> None:
            async with lock:
                entered.set()

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiter, scope)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(later)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert not entered.is_set()
            await entered.wait()
        async with lock:  # free again
            pass

    trio.run(main)


def test_reads_of_any_size_give_the_same_bytes_and_then_the_end() -> None:
    make_lean()
    rng = random.Random(4)
    sent = rng.randbytes(5 * READ_AHEAD_BYTES + 123)

    async def main() -> bytes:
        ours, theirs = await _connected()
        got = bytearray()

        async def send() -> None:
            await theirs.send_all(sent)
            await theirs.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            stream = TrioTCPStream(ours)
            assert await stream.read(0) == b""
            while True:
                size = rng.choice((1, 2, 12, 300, 2 * READ_AHEAD_BYTES, None))
                part = await stream.read(size)
                assert size is None or len(part) <= size
                if not part:
                    break
                got += part
            assert await stream.read(2) == b""
        await stream.close()
        return bytes(got)

    assert trio.run(main) == sent


async def _connected() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        ours = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await listener.accept()
    return ours, theirs
