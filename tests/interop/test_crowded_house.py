"""One party with handshakes and hellos without end, from another address than the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.control import neighbours, wire, wire_limits
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.host.places import Standing
from tensorswarm.p2p.node import Node
from tensorswarm.store.cid import model_cid
from tensorswarm.store.errors import NoSource, RemoteError
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store
from tests.support.events import until_neighbour, watch_calls
from tests.support.hosts import ECHO, HERE, assert_serves, echo, receive

PLACES = 12
SOURCE: ContextVar[str] = ContextVar("SOURCE", default="127.0.0.1")


@pytest.fixture(autouse=True)
def _dial_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have connections leave from the address in `SOURCE`."""
    inner: Callable[..., Awaitable[trio.SocketStream]] = trio.open_tcp_stream

    async def open_from(host: str, port: int) -> trio.SocketStream:
        return await inner(host, port, local_address=SOURCE.get())

    monkeypatch.setattr(trio, "open_tcp_stream", open_from)


async def crowd(stack: AsyncExitStack, server: Host, source: str, count: int) -> list[Host]:
    """Have many peers of one address connect; return those that are let in."""
    SOURCE.set(source)
    let_in = []
    for _ in range(count):
        host = await stack.enter_async_context(Host())
        with suppress(RemoteError):
            await host.connect(server.addrs()[0])
            stream = await host.open_stream(server.peer_id, ECHO)
            await stream.send(b"hello")
            await receive(stream, 5)
            let_in.append(host)
    SOURCE.set("127.0.0.1")
    return let_in


def test_a_crowd_of_one_address_leaves_room_for_others() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(
                Host(listen=["0.0.0.0:0"], max_connections=PLACES)
            )
            server.set_handler(ECHO, echo)
            neighbour = (await crowd(stack, server, "127.0.0.2", 1))[0]
            server.door.standing = lambda peer: (
                Standing.BUSY if peer == neighbour.peer_id else Standing.STRANGER
            )
            stream = await neighbour.open_stream(server.peer_id, ECHO)
            # The neighbour's own address is crowded, and so is another: the house is full.
            assert len(await crowd(stack, server, "127.0.0.2", PLACES)) == 8
            assert len(await crowd(stack, server, "127.0.0.3", 3)) == 3
            assert len(server.connected()) == PLACES
            SOURCE.set("127.0.0.4")
            for displaced in range(1, 4):
                newcomer = await stack.enter_async_context(Host())
                await newcomer.connect(server.addrs()[0])
                theirs = await newcomer.open_stream(server.peer_id, ECHO)
                await theirs.send(b"a place")
                assert await receive(theirs, 7) == b"a place"
                assert server.door.places.displaced == displaced
                assert len(server.door.places) <= PLACES
            await stream.send(b"still there?")
            assert await receive(stream, 12) == b"still there?"
            # When all have as many, nobody is pushed out by somebody new of a full address.
            assert server.door.places.refused >= 4

    trio.run(main)


def test_the_places_of_those_who_left_are_free() -> None:
    async def main() -> None:
        async with Host(listen=[HERE], max_connections=4) as server:
            server.set_handler(ECHO, echo)
            left = watch_calls(server.door.places, "left")
            for _ in range(3):
                async with AsyncExitStack() as stack:
                    assert len(await crowd(stack, server, "127.0.0.2", 3)) == 3
                    await assert_serves(server)
                await left.until(lambda: not len(server.door.places))  # goodbyes take a moment
            assert server.door.places.refused == server.door.places.displaced == 0

    trio.run(main)


async def say_hello(host: Host, node: Node) -> None:
    """Become a neighbour, and then do nothing."""
    await host.connect(node.addrs[0])
    stream = await host.open_stream(node.peer_id, wire_limits.PROTOCOL_ID)
    await stream.send(wire.encode(wire.Hello(1, "crowd/1", (), (), ())))
    with suppress(NoSource):
        await stream.receive_some()


def test_a_crowd_of_neighbours_leaves_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer from another address becomes a neighbour, and fetches."""
    monkeypatch.setattr(neighbours, "MAX_NEIGHBOURS", 4)
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with Store(tmp_path / "holder") as store:
        model = model_cid(add_paths(store, [tmp_path / "config.json"]).manifest.digest)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            holder = await stack.enter_async_context(Node(tmp_path / "holder", listen=[HERE]))
            for address, count in (("127.0.0.2", 3), ("127.0.0.3", 1)):
                SOURCE.set(address)
                for _ in range(count):
                    host = await stack.enter_async_context(Host())
                    await say_hello(host, holder)
                    await until_neighbour(holder, host.peer_id)
            assert len(holder.neighbours.all()) == 4
            SOURCE.set("127.0.0.4")
            newcomer = await stack.enter_async_context(
                Node(tmp_path / "newcomer", listen=[HERE], bootstrap=holder.addrs[:1])
            )
            result = await newcomer.fetch(model)
            assert result.bytes_peers == result.bytes_total > 0

    trio.run(main)
