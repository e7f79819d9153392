"""Streams between hosts: cancelled, closed, reset, and cut off."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from tensorswarm.p2p.host import guard as host_guard
from tensorswarm.p2p.host import stream as host_stream
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.errors import LocalError, NoSource, RemoteError
from tests.support.hosts import (
    ECHO,
    HERE,
    receive,
    run,
    two_hosts,
)

# ---- streams


def test_a_cancelled_receive_loses_nothing() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO)
            for _ in range(20):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await stream.receive_some()
            for number in range(50):
                message = str(number).encode()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.receive_some)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
                await stream.send(message)
                assert await receive(stream, len(message)) == message

    run(main)


def test_a_cancelled_send_is_still_sent_and_harms_no_other_stream() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            may_read = trio.Event()
            received = bytearray()
            ended = trio.Event()

            async def read_later(_peer_id: str, stream: Stream) -> None:
                await may_read.wait()
                while data := await stream.receive_some():
                    received.extend(data)
                ended.set()

            b.set_handler("/test/later/1", read_later)
            stream = await a.open_stream(b.peer_id, "/test/later/1")
            message = os.urandom(1_000_000)  # more than the window of 256 KiB
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, message)
                other = await a.open_stream(b.peer_id, ECHO)
                nursery.cancel_scope.cancel()
            await other.send(b"hello")
            assert await receive(other, 5) == b"hello"
            may_read.set()
            await stream.send(b"tail")
            await stream.aclose()
            await ended.wait()
            assert bytes(received) == message + b"tail"

    run(main)


def test_several_tasks_may_send_and_their_bytes_stay_together() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO)
            blocks = [bytes([number]) * 100_000 for number in range(8)]
            async with trio.open_nursery() as nursery:
                for block in blocks:
                    nursery.start_soon(stream.send, block)
                got = await receive(stream, 800_000)
            assert sorted(got[i : i + 100_000] for i in range(0, len(got), 100_000)) == blocks

    run(main)


def test_last_words_are_sent_although_all_is_cancelled() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as listener:
            heard = bytearray()
            ended = trio.Event()

            async def hear(_peer_id: str, stream: Stream) -> None:
                while data := await stream.receive_some():
                    heard.extend(data)
                ended.set()

            listener.set_handler("/test/hear/1", hear)
            with trio.CancelScope() as everything:
                async with Host() as speaker:
                    await speaker.connect(listener.addrs()[0])
                    stream = await speaker.open_stream(listener.peer_id, "/test/hear/1")
                    everything.cancel()
                    with trio.CancelScope(shield=True):
                        await stream.send(b"goodbye")
                        await stream.aclose()
                        await ended.wait()
                    await trio.sleep_forever()
            assert bytes(heard) == b"goodbye"

    run(main)


def test_only_one_task_may_receive() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive_some)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(LocalError, match="two tasks"):
                    await stream.receive_some()
                nursery.cancel_scope.cancel()

    run(main)


def test_a_closed_stream_ends_and_stays_ended() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):

            async def say_hello(_peer_id: str, stream: Stream) -> None:
                await stream.send(b"hello")

            b.set_handler("/test/hello/1", say_hello)
            stream = await a.open_stream(b.peer_id, "/test/hello/1")
            assert await receive(stream, 5) == b"hello"
            assert await stream.receive_some() == b""
            assert await stream.receive_some() == b""
            await stream.aclose()
            await stream.aclose()
            for use in (stream.receive_some, lambda: stream.send(b"x")):
                with pytest.raises(NoSource, match="is closed"):
                    await use()

    run(main)


def test_closing_ends_the_receiving_of_another_task() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            for end in (Stream.aclose, Stream.abort):
                stream = await a.open_stream(b.peer_id, ECHO)

                async def expect_the_end(stream: Stream = stream) -> None:
                    with pytest.raises(NoSource, match="closed while waiting"):
                        await stream.receive_some()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(expect_the_end)
                    await trio.testing.wait_all_tasks_blocked()
                    ending = end(stream)
                    if ending is not None:
                        await ending

    run(main)


def test_a_peer_that_never_closes_its_side_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_stream, "LINGER_S", 0.01)

    async def main() -> None:
        async with two_hosts() as (a, b):
            outcome: list[str] = []
            ended = trio.Event()

            async def hold_on(_peer_id: str, stream: Stream) -> None:
                assert await stream.receive_some() == b""
                try:
                    while True:
                        await stream.send(b"more")
                except RemoteError as error:
                    outcome.append(str(error))
                    ended.set()

            b.set_handler("/test/hold/1", hold_on)
            stream = await a.open_stream(b.peer_id, "/test/hold/1")
            await stream.aclose()
            await ended.wait()
            assert "does not take what is sent" in outcome[0]

    run(main)


def test_a_reset_is_an_error_at_the_other_end() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):

            async def reset(_peer_id: str, stream: Stream) -> None:
                await stream.receive_some()
                stream.abort()

            b.set_handler("/test/reset/1", reset)
            stream = await a.open_stream(b.peer_id, "/test/reset/1")
            await stream.send(b"x")
            with pytest.raises(NoSource, match="reset by"):
                await stream.receive_some()
            with pytest.raises(NoSource, match="reset by"):
                await stream.receive_some()

    run(main)


@pytest.mark.parametrize("error", [ValueError("a bug"), NoSource("the peer's fault")])
def test_a_failing_handler_costs_its_stream_alone(error: Exception) -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):

            async def fail(_peer_id: str, stream: Stream) -> None:
                await stream.receive_some()
                raise error

            b.set_handler("/test/fail/1", fail)
            stream = await a.open_stream(b.peer_id, "/test/fail/1")
            await stream.send(b"x")
            with pytest.raises(NoSource, match="reset by"):
                await stream.receive_some()
            good = await a.open_stream(b.peer_id, ECHO)
            await good.send(b"hello")
            assert await receive(good, 5) == b"hello"

    run(main)


# ---- connections that end


VICTIM = """
import sys, trio
from tensorswarm.p2p.host.host import Host

async def main():
    async def hold(peer_id, stream):
        await stream.send(b"here")
        await trio.sleep_forever()

    async with Host(listen=["127.0.0.1:0"]) as host:
        host.set_handler("/test/hold/1", hold)
        print(host.addrs()[0], flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def victim() -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """Run another host in a process of its own, to be ill-treated."""
    command = [sys.executable, "-c", VICTIM]
    process = await trio.to_thread.run_sync(
        lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    )
    try:
        assert process.stdout is not None
        address = await trio.to_thread.run_sync(process.stdout.readline)
        yield process, address.strip()
    finally:
        process.kill()
        process.communicate()


def test_a_read_ends_when_the_other_host_is_killed() -> None:
    async def main() -> None:
        async with victim() as (process, address), Host() as host:
            peer_id = await host.connect(address)
            stream = await host.open_stream(peer_id, "/test/hold/1")
            assert await receive(stream, 4) == b"here"
            async with trio.open_nursery() as nursery:

                async def expect_the_end() -> None:
                    with pytest.raises(NoSource, match="lost the connection"):
                        await stream.receive_some()

                nursery.start_soon(expect_the_end)
                await trio.testing.wait_all_tasks_blocked()
                process.kill()
            assert not host.is_connected(peer_id)
            assert host.connected() == ()
            with pytest.raises(NoSource, match=r"lost the connection|does not take"):
                await stream.send(b"x")

    run(main)


def test_closing_does_not_wait_for_a_peer_that_is_frozen() -> None:
    async def main() -> None:
        async with victim() as (process, address):
            async with Host() as host, trio.open_nursery() as nursery:
                peer_id = await host.connect(address)
                # 32 windows of 256 KiB: more than the kernel buffers for one connection.
                streams = [await host.open_stream(peer_id, "/test/hold/1") for _ in range(32)]
                process.send_signal(signal.SIGSTOP)
                for stream in streams:
                    nursery.start_soon(stream.send, bytes(1 << 18))
                await trio.testing.wait_all_tasks_blocked(0.1)
                (conn,) = host._swarm.get_connections()
                sock = host_guard.socket_of(conn)
                assert sock is not None
                nursery.cancel_scope.cancel()
                begun = trio.current_time()
            assert trio.current_time() - begun < 20
            assert sock.fileno() == -1

    run(main)


def test_disconnecting_ends_streams_at_both_ends() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            outcome: list[str] = []
            ended = trio.Event()

            async def hold(_peer_id: str, stream: Stream) -> None:
                await stream.send(b"here")
                try:
                    await stream.receive_some()
                except RemoteError as error:
                    outcome.append(str(error))
                    ended.set()

            b.set_handler("/test/hold/1", hold)
            stream = await a.open_stream(b.peer_id, "/test/hold/1")
            await receive(stream, 4)
            await a.disconnect(b.peer_id)
            assert a.connected() == ()
            with pytest.raises(NoSource, match="lost the connection"):
                await stream.receive_some()
            await ended.wait()
            assert "lost the connection" in outcome[0]
            await a.disconnect(b.peer_id)  # twice does no harm
            await a.connect(b.addrs()[0])
            assert a.connected() == (b.peer_id,)

    run(main)


def test_a_vanished_peer_is_given_up_by_the_kernel() -> None:
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        pytest.skip("this system has no TCP_USER_TIMEOUT")

    async def main() -> None:
        async with two_hosts() as (a, b):
            await (await a.open_stream(b.peer_id, ECHO)).aclose()
            for host in (a, b):
                (conn,) = host._swarm.get_connections()
                sock = host_guard.socket_of(conn)
                assert sock is not None
                timeout_ms = sock.getsockopt(socket.IPPROTO_TCP, option)
                assert timeout_ms == host_guard.UNANSWERED_TIMEOUT_S * 1000

    run(main)


def test_windows_are_told_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after each message; and enough is told that a sender never waits for nothing."""
    told: list[int] = []
    real = YamuxStream.send_window_update

    async def note(self: YamuxStream, increment: int, skip_lock: bool = False) -> None:
        told.append(increment)
        await real(self, increment, skip_lock)

    monkeypatch.setattr(YamuxStream, "send_window_update", note)

    async def main() -> None:
        async with two_hosts() as (a, b):
            stream = await a.open_stream(b.peer_id, ECHO)
            for number in range(200):
                await stream.send(b"%8d" % number)
                assert await receive(stream, 8) == b"%8d" % number
            assert not told
            sent = bytes(range(256)) * 8192  # 2 MiB: eight windows, each way

            async def send() -> None:
                for start in range(0, len(sent), 50_000):
                    await stream.send(sent[start : start + 50_000])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert await receive(stream, len(sent)) == sent
            assert told
            assert min(told) >= 128 << 10

    run(main)
