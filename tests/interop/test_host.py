"""Hosts on this machine: what they do for each other, and what they survive."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tensorswarm.p2p import host as host_module
from tensorswarm.p2p import host_guard, host_stream
from tensorswarm.p2p.addresses import PeerAddress, tcp_host
from tensorswarm.p2p.host import Host, Stream
from tensorswarm.store.errors import BadInput, LocalError, NoSource, RemoteError

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


# ---- the ordinary course


def test_two_hosts_talk() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            assert a.connected() == (b.peer_id,)
            stream = await a.open_stream(b.peer_id, ECHO)
            assert stream.peer_id == b.peer_id
            message = os.urandom(3_000_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, message)
                assert await receive(stream, len(message)) == message
            assert b.connected() == (a.peer_id,)
            assert a.remote_host(b.peer_id) == b.remote_host(a.peer_id) == "127.0.0.1"
            assert a.remote_host(NOBODY) is None

    run(main)


def test_addresses_have_real_ports_and_no_wildcards() -> None:
    async def main() -> None:
        async with Host(listen=["/ip4/0.0.0.0/tcp/0"], announce=["/dns4/me.example/tcp/9"]) as host:
            addrs = host.addrs()
            assert all(addr.endswith(f"/p2p/{host.peer_id}") for addr in addrs)
            places = [tcp_host(addr) for addr in addrs]
            assert places[0] == ("me.example", 9)
            assert places[-1][0] == "127.0.0.1"
            assert all(port > 0 for _, port in places)
            assert "0.0.0.0" not in dict(places)
            told = host.advertised_addrs()
            assert told[0] == "/dns4/me.example/tcp/9"
            assert not any("/p2p/" in addr for addr in told)
            if len(places) > 2:  # this machine has another interface than loopback
                assert "127.0.0.1" not in dict(map(tcp_host, told))

    run(main)


def test_a_host_that_does_not_listen_can_dial() -> None:
    async def main() -> None:
        async with Host() as client, Host(listen=[HERE]) as server:
            server.set_handler(ECHO, echo)
            assert client.addrs() == ()
            assert await client.connect(server.addrs()[0]) == server.peer_id
            stream = await client.open_stream(server.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_works_and_the_remote_host_is_seen() -> None:
    async def main() -> None:
        try:
            server = await Host(listen=["[::1]:0"]).__aenter__()
        except BadInput:
            pytest.skip("no IPv6 loopback on this machine")
        try:
            async with Host() as client:
                await client.connect(server.addrs()[0])
                assert client.remote_host(server.peer_id) == "::1"
        finally:
            await server.__aexit__(None, None, None)

    run(main)


def test_opening_a_stream_connects_where_an_address_is_known() -> None:
    async def main() -> None:
        async with Host() as a, Host(listen=[HERE]) as b:
            b.set_handler(ECHO, echo)
            port = tcp_host(b.addrs()[0])[1]
            a.add_peer_addrs(b.peer_id, ["/ip4/127.0.0.1/tcp/1", f"/dns4/localhost/tcp/{port}"])
            stream = await a.open_stream(b.peer_id, ECHO)
            await stream.send(b"hello")
            assert await receive(stream, 5) == b"hello"

    run(main)


def test_both_may_dial_at_once() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as a, Host(listen=[HERE]) as b:
            a.set_handler(ECHO, echo)
            b.set_handler(ECHO, echo)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(a.connect, b.addrs()[0])
                    nursery.start_soon(b.connect, a.addrs()[0])
            for one, other in ((a, b), (b, a)):
                stream = await one.open_stream(other.peer_id, ECHO)
                await stream.send(b"hello")
                assert await receive(stream, 5) == b"hello"

    run(main)


# ---- why a peer cannot be reached


def test_reasons_for_not_reaching_a_peer() -> None:
    async def main() -> None:
        async with Host() as a, Host(listen=[HERE]) as b:
            host, port = tcp_host(b.addrs()[0])
            with pytest.raises(NoSource, match="another id answers"):
                await a.connect(f"/ip4/{host}/tcp/{port}/p2p/{NOBODY}")
            with pytest.raises(NoSource, match="connection refused"):
                await a.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}")
            with pytest.raises(NoSource, match="no such host name"):
                await a.connect(f"/dns/no-such-host.invalid/tcp/1/p2p/{NOBODY}")
            with pytest.raises(NoSource, match="no address of it is known"):
                await a.open_stream(NOBODY, ECHO)
            with pytest.raises(NoSource, match="own address"):
                await b.connect(b.addrs()[0])
            with pytest.raises(BadInput, match="peer id is missing"):
                await a.connect("/ip4/127.0.0.1/tcp/1")
            await a.connect(b.addrs()[0])
            with pytest.raises(NoSource, match="does not speak that protocol"):
                await a.open_stream(b.peer_id, "/test/unheard-of/1")

    run(main)


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a peer of this network"), (None, "no answer")],
    ids=["another protocol", "silence"],
)
def test_what_answers_is_not_a_peer(greeting: bytes | None, reason: str) -> None:
    async def main() -> None:
        async def serve(stream: trio.SocketStream) -> None:
            if greeting is not None:
                await stream.send_all(greeting)
                return
            await trio.sleep_forever()

        async with Host() as a, trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(  # type: ignore[assignment]
                lambda task_status: trio.serve_tcp(
                    serve, 0, host="127.0.0.1", task_status=task_status
                )
            )
            port = listeners[0].socket.getsockname()[1]
            with pytest.raises(NoSource, match=reason):
                await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}", timeout_s=0.3)
            nursery.cancel_scope.cancel()

    run(main)


def test_of_several_addresses_one_that_answers_is_enough() -> None:
    async def main() -> None:
        silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
        try:
            async with Host() as a, Host(listen=[HERE]) as b:
                addrs = (
                    f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",
                    "/ip4/127.0.0.1/tcp/1",
                    f"/ip4/127.0.0.1/tcp/{tcp_host(b.addrs()[0])[1]}",
                )
                await a.connect_peer(PeerAddress(b.peer_id, addrs))
                assert a.connected() == (b.peer_id,)
        finally:
            silent.close()

    run(main)


# ---- listening


def test_a_busy_port_is_told_in_one_line() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as first:
            place = f"127.0.0.1:{tcp_host(first.addrs()[0])[1]}"
            with pytest.raises(BadInput, match="another program listens there") as caught:
                async with Host(listen=[place]):
                    raise AssertionError("two hosts listen on one port")
            assert "\n" not in str(caught.value)
        async with Host(listen=[place]):  # free again as soon as the first has closed
            pass

    run(main)


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    async def main() -> None:
        with pytest.raises(BadInput, match="not an address of this machine"):
            async with Host(listen=["203.0.113.1:0"]):
                pass

    run(main)


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

            async def fail(_peer_id: str, _stream: Stream) -> None:
                raise error

            b.set_handler("/test/fail/1", fail)
            stream = await a.open_stream(b.peer_id, "/test/fail/1")
            with pytest.raises(NoSource, match="reset by"):
                await stream.receive_some()
            good = await a.open_stream(b.peer_id, ECHO)
            await good.send(b"hello")
            assert await receive(good, 5) == b"hello"

    run(main)


# ---- connections that end


VICTIM = """
import sys, trio
from tensorswarm.p2p.host import Host

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


def test_a_read_ends_when_the_other_host_is_killed() -> None:
    async def main() -> None:
        process = await trio.to_thread.run_sync(
            lambda: subprocess.Popen(
                [sys.executable, "-c", VICTIM], stdout=subprocess.PIPE, text=True
            )
        )
        try:
            assert process.stdout is not None
            address = (await trio.to_thread.run_sync(process.stdout.readline)).strip()
            async with Host() as host:
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
        finally:
            process.kill()
            process.communicate()

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
    monkeypatch.setattr(host_guard, "MAX_INBOUND_STREAMS_PER_PEER", 5)

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


# ---- closing


def test_closing_is_quick_with_open_streams_and_deaf_peers() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b), trio.open_nursery() as nursery:

            async def never_read(_peer_id: str, stream: Stream) -> None:
                await trio.sleep_forever()

            async def send_until_closed(stream: Stream) -> None:
                with pytest.raises(NoSource):
                    await stream.send(bytes(10_000_000))

            b.set_handler("/test/never/1", never_read)
            async with Host(listen=[HERE]) as third:
                await third.connect(b.addrs()[0])
                for _ in range(3):
                    stream = await third.open_stream(b.peer_id, "/test/never/1")
                    nursery.start_soon(send_until_closed, stream)
                await trio.testing.wait_all_tasks_blocked()
                begun = trio.current_time()
            assert trio.current_time() - begun < 2
            with pytest.raises(NoSource):
                await third.open_stream(a.peer_id, ECHO)

    run(main)


def test_errors_leave_a_host_as_they_are() -> None:
    async def main() -> None:
        with pytest.raises(KeyError):  # and not an ExceptionGroup with one in it
            async with two_hosts():
                raise KeyError("the body's own")
        with trio.move_on_after(0.05) as scope:
            async with two_hosts():
                await trio.sleep_forever()
        assert scope.cancelled_caught

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


# ---- what is remembered of peers


def test_the_peer_store_keeps_whoever_matters_and_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr

    monkeypatch.setattr(host_guard, "MAX_KNOWN_PEERS", 50)

    async def main() -> None:
        async with Host(listen=[HERE]) as host:
            store = host._peerstore
            for number in range(200):
                peer = ID(b"\x12\x20" + number.to_bytes(32, "big"))
                store.add_addrs(peer, [Multiaddr("/ip4/8.8.8.8/tcp/1")])
            assert len(store.peer_ids()) <= 51
            assert store.privkey(host._libp2p.get_id())  # stock py-libp2p forgets itself first
            many = [Multiaddr(f"/ip4/8.8.8.8/tcp/{port}") for port in range(1, 1000)]
            store.add_addrs(peer, many)
            assert len(store.addrs(peer)) <= host_guard.MAX_ADDRS_PER_PEER
            stranger = ID(b"\x12\x20" + bytes(32))
            store.add_addrs(stranger, [Multiaddr("/ip4/127.0.0.1/tcp/22")])
            assert host.addrs_of(str(stranger)) == ()

    run(main)


def test_what_a_connected_peer_says_of_itself_is_known() -> None:
    async def main() -> None:
        async with two_hosts() as (a, b):
            identified = trio.Event()

            async def hold(_peer_id: str, stream: Stream) -> None:
                await identified.wait()

            b.set_handler("/test/hold/1", hold)
            while ECHO not in a.protocols_of(b.peer_id):
                # One more round trip each time: identify goes on beside it.
                stream = await a.open_stream(b.peer_id, ECHO)
                await stream.send(b"x")
                await receive(stream, 1)
                await stream.aclose()
            assert a.addrs_of(b.peer_id) == b.advertised_addrs()
            identified.set()

    run(main)
