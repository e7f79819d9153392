"""What a host survives: garbage at its port, floods, and peers that break the rules."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tensorswarm.p2p.host import door
from tensorswarm.p2p.host import host as host_module
from tensorswarm.p2p.host.addresses import tcp_host
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.errors import NoSource
from tests.support.hosts import (
    ECHO,
    HERE,
    NOBODY,
    assert_serves,
    echo,
    receive,
    run,
    two_hosts,
)

# ---- what comes at an open port


def _garbage(place: tuple[str, int]) -> None:
    for data in (b"\0" * 4096, b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 11, os.urandom(4096)):
        with socket.create_connection(place) as sock:
            sock.sendall(data)


def _hello_and_garbage(place: tuple[str, int]) -> None:
    hello = b"\x13/multistream/1.0.0\n"
    for data in (
        b"\x04\xff\xfe\xfd\n",
        b"\x07/noise\n" + os.urandom(500),
        b"\xff" * 20,
        b"\x07/no",
    ):
        with socket.create_connection(place) as sock:
            sock.sendall(hello + data)
            sock.shutdown(socket.SHUT_WR)
            while _received(sock):
                pass


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


def _connect_and_close(place: tuple[str, int]) -> None:
    for _ in range(20):
        socket.create_connection(place).close()


def _reset(place: tuple[str, int]) -> None:
    for data in (b"", b"\x13/multistream/1.0.0\n", b"\x13/multistream/1.0.0\n\x07/noise\n\0\x20"):
        sock = socket.create_connection(place)
        sock.sendall(data)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


def _hundred_half_open(place: tuple[str, int]) -> None:
    socks = [socket.create_connection(place) for _ in range(100)]
    for sock in socks[::2]:
        sock.sendall(b"\x13/multi")
    _half_open.extend(socks)  # kept open while the test goes on


_half_open: list[socket.socket] = []


@pytest.mark.parametrize(
    "attack", [_garbage, _hello_and_garbage, _connect_and_close, _reset, _hundred_half_open]
)
def test_a_host_survives_what_comes_at_its_port(attack: Callable[[tuple[str, int]], None]) -> None:
    async def main() -> None:
        try:
            async with Host(listen=[HERE]) as host:
                await trio.to_thread.run_sync(attack, tcp_host(host.addrs()[0]))
                await assert_serves(host)
                assert len(host.connected()) <= 1  # the newcomer's goodbye may be under way
        finally:
            for sock in _half_open:
                sock.close()
            _half_open.clear()

    run(main)


def test_many_peers_may_connect() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as hub:
            hub.set_handler(ECHO, echo)
            async with trio.open_nursery() as nursery:

                async def visit(task_status: Any) -> None:
                    async with Host() as visitor:
                        await visitor.connect(hub.addrs()[0])
                        stream = await visitor.open_stream(hub.peer_id, ECHO)
                        await stream.send(b"hello")
                        assert await receive(stream, 5) == b"hello"
                        task_status.started()
                        await trio.sleep_forever()

                for _ in range(40):
                    await nursery.start(visit)
                assert len(hub.connected()) == 40
                nursery.cancel_scope.cancel()

    run(main)


def test_a_protocol_name_that_is_not_text_does_not_stop_the_host() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            (peer,) = a._swarm.connections
            for name in (b"\x04\xff\xfe\xfd\n", b"\x01x", b"\xff" * 10):
                raw = await a._swarm.new_stream(peer)
                await raw.write(b"\x13/multistream/1.0.0\n" + name)
                stream = Stream(raw, a._nursery)  # type: ignore[arg-type]
                with pytest.raises(NoSource, match="reset by"):
                    while await stream.receive_some():
                        pass
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


def test_a_background_operation_that_fails_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            finished = trio.Event()

            async def fail() -> None:
                finished.set()
                raise ValueError("a bug of ours")

            b.start_soon(fail)
            await finished.wait()
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)
    assert "a background operation failed" in caplog.text


def test_a_failing_task_of_libp2p_ends_alone() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            finished = trio.Event()

            async def fail() -> None:
                finished.set()
                raise ValueError("something libp2p did not expect")

            b._swarm.manager.run_task(fail)
            await finished.wait()
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


def test_one_peer_cannot_open_streams_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_STREAMS_PER_PEER", 5)

    async def main() -> None:
        async with two_hosts() as (a, b):
            streams = []
            with pytest.raises(NoSource):
                for _ in range(10):
                    streams.append(await a.open_stream(b.peer_id, ECHO))
            assert 3 <= len(streams) <= 5  # identify may hold one at this moment
            async with Host() as other:
                await other.connect(b.addrs()[0])
                stream = await other.open_stream(b.peer_id, ECHO)
                await stream.send(b"hello")
                assert await receive(stream, 5) == b"hello"

    run(main)


def test_a_peer_that_ignores_flow_control_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "WATCH_INTERVAL_S", 0.01)
    monkeypatch.setattr(host_module, "MAX_BUFFERED_BYTES", 2 << 20)

    async def main() -> None:
        async with two_hosts() as (a, b):

            async def never_read(_peer_id: str, stream: Stream) -> None:
                await trio.sleep_forever()

            b.set_handler("/test/never/1", never_read)
            stream = await a.open_stream(b.peer_id, "/test/never/1")
            stream._net.muxed_stream.send_window = 1 << 40  # type: ignore[attr-defined]
            with pytest.raises(NoSource):
                while True:
                    await stream.send(bytes(1 << 16))
            await assert_serves(b)

    run(main)


def test_libp2p_leaves_the_root_logger_and_stderr_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)

    async def main() -> None:
        async with two_hosts() as (a, b):
            with pytest.raises(NoSource):
                await a.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
            await trio.to_thread.run_sync(_garbage, tcp_host(b.addrs()[0]))
            await a.disconnect(b.peer_id)

    run(main)
    assert logging.getLogger().handlers == before
    assert capfd.readouterr().err == ""
