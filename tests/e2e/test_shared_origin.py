"""Nodes that fetch the same model at once share what they ask of a slow origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.control import wire
from tensorswarm.p2p.node import Node as PeerNode
from tensorswarm.store.cid import parse_reference
from tensorswarm.store.export import export_files
from tensorswarm.store.store import Store
from tests.e2e.conftest import MIB, Model, copy_of
from tests.support.http_origin import HttpOrigin
from tests.support.model_files import sha256_of_files
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

NODES = 4
ORIGIN_BYTES_PER_S = 3 * MIB

FIRST_BYTES_PER_S = MIB // 4
"""What the origin gives until all know each other, however long the machine takes for that:
enough that nobody takes it for dead."""

MOST_COPIES = 1.5
"""Copies of the model that the origin may give once they do. Each for himself it would be
four; of the chunks that were asked for before, some come more than once."""


def test_four_nodes_that_start_at_once_leave_most_of_the_origin_to_each_other(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """They meet through a node that has the manifest and no tensor."""
    store = copy_of(small, tmp_path / "knows")
    digest = parse_reference(small.id).digest
    with Store(store) as opened:
        manifest = opened.manifest(digest)
        assert manifest is not None
        opened.forget([ref.digest for ref in manifest.objects])
    meeting_place = processes.node(store)
    dropped: list[str] = []
    nodes: list[PeerNode] = []
    heard: list[wire.Offer | wire.Pass] = []

    all_know = trio.Event()

    def look(_peer_id: str) -> None:
        if [len(node.neighbours.wanting(digest)) for node in nodes] == [NODES - 1] * NODES:
            all_know.set()

    async def one(number: int, url: str, all_done: list[trio.Event]) -> None:
        where = tmp_path / f"node-{number}"
        listen = ["127.0.0.1:0"]
        async with PeerNode(where, listen=listen, bootstrap=[meeting_place.addr]) as node:
            nodes.append(node)
            node.neighbours.want_listeners.append(look)
            node.neighbours.offer_listeners.append(lambda _peer_id, notice: heard.append(notice))
            result = await node.fetch(small.id, origins=[url])
            dropped.extend(source.id for source in result.sources if source.dropped)
            all_done[number].set()
            for event in all_done:
                await event.wait()  # gives to the others until they have it, too

    async def main(origin: HttpOrigin) -> int:
        all_done = [trio.Event() for _ in range(NODES)]
        async with trio.open_nursery() as nursery:
            for number in range(NODES):
                nursery.start_soon(one, number, origin.url, all_done)
            await all_know.wait()
            before = origin.body_bytes_sent
            origin.bytes_per_s = ORIGIN_BYTES_PER_S
        return before

    with HttpOrigin(small.folder, bytes_per_s=FIRST_BYTES_PER_S) as origin:
        before = trio.run(main, origin)
        given = origin.body_bytes_sent
    assert not dropped
    assert sum(isinstance(notice, wire.Offer) for notice in heard) >= NODES  # and some are taken:
    assert sum(isinstance(notice, wire.Pass) for notice in heard) < len(heard) / 2
    assert small.size_bytes <= given < before + MOST_COPIES * small.size_bytes
    wanted = sha256_of_files(small.folder)
    for number in range(NODES):
        with Store(tmp_path / f"node-{number}") as opened:
            export_files(opened, manifest, manifest.files, tmp_path / f"out-{number}")
        assert sha256_of_files(tmp_path / f"out-{number}") == wanted


def test_four_processes_ask_the_origin_for_nothing_that_they_were_told_another_has(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """Counted in each of them, chunk by chunk, by what had been told when it asked."""
    store = copy_of(small, tmp_path / "knows")
    with Store(store) as opened:
        manifest = opened.manifest(parse_reference(small.id).digest)
        assert manifest is not None
        opened.forget([ref.digest for ref in manifest.objects])
    meeting_place = processes.node(store)
    with HttpOrigin(small.folder, bytes_per_s=FIRST_BYTES_PER_S) as origin:
        members = [
            processes.start_member(
                tmp_path / f"node-{number}",
                small.id,
                bootstrap=meeting_place.addr,
                origin=origin.url,
                others=NODES - 1,
            )
            for number in range(NODES)
        ]
        for member in members:
            member.wait_said("ready")
        for member in members:
            member.go_on()
        for member in members:
            member.wait_said("knows")
        before = origin.body_bytes_sent
        origin.bytes_per_s = ORIGIN_BYTES_PER_S
        counted = [member.wait_said("bytes_total") for member in members]
        given = origin.body_bytes_sent
        for member in members:
            member.go_on()
        for member in members:
            assert member.wait_exit() == 0
    assert [each["asked_though_told"] for each in counted] == [0] * NODES
    assert [each["dropped"] for each in counted] == [[]] * NODES
    assert sum(each["asked_origin"] > 0 for each in counted) > 1  # nobody does it all
    assert small.size_bytes <= given < before + MOST_COPIES * small.size_bytes
    assert sum(each["bytes_origin"] for each in counted) <= given
    wanted = sha256_of_files(small.folder)
    for number in range(NODES):
        with Store(tmp_path / f"node-{number}") as opened:
            export_files(opened, manifest, manifest.files, tmp_path / f"out-{number}")
        assert sha256_of_files(tmp_path / f"out-{number}") == wanted
