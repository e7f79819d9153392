"""Hosts for tests: connected pairs, an echo, and a deadline for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from tensorswarm.p2p.host.host import Host, Stream

ECHO = "/test/echo/1"
HERE = "127.0.0.1:0"
PATIENCE_S = 20
"""What no wait in these tests comes near; a test that hangs ends with an error."""

NOBODY = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        with trio.fail_after(PATIENCE_S):
            await main()

    trio.run(in_time)


async def echo(_peer_id: str, stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send(data)


@asynccontextmanager
async def two_hosts() -> AsyncIterator[tuple[Host, Host]]:
    """Two connected hosts; the second echoes."""
    async with Host(listen=[HERE]) as a, Host(listen=[HERE]) as b:
        b.set_handler(ECHO, echo)
        await a.connect(b.addrs()[0])
        yield a, b


class _CancelAtStep(trio.abc.Instrument):
    """Cancel a scope when so many steps of any task have been taken."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if not self._left:
            self._scope.cancel()


async def cancel_at_every_step(enter: Callable[[], AbstractAsyncContextManager[object]]) -> int:
    """Cancel what is entered at many a step of its start, until it is up; return which.

    Whatever the step, it ends, and with nothing but the cancellation.
    """
    steps = 0
    is_up = False

    while not is_up:
        steps += 1 + steps // 20
        with trio.CancelScope() as scope:
            instrument = _CancelAtStep(scope, steps)
            trio.lowlevel.add_instrument(instrument)
            async with enter():
                is_up = True
                scope.cancel()
                await trio.sleep_forever()
        trio.lowlevel.remove_instrument(instrument)
    return steps


async def assert_serves(host: Host) -> None:
    """Check that a newcomer can connect to a host and talk with it."""
    host.set_handler(ECHO, echo)
    async with Host() as newcomer:
        await newcomer.connect(host.addrs()[-1])
        stream = await newcomer.open_stream(host.peer_id, ECHO)
        await stream.send(b"still there?")
        assert await receive(stream, 12) == b"still there?"


async def receive(stream: Stream, count: int) -> bytes:
    got = b""
    while len(got) < count:
        data = await stream.receive_some()
        assert data, f"the stream ended after {len(got)} of {count} bytes"
        got += data
    return got
