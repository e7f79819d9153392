"""What a DHT server keeps through crowds, floods and restarts."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from tensorswarm.p2p.dht import server as dht_server
from tensorswarm.p2p.dht.discovery import Discovery
from tensorswarm.p2p.dht.file import DhtFile
from tensorswarm.p2p.dht.provider_table import RECORD_LIFETIME_S
from tensorswarm.p2p.dht.rpc import (
    KAD_PROTOCOL,
    DhtStream,
    Question,
    add_provider,
    ask,
    dht_stream,
    find_node,
    get_providers,
)
from tensorswarm.p2p.host.host import Host
from tensorswarm.store.cid import dht_key
from tensorswarm.store.digest import digest_of
from tests.support.hosts import HERE, run

WANTED = digest_of(b"what is looked for")


async def announce_by_hand(host: Host, server: Host, keys: list[bytes]) -> None:
    """Announce as other implementations do, and wait until all of it was taken."""
    await host.connect(server.addrs()[0])
    own_id = ID.from_string(host.peer_id).to_bytes()
    addrs = [Multiaddr("/ip4/9.9.9.9/tcp/1").to_bytes()]
    async with dht_stream(host, server.peer_id, 5) as stream:
        await stream.send(b"".join(add_provider(key, own_id, addrs) for key in keys))
        for _ in keys:
            assert (await stream.receive()).type == Message.MessageType.ADD_PROVIDER


async def found_by(discovery: Discovery, digest: bytes) -> list[str]:
    async with discovery.find_providers(digest, timeout_s=10) as providers:
        return [provider.peer_id async for provider in providers]


def test_behind_twenty_five_false_providers_the_honest_one_is_found() -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            hosts = [await stack.enter_async_context(Host(listen=[HERE])) for _ in range(28)]
            server, honest, searcher = hosts[:3]
            Discovery(server)
            for squatter in hosts[3:]:
                await announce_by_hand(squatter, server, [dht_key(WANTED)])
            await announce_by_hand(honest, server, [dht_key(WANTED)])
            searching = Discovery(searcher, server=False)
            await searching.bootstrap([server.addrs()[0]])
            found = await found_by(searching, WANTED)
            assert honest.peer_id in found
            assert len(found) == len(set(found)) == 26

    run(main)


def test_records_outlive_the_server_that_keeps_them(tmp_path: Path) -> None:
    async def main() -> None:
        wall_clock = 1e9
        keys = [dht_key(os.urandom(32)) for _ in range(300)]
        async with Host(listen=[HERE]) as server, Host(listen=[HERE]) as provider:
            file = DhtFile(tmp_path / "dht.db")
            Discovery(server, clock=lambda: wall_clock, file=file)
            await announce_by_hand(provider, server, keys)
            # No goodbye: whoever was told that its records are kept can rely on it.
        for age_s, kept in ((RECORD_LIFETIME_S - 1, 300), (RECORD_LIFETIME_S, 0)):
            async with Host(listen=[HERE]) as server, Host() as visitor:
                now = wall_clock + age_s
                again = Discovery(server, clock=lambda now=now: now, file=file)  # type: ignore[misc]
                assert again.dht.records.size() == kept
                await visitor.connect(server.addrs()[0])
                answer = await ask(visitor, server.peer_id, get_providers(keys[7]), 5)
                assert len(answer.providerPeers) == (1 if kept else 0)

    run(main)


def test_a_flood_is_read_slowly_and_nothing_of_it_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dht_server, "ANNOUNCEMENT_BURST", 100)
    monkeypatch.setattr(dht_server, "ANNOUNCEMENTS_PER_S", 1_000)

    async def main() -> None:
        async with Host(listen=[HERE]) as server, Host() as flooder, Host() as neighbour:
            discovery = Discovery(server)
            begun = trio.current_time()
            async with trio.open_nursery() as nursery:
                keys = [b"key %d" % number for number in range(900)]
                nursery.start_soon(announce_by_hand, flooder, server, keys)
                await neighbour.connect(server.addrs()[0])
                await ask(neighbour, server.peer_id, find_node(b"any key"), 5)
            assert discovery.dht.records.size() == 900
            assert trio.current_time() - begun >= 0.7

    run(main)


def test_a_pace_is_kept_for_so_many_peers_only() -> None:
    pace = dht_server.Pace()
    for _ in range(dht_server.ANNOUNCEMENT_BURST):
        assert pace.take(0.0, "peer") == 0
    assert pace.take(0.0, "peer") == pytest.approx(1 / dht_server.ANNOUNCEMENTS_PER_S)
    assert pace.take(1.0, "peer") == 0
    for number in range(2 * dht_server.MAX_PACES):
        pace.take(1.0, f"other {number}")
    assert len(pace._left) == dht_server.MAX_PACES


def test_idle_streams_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_server, "MAX_STREAMS", 4)

    async def main() -> None:
        async with Host(listen=[HERE]) as server, Host() as idler, Host() as neighbour:
            discovery = Discovery(server)
            await idler.connect(server.addrs()[0])
            await neighbour.connect(server.addrs()[0])
            streams = []
            for _ in range(12):
                stream = DhtStream(await idler.open_stream(server.peer_id, KAD_PROTOCOL))
                await stream.send(find_node(b"any key").data)
                await stream.receive()
                streams.append(stream)
            await ask(neighbour, server.peer_id, find_node(b"any key"), 5)
            assert discovery.dht._streams_of.total() <= 4

    run(main)


def test_nobody_announces_for_others_or_with_impossible_keys() -> None:
    async def main() -> None:
        async with Host(listen=[HERE]) as server, Host() as visitor:
            discovery = Discovery(server)
            await visitor.connect(server.addrs()[0])
            own_id = ID.from_string(visitor.peer_id).to_bytes()
            here = [Multiaddr("/ip4/9.9.9.9/tcp/1").to_bytes()]
            nowhere = [Multiaddr("/ip4/169.254.169.254/tcp/1").to_bytes(), b"junk"]
            kind = Message.MessageType.ADD_PROVIDER
            for key, peer, addrs in (
                (b"key", ID.from_string(server.peer_id).to_bytes(), here),
                (b"key", b"junk", here),
                (b"key", own_id, nowhere),
                (b"key", own_id, []),
            ):
                question = Question(kind, add_provider(key, peer, addrs))
                await ask(visitor, server.peer_id, question, 5)
            assert discovery.dht.records.size() == 0

    run(main)
