"""The DHT among hosts on this machine: ours, stock py-libp2p's, and hostile ones."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from tensorswarm.p2p.dht import records as dht_records
from tensorswarm.p2p.dht import server as dht_server
from tensorswarm.p2p.dht import walker
from tensorswarm.p2p.dht.discovery import Provider
from tensorswarm.p2p.dht.rpc import (
    KAD_PROTOCOL,
    Deframer,
    Question,
    add_provider,
    ask,
    find_node,
    framed,
)
from tensorswarm.p2p.host.host import Handler, Host, Stream
from tensorswarm.store.cid import dht_key
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import NoSource, RemoteError
from tests.support.dht_network import WANTED, digests, event_when_recorded, network, providers
from tests.support.hosts import NOBODY, run

# ---- the ordinary course


def test_what_one_announces_the_others_find() -> None:
    async def main() -> None:
        async with network(3) as net:
            (a, _), (b, announcer), (c, _) = net.nodes
            keys = digests(40)
            outcome = await announcer.announce(keys)
            assert (outcome.asked, outcome.nodes) == (40, 2)
            assert outcome.confirmed == set(keys)
            for searcher in (net.nodes[0][1], net.nodes[2][1]):
                assert await providers(searcher, keys[7]) == [
                    Provider(b.peer_id, b.advertised_addrs())
                ]
                assert await providers(searcher, WANTED) == []
            assert await providers(announcer, keys[7]) == []  # never ourselves

    run(main)


def test_a_newcomer_finds_what_was_announced_before_it_came() -> None:
    async def main() -> None:
        async with network(2) as net:
            await net.nodes[0][1].announce([WANTED])
            await net.nodes[1][1].announce([WANTED])
            _, newcomer = await net.join()
            found = {provider.peer_id for provider in await providers(newcomer, WANTED)}
            assert found == {host.peer_id for host, _ in net.nodes[:2]}

    run(main)


def test_the_answer_comes_from_the_network_and_not_from_what_was_found_before() -> None:
    async def main() -> None:
        async with network(2) as net:
            (a, first), (b, second) = net.nodes
            await second.announce([WANTED])
            assert len(await providers(first, WANTED)) == 1
            first.dht.records.expire()
            assert [peer.peer_id for peer in first.dht.records.others(dht_key(WANTED))] == [
                b.peer_id  # it was told so, and not by its own search
            ]
            second.withdraw([WANTED])
            raw_id = ID.from_string(b.peer_id).to_bytes()
            first.dht.records.table.remove(dht_key(WANTED), raw_id)
            assert await providers(first, WANTED) == []

    run(main)


def test_bootstrapping_makes_nodes_known_to_each_other() -> None:
    async def main() -> None:
        async with network(5) as net:
            outcome = await net.nodes[1][1].bootstrap([net.nodes[0][0].addrs()[0]])
            assert outcome.nodes == 4
            assert outcome.failed == {}
            for _, discovery in net.nodes[1:]:
                assert discovery.routing_table_size() >= 1
            everybody = {host.peer_id for host, _ in net.nodes}
            assert {*net.nodes[4][1]._walker.known_nodes(), net.nodes[4][0].peer_id} == everybody

    run(main)


def test_bootstrap_says_what_worked_and_why_the_rest_did_not() -> None:
    async def main() -> None:
        async with network(1) as net:
            good = net.nodes[0][0].addrs()[0]
            _, discovery = await net.join()
            port = good.split("/")[4]
            bad = {
                f"/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}": "connection refused",
                f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}": "another id answers",
                "127.0.0.1:4001": "not the address of a peer",
            }
            outcome = await discovery.bootstrap([good, *bad])
            assert outcome.connected == (good,)
            assert outcome.failed.keys() == bad.keys()
            for address, reason in bad.items():
                assert reason in outcome.failed[address]

    run(main)


def test_a_client_asks_and_announces_but_is_never_asked() -> None:
    async def main() -> None:
        async with network(2) as net:
            host, client = await net.join(server=False)
            outcome = await client.announce([WANTED])
            assert outcome.confirmed == {WANTED}
            for other, discovery in net.nodes[:2]:
                (found,) = await providers(discovery, WANTED)
                assert found.peer_id == host.peer_id
                assert host.peer_id not in discovery._walker.known_nodes()
                with pytest.raises(NoSource):
                    await ask(other, host.peer_id, find_node(b"key"), 5)
            assert len(await providers(client, WANTED)) == 0

    run(main)


def test_a_search_can_be_limited_and_left() -> None:
    async def main() -> None:
        async with network(4) as net:
            for _, discovery in net.nodes[:3]:
                await discovery.announce([WANTED])
            searcher = net.nodes[3][1]
            assert len(await providers(searcher, WANTED)) == 3
            assert len(await providers(searcher, WANTED, limit=2)) == 2
            async with searcher.find_providers(WANTED, timeout_s=10) as found:
                await found.receive()
            with pytest.raises(trio.ClosedResourceError):
                await found.receive()
            with pytest.raises(KeyError):  # and not a group of errors
                async with searcher.find_providers(WANTED, timeout_s=10):
                    raise KeyError

    run(main)


# ---- other implementations


def test_a_stock_node_finds_what_we_announce_and_announces_to_us() -> None:
    async def main() -> None:
        async with network(1) as net:
            ours, discovery = net.nodes[0]
            stock, stock_dht = await net.stock()
            await stock.connect(ours.addrs()[0])
            await stock_dht.routing_table.add_peer(
                PeerInfo(ID.from_string(ours.peer_id), [Multiaddr(ours.advertised_addrs()[0])])
            )
            recorded = event_when_recorded(discovery)
            assert await stock_dht.provider_store.provide(dht_key(WANTED))
            await recorded.wait()
            (found,) = await providers(discovery, WANTED)
            assert found.peer_id == stock.peer_id
            other = digest_of(b"ours")
            await discovery.announce([other])
            stock_found = await stock_dht.provider_store.find_providers(dht_key(other))
            assert [str(info.peer_id) for info in stock_found] == [ours.peer_id]

    run(main)


# ---- nodes that lie, stall or talk nonsense


async def questions(stream: Stream) -> AsyncIterator[Message]:
    deframer = Deframer()
    while data := await stream.receive_some():
        deframer.feed(data)
        while (message := deframer.next_message()) is not None:
            yield message


def echo_and_forget(claimed: bytes | None = None) -> Handler:
    """Make a node that says yes to every announcement, and names somebody else."""

    async def handle(_peer_id: str, stream: Stream) -> None:
        async for question in questions(stream):
            answer = Message(type=question.type, key=question.key)
            if question.type == Message.MessageType.GET_PROVIDERS and claimed:
                answer.providerPeers.append(
                    Message.Peer(id=claimed, addrs=[Multiaddr("/ip4/9.9.9.9/tcp/1").to_bytes()])
                )
            await stream.send(framed(answer))

    return handle


async def stall(_peer_id: str, stream: Stream) -> None:
    await trio.sleep_forever()


async def garbage(_peer_id: str, stream: Stream) -> None:
    await stream.receive_some()
    await stream.send(os.urandom(1000))


async def huge(_peer_id: str, stream: Stream) -> None:
    await stream.receive_some()
    await stream.send(b"\xff\xff\xff\x7f" + bytes(1000))


async def without_end(_peer_id: str, stream: Stream) -> None:
    while True:
        await stream.send(framed(Message(type=Message.MessageType.ADD_PROVIDER, key=b"x")) * 100)


async def hang_up(_peer_id: str, stream: Stream) -> None:
    stream.abort()


def test_a_node_that_echoes_and_forgets_confirms_nothing() -> None:
    async def main() -> None:
        async with network() as net:
            _, discovery = await net.join()
            liar = await net.impostor(echo_and_forget(ID.from_string(NOBODY).to_bytes()))
            await discovery.bootstrap([liar.addrs()[0]])
            outcome = await discovery.announce(digests(5))
            assert outcome.nodes == 1
            assert outcome.confirmed == frozenset()

    run(main)


@pytest.mark.parametrize("bad", [stall, garbage, huge, without_end, hang_up])
def test_bad_nodes_cost_a_search_no_more_than_their_deadline(
    bad: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad is stall:  # the others fail by themselves, and nobody has to hurry
        monkeypatch.setattr(walker, "PEER_TIMEOUT_S", 2)

    async def main() -> None:
        async with network(2) as net:
            (good, announcer), (_, searcher) = net.nodes
            impostors = [await net.impostor(bad) for _ in range(3)]
            for impostor in impostors:
                await searcher._host.connect(impostor.addrs()[0])
                await searcher.dht.add_node(PeerInfo(ID.from_string(impostor.peer_id), []))
            await announcer.announce([WANTED])
            (found,) = await providers(searcher, WANTED)
            assert found.peer_id == good.peer_id
            # They are left alone for a while, and are in nobody's way.
            assert searcher._walker.known_nodes() == [good.peer_id]
            outcome = await searcher.announce(digests(3))
            assert len(outcome.confirmed) == 3

    run(main)


def test_a_search_ends_in_time_when_nobody_answers() -> None:
    async def main() -> None:
        async with network(1) as net:
            _, searcher = net.nodes[0]
            impostor = await net.impostor(stall)
            await searcher._host.connect(impostor.addrs()[0])
            await searcher.dht.add_node(PeerInfo(ID.from_string(impostor.peer_id), []))
            with trio.fail_after(walker.PEER_TIMEOUT_S):
                assert await providers(searcher, WANTED, timeout_s=0.05) == []

    run(main)


def test_what_a_node_names_is_only_a_hint_and_never_ourselves() -> None:
    async def main() -> None:
        async with network(1) as net:
            host, searcher = net.nodes[0]
            for claimed, expected in (
                (ID.from_string(NOBODY).to_bytes(), [Provider(NOBODY, ("/ip4/9.9.9.9/tcp/1",))]),
                (ID.from_string(host.peer_id).to_bytes(), []),
                (b"junk", []),
            ):
                liar = await net.impostor(echo_and_forget(claimed))
                await searcher.bootstrap([liar.addrs()[0]])
                assert await providers(searcher, WANTED) == expected
                await host.disconnect(liar.peer_id)
                searcher.dht.routing_table.remove_peer(ID.from_string(liar.peer_id))

    run(main)


# ---- what we do for others, and what we don't


def test_a_server_survives_nonsense_and_ends_idle_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_server, "IDLE_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with network(1) as net:
            server, discovery = net.nodes[0]
            async with Host() as visitor:
                await visitor.connect(server.addrs()[0])
                too_long = framed(Message(key=bytes(dht_server.MAX_REQUEST_BYTES + 1)))
                for data in (b"", b"\x05junk!", b"\xff" * 12, too_long, framed(Message())[:1]):
                    stream = await visitor.open_stream(server.peer_id, KAD_PROTOCOL)
                    await stream.send(data)
                    with pytest.raises(RemoteError, match="reset by"):
                        while await stream.receive_some():
                            pass
                answer = await ask(visitor, server.peer_id, find_node(b"any key"), 5)
                assert answer.type == Message.MessageType.FIND_NODE
            assert discovery.dht._streams_of == {}

    run(main)


def test_one_peer_cannot_occupy_all_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_server, "MAX_STREAMS_PER_PEER", 3)

    async def main() -> None:
        async with network(1) as net:
            server, _ = net.nodes[0]
            async with Host() as greedy, Host() as other:
                await greedy.connect(server.addrs()[0])
                await other.connect(server.addrs()[0])
                streams = []
                for _ in range(3):
                    stream = await greedy.open_stream(server.peer_id, KAD_PROTOCOL)
                    await stream.send(find_node(b"any key").data)
                    assert await stream.receive_some()
                    streams.append(stream)
                with pytest.raises(RemoteError):
                    stream = await greedy.open_stream(server.peer_id, KAD_PROTOCOL)
                    await stream.receive_some()
                await ask(other, server.peer_id, find_node(b"any key"), 5)

    run(main)


def test_only_what_a_peer_says_of_itself_is_kept_and_with_addresses_to_be_believed() -> None:
    async def main() -> None:
        async with network(1) as net:
            server, discovery = net.nodes[0]
            async with Host() as visitor:
                await visitor.connect(server.addrs()[0])
                raw_id = ID.from_string(visitor.peer_id).to_bytes()
                addrs = [
                    Multiaddr(f"/ip4/{host}/tcp/{port}").to_bytes()
                    for host in ("169.254.169.254", "9.9.9.9")
                    for port in range(1, 40)
                ]
                for provider in (raw_id, ID.from_string(NOBODY).to_bytes()):
                    announcement = add_provider(dht_key(WANTED), provider, addrs)
                    question = Question(Message.MessageType.ADD_PROVIDER, announcement)
                    await ask(visitor, server.peer_id, question, 5)
                (kept,) = discovery.dht.records.others(dht_key(WANTED))
                assert kept.peer_id == visitor.peer_id
                assert list(kept.addrs) == [f"/ip4/9.9.9.9/tcp/{port}" for port in range(1, 9)]

    run(main)


def test_values_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from libp2p.kad_dht.pb.kademlia_pb2 import Record

    monkeypatch.setattr(dht_records, "MAX_VALUES_BYTES", 10_000)
    store = dht_records.ValueRecords(Host(), ID(b"x"))
    for number in range(50):
        key = b"/ipns/%d" % number
        store.put_record(key, Record(key=key, value=bytes(1000)))
    assert 5 <= store.size() <= 10
    assert store.get(b"/ipns/49") is not None
    with pytest.raises(ValueError, match="a value of"):
        store.put_record(b"k", Record(key=b"k", value=bytes(dht_records.MAX_VALUE_BYTES)))
