"""Getting into a network: by name, by memory, by the local network, and against odds."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p import node as node_module
from tensorswarm.p2p.dht import bootstrap as bootstrap_module
from tensorswarm.p2p.dht import discovery as discovery_module
from tensorswarm.p2p.dht.bootstrap import Bootstraps
from tensorswarm.p2p.dht.dnsaddr import resolve_dnsaddr, txt_from
from tensorswarm.p2p.dht.mdns import Mdns, peer_in, txt_of
from tensorswarm.p2p.host.addresses import PeerAddress
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.node import Node
from tensorswarm.store.errors import BadInput, NoSource
from tests.support.dht_network import WANTED, network, providers
from tests.support.dns_server import DnsServer
from tests.support.events import LogWatch, until_dht, until_neighbour
from tests.support.hosts import HERE, NOBODY, run

PEER = f"/ip4/192.0.2.7/tcp/4001/p2p/{NOBODY}"


async def resolved(server: DnsServer, text: str) -> list[PeerAddress]:
    look_up = functools.partial(txt_from, servers=("127.0.0.1",), port=server.port)
    return await resolve_dnsaddr(text, look_up)


# ---- names


def test_a_name_stands_for_peers_and_for_other_names() -> None:
    other = PEER.replace("192.0.2.7", "192.0.2.8")
    texts = {
        "_dnsaddr.peers.example": [
            "dnsaddr=/dnsaddr/eu.peers.example",
            "dnsaddr=/dnsaddr/peers.example",  # a circle
            f"dnsaddr=/ip4/192.0.2.9/udp/4001/quic-v1/p2p/{NOBODY}",
            "v=spf1 -all",
            f"dnsaddr={PEER}",
        ],
        "_dnsaddr.eu.peers.example": [f"dnsaddr={other}", "dnsaddr=junk", "dnsaddr=/dnsaddr/a b"],
    }

    async def main() -> None:
        with DnsServer(texts) as server:
            found = await resolved(server, "/dnsaddr/peers.example")
            assert [peer.addrs for peer in found] == [
                ("/ip4/192.0.2.7/tcp/4001",),
                ("/ip4/192.0.2.8/tcp/4001",),
            ]
            assert server.asked == ["_dnsaddr.peers.example", "_dnsaddr.eu.peers.example"]
            assert await resolved(server, f"/dnsaddr/peers.example/p2p/{NOBODY}") == found
            with pytest.raises(NoSource, match="names no peer"):
                await resolved(server, "/dnsaddr/peers.example/p2p/12D3KooWother")
            with pytest.raises(NoSource, match="DNS has no answer for _dnsaddr.nobody.example"):
                await resolved(server, "/dnsaddr/nobody.example")

    run(main)


def test_names_behind_names_have_an_end() -> None:
    texts = {
        f"_dnsaddr.n{number}.example": [
            f"dnsaddr=/dnsaddr/n{number + step}.example" for step in range(1, 30)
        ]
        for number in range(100)
    }

    async def main() -> None:
        with DnsServer(texts) as server:
            with pytest.raises(NoSource):
                await resolved(server, "/dnsaddr/n0.example")
            assert len(server.asked) <= 16

    run(main)


@pytest.mark.parametrize("text", ["/dnsaddr/", "/dnsaddr/a b", "/dnsaddr/a/tcp/1", "/dns4/a"])
def test_what_is_no_name_is_an_error_of_the_user(text: str) -> None:
    with pytest.raises(BadInput):
        Bootstraps([text])


def test_a_node_finds_its_network_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Node(tmp_path / "a", listen=[HERE]) as known:
            texts = {"_dnsaddr.peers.example": [f"dnsaddr={known.addrs[0]}"]}
            with DnsServer(texts) as server:
                look_up = functools.partial(txt_from, servers=("127.0.0.1",), port=server.port)
                monkeypatch.setattr(
                    node_module, "Bootstraps", functools.partial(Bootstraps, look_up=look_up)
                )
                name = "/dnsaddr/peers.example"
                async with Node(tmp_path / "b", listen=[HERE], bootstrap=[name]) as newcomer:
                    await until_neighbour(known, newcomer.peer_id)

    run(main)


# ---- memory, and patience


def test_a_restarted_node_finds_its_peers_without_being_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node(tmp_path / "a", listen=[HERE]) as lasting:
            async with Node(tmp_path / "b", listen=[HERE], bootstrap=lasting.addrs[:1]) as node:
                await until_neighbour(node, lasting.peer_id)
            async with Node(tmp_path / "b", listen=[HERE]) as again:
                await until_neighbour(again, lasting.peer_id)

    run(main)


def test_a_node_says_when_its_bootstraps_are_down_and_goes_on_trying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bootstrap_module, "PAUSES_S", (0.02,))
    caplog.set_level("INFO", logger="tensorswarm")
    lines = LogWatch()

    async def main() -> None:
        async with Node(tmp_path / "a", listen=[HERE]) as first:
            address = first.addrs[0]
        listen = address.partition("/p2p/")[0]
        async with Node(tmp_path / "b", listen=[HERE], bootstrap=[address]) as node:
            await lines.until("none of the bootstrap peers answers")
            async with Node(tmp_path / "a", listen=[listen]) as back:
                await lines.until("in touch with 1 bootstrap peers again")
                await until_neighbour(node, back.peer_id)

    with contextlib.closing(lines):
        run(main)
    # Not at each attempt: once, and once more if the node that came back stumbled at first.
    assert 1 <= caplog.text.count("connection refused") <= 2


def test_two_islands_become_one_network_when_two_nodes_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "LEAST_REFRESH_S", 0.05)

    async def main() -> None:
        async with network(4) as one, network(4) as other:
            await other.nodes[3][1].announce([WANTED])
            searcher = one.nodes[3][1]
            assert await providers(searcher, WANTED) == []
            await one.nodes[1][0].connect(other.nodes[2][0].addrs()[0])
            await until_dht(searcher, lambda: searcher.routing_table_size() >= 7)
            (found,) = await providers(searcher, WANTED)
            assert found.peer_id == other.nodes[3][0].peer_id

    run(main)


def test_a_node_that_joins_our_network_is_asked_one_question_and_causes_no_look_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery_module, "LEAST_REFRESH_S", 0.0)

    async def main() -> None:
        async with network(4) as net:
            _, node = net.nodes[0]
            answers: list[bool] = []
            all_asked = trio.Event()
            inner = node._newcomers_bring_news

            async def ask() -> bool:
                answers.append(await inner())
                if not node._newcomers:
                    all_asked.set()
                return answers[-1]

            node._newcomers_bring_news = ask  # type: ignore[method-assign]
            while node._newcomers:  # those of the beginning
                await all_asked.wait()
                all_asked = trio.Event()
            asked, rounds = node.statistics()["questions_asked"], node.looks_round
            await net.join()
            await all_asked.wait()
            assert not answers[-1]
            assert node.looks_round == rounds
            assert node.statistics()["questions_asked"] == asked + 1

    run(main)


# ---- the local network


def test_peers_on_the_local_network_find_each_other_and_private_ones_apart() -> None:
    async def main() -> None:
        token = trio.lowlevel.current_trio_token()
        async with Host(listen=[HERE]) as a, Host(listen=[HERE]) as b, Host(listen=[HERE]) as c:
            here = ("127.0.0.1",)
            services = [
                Mdns(a.peer_id, a.advertised_addrs(), interfaces=here),
                Mdns(c.peer_id, c.advertised_addrs(), fingerprint="private", interfaces=here),
                Mdns(b.peer_id, (), interfaces=here),
            ]
            try:
                for service in services:
                    await trio.to_thread.run_sync(service.start, token)
                found = await services[2].found.receive()
                assert found == PeerAddress(a.peer_id, a.advertised_addrs())
                with pytest.raises(trio.WouldBlock):
                    services[2].found.receive_nowait()
            finally:
                for service in services:
                    await trio.to_thread.run_sync(service.close)

    run(main)


def test_what_the_local_network_says_is_read_with_care() -> None:
    addrs = [f"/ip4/10.0.0.{number}/tcp/4001" for number in range(1, 100)]
    text = txt_of(NOBODY, addrs)
    assert len(text) < 1400
    peer = peer_in(text)
    assert peer is not None and peer.addrs == tuple(addrs[:8])
    for junk in (None, b"", b"\xff", b"\x05dnsad", b"\x0bdnsaddr=abc", bytes(2000)):
        assert peer_in(junk) is None
    for addr in ("/ip4/169.254.169.254/tcp/80", "/dns4/example.org/tcp/80", "/ip4/10.0.0.1/udp/1"):
        entry = f"dnsaddr={addr}/p2p/{NOBODY}".encode()
        assert peer_in(bytes([len(entry)]) + entry) is None
