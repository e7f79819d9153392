"""Nodes that fetch the same model at once share what they ask of a slow origin."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

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

MOST_COPIES = 1.8
"""Copies of the model that the origin may give. Each for himself it would be four; while the
nodes meet, in the first second, some chunks are asked for more than once."""


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

    async def one(number: int, url: str, all_done: list[trio.Event]) -> None:
        where = tmp_path / f"node-{number}"
        listen = ["127.0.0.1:0"]
        async with PeerNode(where, listen=listen, bootstrap=[meeting_place.addr]) as node:
            result = await node.fetch(small.id, origins=[url])
            dropped.extend(source.id for source in result.sources if source.dropped)
            all_done[number].set()
            for event in all_done:
                await event.wait()  # gives to the others until they have it, too

    async def main(url: str) -> None:
        all_done = [trio.Event() for _ in range(NODES)]
        async with trio.open_nursery() as nursery:
            for number in range(NODES):
                nursery.start_soon(one, number, url, all_done)

    with HttpOrigin(small.folder, bytes_per_s=ORIGIN_BYTES_PER_S) as origin:
        trio.run(main, origin.url)
        copies = origin.body_bytes_sent / small.size_bytes
    assert not dropped
    assert 1 <= copies < MOST_COPIES
    wanted = sha256_of_files(small.folder)
    for number in range(NODES):
        with Store(tmp_path / f"node-{number}") as opened:
            export_files(opened, manifest, manifest.files, tmp_path / f"out-{number}")
        assert sha256_of_files(tmp_path / f"out-{number}") == wanted
