"""Ten thousand idle connections and streams, as a stranger would open them."""

from __future__ import annotations

import itertools
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_WINDOW_UPDATE, YAMUX_HEADER_FORMAT
from multiaddr import Multiaddr

from tensorswarm.p2p.bulk import table as bulk_table
from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.p2p.dht.rpc import GET_PROVIDERS, add_provider, dht_stream, get_providers
from tensorswarm.p2p.host import door
from tensorswarm.p2p.host.addresses import tcp_host
from tensorswarm.p2p.host.guard import Watcher
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.node import Node
from tensorswarm.store.cid import dht_key, model_cid
from tensorswarm.store.errors import NoSource
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store
from tests.support.dht_network import digests, network, providers
from tests.support.events import Watch, until_neighbour
from tests.support.hosts import ECHO, HERE, assert_serves, echo, receive

IDLE = 10_000
FILES = IDLE + 1_000
HALF_A_HANDSHAKE = b"\x13/multistream/1.0.0\n\x07/no"
HALF_A_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01"


class Departures(Watcher):
    """Tells when a connection has ended."""

    def __init__(self) -> None:
        super().__init__(lambda _conn: None)
        self.gone = trio.Event()

    async def disconnected(self, network: object, conn: object) -> None:
        """Tell it."""
        self.gone.set()


async def connect_and_wait(
    place: tuple[str, int], first_bytes: bytes, come: Callable[[], int]
) -> list[socket.socket]:
    """Open idle connections, every other one of which says something and then no more.

    In portions that the listening socket's queue takes, `come` telling how many have been
    let in or turned away: what overflows is tried again by the kernel a second later.
    """
    socks: list[socket.socket] = []
    before = come()
    while len(socks) < IDLE:
        for _ in range(50):
            socks.append(socket.create_connection(place))
            if len(socks) % 2:
                with suppress(ConnectionError):  # it was turned away already
                    socks[-1].sendall(first_bytes)
        while come() - before < len(socks):
            await trio.sleep(0.001)
    return socks


@pytest.fixture
def many_files() -> None:
    """Allow this process the sockets of an attacker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))


def test_more_peers_may_come_than_may_be_there_at_once() -> None:
    async def main() -> None:
        async with Host(listen=[HERE], max_connections=3) as hub:
            for _ in range(8):
                departures = Departures()
                hub.libp2p.get_network().register_notifee(departures)
                async with Host() as visitor:
                    await visitor.connect(hub.addrs()[0])
                await departures.gone.wait()

    trio.run(main)


@pytest.mark.usefixtures("many_files")
def test_a_node_serves_its_neighbours_beside_ten_thousand_idle_connections(tmp_path: Path) -> None:
    """At its libp2p port and at its bulk port."""
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with Store(tmp_path / "holder") as store:
        model = model_cid(add_paths(store, [tmp_path / "config.json"]).manifest.digest)

    async def main() -> None:
        async with (
            Node(tmp_path / "holder", listen=[HERE]) as holder,
            Node(tmp_path / "early", listen=[HERE], bootstrap=holder.addrs[:1]) as early,
        ):
            attackers: list[socket.socket] = []
            bulk, half_open = holder._bulk, holder._host.door.half_open

            def let_in_by_libp2p() -> int:
                return half_open.entered + half_open.turned_away

            def let_in_by_bulk() -> int:
                return bulk.statistics().accepted + bulk.statistics().turned_away

            try:
                attackers += await connect_and_wait(
                    tcp_host(holder.addrs[0]), HALF_A_HANDSHAKE, let_in_by_libp2p
                )
                assert len(half_open) <= door.MAX_HALF_OPEN
                for sock in attackers:
                    sock.close()
                attackers += await connect_and_wait(
                    ("127.0.0.1", bulk.address[1]), HALF_A_TLS_HELLO, let_in_by_bulk
                )
                assert bulk.statistics().connections <= (
                    bulk_table.MAX_CONNECTIONS + bulk_table.MAX_UNIDENTIFIED
                )
                result = await early.fetch(model)
                assert result.bytes_peers == result.bytes_total
                async with Node(
                    tmp_path / "late", listen=[HERE], bootstrap=holder.addrs[:1]
                ) as late:
                    assert (await late.fetch(model)).bytes_total == result.bytes_total
            finally:
                for sock in attackers:
                    sock.close()

    trio.run(main)


async def open_streams(host: Host, peer_id: str, count: int) -> None:
    """Open streams on a connection and say nothing on them, as fast as can be."""
    (conn,) = next(
        conns
        for peer, conns in host.libp2p.get_network().connections.items()  # type: ignore[attr-defined]
        if str(peer) == peer_id
    )
    frames = b"".join(
        struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_WINDOW_UPDATE, FLAG_SYN, number, 0)
        for number in itertools.islice(itertools.count(10_001, 2), count)
    )
    for start in range(0, len(frames), 60_000):
        await conn.muxed_conn.secured_conn.write(frames[start : start + 60_000])


def test_ten_thousand_idle_streams_of_one_peer_cost_it_its_connection() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as server, Host() as neighbour, Host() as flooder:
            server.set_handler(ECHO, echo)
            await neighbour.connect(server.addrs()[0])
            stream = await neighbour.open_stream(server.peer_id, ECHO)
            await flooder.connect(server.addrs()[0])
            departures = Departures()
            flooder.libp2p.get_network().register_notifee(departures)
            await open_streams(flooder, server.peer_id, IDLE)
            await departures.gone.wait()
            assert len(server.door.streams) <= door.MAX_STREAMS_PER_PEER + 8
            await stream.send(b"still there?")
            assert await receive(stream, 12) == b"still there?"
            await assert_serves(server)

    trio.run(main)


def test_ten_thousand_idle_streams_of_many_peers_leave_room_for_the_others() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(Host(listen=[HERE]))
            flooders = [await stack.enter_async_context(Host()) for _ in range(40)]
            for flooder in flooders:
                await flooder.connect(server.addrs()[0])
            streams, asked, most = server.door.streams, Watch(), 0

            def note() -> None:
                nonlocal most
                most = max(most, len(streams))
                asked()

            streams.on_asked = note
            for flooder in flooders:
                await open_streams(flooder, server.peer_id, IDLE // len(flooders))
            await assert_serves(server)
            await asked.until(lambda: streams.refused + streams.taken >= IDLE)
            # Those that were taken may have ended meanwhile: nothing was ever said on them.
            assert most <= door.MAX_SPARE_STREAMS + 41 * door.STREAMS_OF_RIGHT
            await assert_serves(server)

    trio.run(main)


def test_nonsense_on_the_control_plane_costs_its_sender_alone(tmp_path: Path) -> None:
    """Malformed, oversized, out of order, and never ending: the neighbours are served."""
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with Store(tmp_path / "holder") as store:
        model = model_cid(add_paths(store, [tmp_path / "config.json"]).manifest.digest)
    hello = wire.encode(wire.Hello(1, "stranger/1", (), (), ()))
    want = wire.encode(wire.Want(1, (bytes(32),)))
    nonsense = (
        b"\0\0\0\0",
        b"\xff" * 64,
        (wire_limits.MAX_FRAME_BYTES + 1).to_bytes(4, "big") + bytes(1000),
        hello + b"\0\0\0\x05\xdd\xff\xff\xff\xff",  # an array of four thousand million
        hello + hello,
        want,  # before hello
        hello + b"\0\0\0\x02\x91\xc1",
    )

    async def main() -> None:
        async with (
            Node(tmp_path / "holder", listen=[HERE]) as holder,
            Node(tmp_path / "neighbour", listen=[HERE], bootstrap=holder.addrs[:1]) as neighbour,
            Host() as stranger,
        ):
            await until_neighbour(holder, neighbour.peer_id)
            left = Watch()
            holder.neighbours.left.append(left)
            await stranger.connect(holder.addrs[0])
            for data in nonsense:
                stream = await stranger.open_stream(holder.peer_id, wire_limits.PROTOCOL_ID)
                await stream.send(data)
                with suppress(NoSource):  # however it ends, it ends
                    while await stream.receive_some():
                        pass
            await left.until(lambda: not holder.neighbours.is_neighbour(stranger.peer_id))
            assert holder.neighbours.is_neighbour(neighbour.peer_id)
            result = await neighbour.fetch(model)
            assert result.bytes_peers == result.bytes_total

    trio.run(main)


def test_a_flood_of_records_from_many_peers_leaves_those_of_others() -> None:
    honest_keys, flooders, flood = digests(20), 12, 500

    async def main() -> None:
        async with network(1) as net:
            server, discovery = net.nodes[0]
            discovery.dht.records.table._max_records = 2_000
            _, announcer = await net.join(server=False)
            assert (await announcer.announce(honest_keys)).confirmed == set(honest_keys)
            for _ in range(flooders):
                host = await net.host()
                own_id = ID.from_string(host.peer_id).to_bytes()
                addrs = [Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()]
                await host.connect(server.addrs()[0])
                async with dht_stream(host, server.peer_id, 30) as stream:
                    keys = [dht_key(key) for key in digests(flood)]
                    records = b"".join(add_provider(key, own_id, addrs) for key in keys)
                    await stream.send(records + get_providers(keys[-1]).data)
                    while (await stream.receive()).type != GET_PROVIDERS:
                        pass
                assert discovery.dht.records.size() <= 2_000
            _, searcher = await net.join(server=False)
            for key in honest_keys:
                assert await providers(searcher, key)

    trio.run(main)
