"""Hosts on this machine: listening, connecting, closing, and what they know of peers."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing

from tensorswarm.p2p.host import guard as host_guard
from tensorswarm.p2p.host import host as host_module
from tensorswarm.p2p.host.addresses import PeerAddress, tcp_host
from tensorswarm.p2p.host.door import MAX_HALF_OPEN
from tensorswarm.p2p.host.host import Host, Stream
from tensorswarm.store.errors import BadInput, NoSource
from tests.support.hosts import (
    ECHO,
    HERE,
    NOBODY,
    PATIENCE_S,
    cancel_at_every_step,
    echo,
    receive,
    run,
    two_hosts,
)

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


def test_only_noise_and_yamux_are_spoken_and_nobody_is_dialled_unasked() -> None:
    swarm = Host()._swarm
    # py-libp2p's own limits end a hub at 250 inbound connections, or 256.
    assert swarm._inbound_limiter.total_tokens == host_module.MAX_CONNECTIONS + MAX_HALF_OPEN
    limits = swarm._resource_manager.connection_limits  # type: ignore[union-attr]
    assert limits.max_established_inbound == host_module.MAX_CONNECTIONS + MAX_HALF_OPEN
    assert list(swarm.upgrader.security_multistream.transports) == ["/noise"]
    assert list(swarm.upgrader.muxer_multistream.transports) == ["/yamux/1.0.0"]
    assert [type(t).__name__ for t in swarm.transport_manager.get_transports()] == ["TCP"]

    async def main() -> None:
        async with Host(listen=[HERE]) as a, Host(listen=[HERE]) as b:
            a.add_peer_addrs(b.peer_id, b.advertised_addrs())
            assert not a._swarm.auto_connector._started
            await a._swarm.auto_connector.maybe_connect()
            assert a.connected() == ()

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
    ("greeting", "reason", "timeout_s"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a peer of this network", PATIENCE_S),
        (None, "no answer", 0.3),
    ],
    ids=["another protocol", "silence"],
)
def test_what_answers_is_not_a_peer(greeting: bytes | None, reason: str, timeout_s: float) -> None:
    async def main() -> None:
        async def serve(stream: trio.SocketStream) -> None:
            if greeting is not None:
                await stream.receive_some()  # closing with this unread would cut the connection
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
                await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}", timeout_s)
            nursery.cancel_scope.cancel()

    run(main)


def test_a_full_host_turns_others_away() -> None:
    async def main() -> None:
        async with Host(listen=[HERE], max_connections=3) as hub:
            hub.set_handler(ECHO, echo)
            async with Host() as a, Host() as b, Host() as c:
                for visitor in (a, b):
                    await visitor.connect(hub.addrs()[0])
                    stream = await visitor.open_stream(hub.peer_id, ECHO)
                    await stream.send(b"hello")
                    assert await receive(stream, 5) == b"hello"
                with pytest.raises(NoSource, match="may have too many"):
                    await c.connect(hub.addrs()[0])

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
            assert trio.current_time() - begun < 20
            with pytest.raises(NoSource):
                await third.open_stream(a.peer_id, ECHO)

    run(main)


def test_errors_leave_a_host_as_they_are() -> None:
    async def main() -> None:
        with pytest.raises(KeyError):  # and not an ExceptionGroup with one in it
            async with two_hosts():
                raise KeyError("the body's own")
        with trio.CancelScope() as scope:
            async with two_hosts():
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught

    run(main)


# ---- what is remembered of peers


def test_a_host_can_be_cancelled_at_every_step_of_its_start() -> None:
    async def main() -> None:
        assert await cancel_at_every_step(two_hosts) > 30

    run(main)


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
