"""Announcing: to how many, how often, and what is done when it did not work."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo

from tensorswarm.p2p.dht import announce_schedule
from tensorswarm.p2p.dht import publish as dht_publish
from tensorswarm.p2p.dht.discovery import Discovery
from tensorswarm.p2p.dht.file import DhtFile
from tensorswarm.store.cid import dht_key
from tests.support.dht_network import WANTED, digests, event_when_recorded, network, providers
from tests.support.events import LogWatch, until_dht
from tests.support.hosts import run


def test_without_other_nodes_nothing_is_confirmed_until_one_comes() -> None:
    async def main() -> None:
        async with network(1) as net:
            outcome = await net.nodes[0][1].announce([WANTED])
            assert (outcome.asked, outcome.confirmed, outcome.nodes) == (1, frozenset(), 0)
            host = await net.host()
            newcomer = Discovery(host)
            recorded = event_when_recorded(newcomer)
            await newcomer.bootstrap([net.nodes[0][0].addrs()[0]])
            await recorded.wait()  # by the background task of the first node

    run(main)


def test_nodes_that_come_during_a_round_cause_no_second_one() -> None:
    async def main() -> None:
        async with network(2) as net:
            _, announcer = net.nodes[1]
            publisher = announcer._publisher
            inner = publisher._round

            async def round_with_visitors(keys: Sequence[bytes]) -> object:
                publisher.node_has_come("12D3KooWvisitor")
                await trio.testing.wait_all_tasks_blocked()  # the background task saw it
                return await inner(keys)

            publisher._round = round_with_visitors  # type: ignore[assignment, method-assign]
            keys = digests(40)
            assert (await announcer.announce(keys)).confirmed == set(keys)
            await trio.testing.wait_all_tasks_blocked()
            assert announcer.statistics()["rounds"] == 1

    run(main)


def test_a_few_keys_go_over_a_stream_that_is_open_and_over_a_new_one_if_it_has_ended() -> None:
    async def main() -> None:
        async with network(2) as net:
            _, announcer = net.nodes[1]
            streams = announcer._walker.streams
            first, second, third = digests(3)
            assert (await announcer.announce([first])).confirmed == {first}
            opened = streams.opened
            assert (await announcer.announce([second])).confirmed == {second}
            assert streams.opened == opened
            for stream in list(streams._idle):
                await stream.aclose()
            assert (await announcer.announce([third])).confirmed == {third}
            assert streams.opened == opened + 1

    run(main)


def test_confirmed_keys_are_announced_again() -> None:
    async def main() -> None:
        clock = [1e9]
        async with network(1) as net:
            _, announcer = await net.join(clock=lambda: clock[0])
            recorded = event_when_recorded(net.nodes[0][1], count=2)
            outcome = await announcer.announce([WANTED])
            assert outcome.confirmed == {WANTED}
            clock[0] += 1.05 * announce_schedule.REPUBLISH_S
            announcer.wake()
            await recorded.wait()

    run(main)


def test_the_log_says_when_what_failed_at_first_is_announced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="tensorswarm")
    lines = LogWatch()

    async def main() -> None:
        async with network(1) as net:
            _, announcer = net.nodes[0]
            assert not (await announcer.announce(digests(3))).confirmed
            host = await net.host()
            newcomer = Discovery(host)
            await newcomer.bootstrap([net.nodes[0][0].addrs()[0]])
            await lines.until("3 keys are announced that could not be before; 0 are left")
            assert announcer.statistics()["announced_late"] == 3

    with contextlib.closing(lines):
        run(main)


def test_a_server_that_lost_its_records_is_told_them_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dht_publish, "NEWCOMER_PAUSE_S", 0.05)

    async def main() -> None:
        async with network(2) as net:
            host, announcer = net.nodes[1]
            keys = digests(30)
            await announcer.announce(keys)
            again = await net.host()
            empty = Discovery(again)  # as after a restart without its file
            recorded = event_when_recorded(empty, count=30)
            await empty.bootstrap([host.addrs()[0]])
            await recorded.wait()
            await until_dht(announcer, lambda: announcer.statistics()["newcomers_told"] > 0)
            before = announcer.statistics()["records_sent"]
            assert await announcer.check_sample() == 0
            # One that has them all is asked for a sample only.
            announcer._publisher.node_has_come(again.peer_id)
            asked = 30 + 2 * dht_publish.SAMPLE + dht_publish.SAMPLE
            await until_dht(announcer, lambda: announcer.statistics()["questions_sent"] >= asked)
            assert announcer.statistics()["records_sent"] == before

    run(main)


def test_what_is_gone_from_the_network_is_noticed_and_announced_again() -> None:
    async def main() -> None:
        async with network(2) as net:
            (_, server), (host, announcer) = net.nodes
            keys = digests(40)
            await announcer.announce(keys)
            raw_id = ID.from_string(host.peer_id).to_bytes()
            for key in keys:
                server.dht.records.table.remove(dht_key(key), raw_id)
            recorded = event_when_recorded(server, count=40)
            assert await announcer.check_sample() == dht_publish.SAMPLE
            await recorded.wait()

    run(main)


def test_a_restart_announces_only_what_is_due(tmp_path: Path) -> None:
    async def main() -> None:
        clock = [1e9]
        async with network(1) as net:
            server, _ = net.nodes[0]
            keys = digests(20)
            file = DhtFile(tmp_path / "dht.db")
            host = await net.host()
            for run_number, expected in enumerate((20, 0, 20)):
                if run_number == 2:
                    clock[0] += announce_schedule.REPUBLISH_S
                announcer = Discovery(host, clock=lambda: clock[0], file=file)
                await announcer.bootstrap([server.addrs()[0]])
                outcome = await announcer.announce(keys)
                assert outcome.confirmed == set(keys)
                assert announcer.statistics()["records_sent"] == expected

    run(main)


def test_many_keys_are_taken_where_stock_nodes_take_ten() -> None:
    async def main() -> None:
        async with network(2) as net:
            keys = digests(1_200)
            outcome = await net.nodes[1][1].announce(keys)
            assert outcome.confirmed == set(keys)
            assert net.nodes[0][1].dht.records.size() == len(keys)

    run(main)


def test_a_stock_node_is_announced_to_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce_schedule, "RETRY_S", 0.15)

    async def main() -> None:
        async with network() as net:
            stock, stock_dht = await net.stock()
            stock_dht._provider_rate_window = 0.1
            host, discovery = await net.join()
            await discovery.bootstrap([stock.addrs()[0]])
            keys = digests(25)
            left = len(keys)
            all_kept = trio.Event()
            inner = stock_dht.provider_store.add_provider
            kept: set[bytes] = set()

            def add_provider(key: bytes, provider: PeerInfo) -> None:
                inner(key, provider)
                kept.add(key)
                if len(kept) == left:
                    all_kept.set()

            stock_dht.provider_store.add_provider = add_provider  # type: ignore[method-assign]
            outcome = await discovery.announce(keys)
            assert len(outcome.confirmed) == 10
            assert {dht_key(key) for key in outcome.confirmed} <= kept
            await all_kept.wait()
            searcher_host, searcher = await net.join()
            await searcher.bootstrap([stock.addrs()[0]])
            for key in keys[::8]:
                found = await providers(searcher, key)
                assert [provider.peer_id for provider in found] == [host.peer_id]

    run(main)
