"""Models move between real nodes, whole and bit for bit, and no byte more than needed."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.node import Node as PeerNode
from tensorswarm.p2p.results import FetchResult
from tensorswarm.store.cid import parse_reference
from tensorswarm.store.store import Store
from tests.e2e.conftest import MIB, Model, add
from tests.support.http_origin import HttpOrigin
from tests.support.model_files import (
    WEIGHTS,
    make_fine_tune,
    make_grown_vocabulary,
    make_random_model,
    sha256_of_files,
)
from tests.support.swarm_processes import Node, Processes

pytestmark = pytest.mark.e2e

RATE = 6 * MIB
"""Bytes per second of each of three sources: slow enough that MiniLM (87 MiB) is not there
before the last of them has been found, on the busiest machine."""

LAYER = "encoder.layer.5.*"
"""The layer that the fine-tune changed: one of MiniLM's six."""


EMBEDDING = "embeddings.word_embeddings.weight"


def test_two_peers_and_an_origin_then_only_who_fetched(
    processes: Processes, minilm_dir: Path, tmp_path: Path
) -> None:
    """All sources give; when all of them are gone, who fetched stands in for them."""
    original = tmp_path / "original"
    shutil.copytree(minilm_dir, original)
    wanted = sha256_of_files(original)
    stores = [tmp_path / "store-1", tmp_path / "store-2"]
    models = [add(processes, original, store, "--no-copy") for store in stores]
    ref = models[0].id
    assert models[1].id == ref
    limit = ("--upload-limit", f"{RATE // MIB}MiB/s")
    nodes = [processes.start_node(store, *limit) for store in stores]
    for node in nodes:
        node.wait_ready()
    origin = processes.nginx(original, limit_rate=RATE)

    third = tmp_path / "store-3"
    result = processes.fetch(
        ref,
        third,
        *("--origin", origin.url),
        bootstrap=[node.addr for node in nodes],
    )
    document = result.document
    sources = result.sources()
    assert set(sources) == {nodes[0].peer_id, nodes[1].peer_id, origin.url}, sources[origin.url]
    assert all(s["bytes"] > 0 and not s["dropped"] for s in sources.values()), result.stdout
    assert document["model"] == ref
    assert document["bytes_local"] == 0
    assert document["bytes_peers"] + document["bytes_origin"] == document["bytes_total"]
    assert sources[origin.url]["bytes"] == document["bytes_origin"]
    assert document["bytes_total"] >= models[0].size_bytes
    served = sum(request.body_bytes for request in origin.stop())
    assert served >= document["bytes_origin"], "the origin's own log says that it gave less"

    for node in nodes:
        node.kill()
    for folder in (original, *stores):
        shutil.rmtree(folder)
    second = processes.node(third)
    result = processes.fetch(
        ref, tmp_path / "store-4", "--out", tmp_path / "out", bootstrap=[second.addr]
    )
    assert list(result.sources()) == [second.peer_id]
    assert result.document["bytes_peers"] == document["bytes_total"]
    assert sha256_of_files(tmp_path / "out") == wanted


def test_near_first_spares_the_origin(processes: Processes, tmp_path: Path) -> None:
    """The peer lacks one tensor, and only that is asked of the origin (and, perhaps, what
    the origin gave before the peer had said what it holds)."""
    folder = make_random_model(tmp_path / "model", {"here": 24 * MIB, "there": 2 * MIB}, seed=5)
    model = add(processes, folder, tmp_path / "peer")
    with Store(tmp_path / "peer") as opened:
        manifest = opened.manifest(parse_reference(model.id).digest)
        assert manifest is not None
        opened.forget([ref.digest for ref in manifest.objects if ref.size_bytes == 2 * MIB])
    peer = processes.node(tmp_path / "peer")
    with HttpOrigin(folder, bytes_per_s=4 * MIB) as origin:
        result = processes.fetch(
            model.id,
            tmp_path / "store",
            *("--near-first", "--origin", origin.url, "--out", tmp_path / "out"),
            bootstrap=[peer.addr],
        )
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(folder)
    assert 2 * MIB <= result.document["bytes_origin"] <= 12 * MIB
    assert result.document["bytes_wasted"] == 0


def test_a_fine_tune_costs_only_its_changed_layer(
    processes: Processes, minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    """Who has the base receives the changed layer, and less than 1 % more."""
    tune = make_fine_tune(minilm.folder, tmp_path / "tune", LAYER)
    tuned = add(processes, tune.folder, tmp_path / "store-tune")
    holder = processes.evil_peer(tuned.store)  # an honest one, that counts what it gives

    mine = tmp_path / "store-mine"
    processes.fetch(minilm.id, mine, bootstrap=[minilm_node.addr])
    result = processes.fetch(tuned.id, mine, "--out", tmp_path / "out", bootstrap=[holder.addr])
    document = result.document
    moved = document["bytes_peers"] + document["bytes_origin"]
    assert tune.changed_bytes <= moved < 1.01 * tune.changed_bytes
    assert holder.read_bytes() == pytest.approx(tune.changed_bytes, rel=0.01)
    assert document["bytes_local"] == document["bytes_total"] - moved
    assert document["bytes_wasted"] == 0
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(tune.folder)


def test_a_grown_vocabulary_costs_only_its_new_rows(
    processes: Processes, minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    """Rows appended to the embedding make a tensor of its own; its old chunks are here."""
    grown = make_grown_vocabulary(minilm.folder, tmp_path / "grown", EMBEDDING, rows=3000)
    model = add(processes, grown.folder, tmp_path / "store-grown")
    holder = processes.start_node(model.store)
    holder.wait_ready()

    mine = tmp_path / "store-mine"
    processes.fetch(minilm.id, mine, bootstrap=[minilm_node.addr])
    result = processes.fetch(model.id, mine, "--out", tmp_path / "out", bootstrap=[holder.addr])
    moved = result.document["bytes_peers"]
    # The chunk in which the old rows ended is new as well, and headers and lists come along.
    assert grown.changed_bytes <= moved < grown.changed_bytes + 1.2 * MIB
    assert result.document["bytes_local"] == result.document["bytes_total"] - moved
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(grown.folder)


def test_shared_tensors_come_from_who_holds_another_model(
    processes: Processes, minilm: Model, tmp_path: Path
) -> None:
    """The fine-tune's holder lacks the shared tensors; the base's holder gives them.

    The fetching node knows neither of them, but a node that holds nothing and tells
    nobody of its neighbours: both are found over the DHT that it is a part of.
    """
    tune = make_fine_tune(minilm.folder, tmp_path / "tune", LAYER)
    tuned = add(processes, tune.folder, tmp_path / "store-tune")
    forget_tensors(tuned, but=tune.changed)
    common = processes.evil_peer(tmp_path / "store-common", "--discreet")
    part_holder = processes.start_node(tuned.store, bootstrap=[common.addr])
    base_holder = processes.start_node(minilm.store, bootstrap=[common.addr])
    part_holder.wait_ready()
    base_holder.wait_ready()

    result = processes.fetch(
        tuned.id, tmp_path / "store-new", "--out", tmp_path / "out", bootstrap=[common.addr]
    )
    sources = result.sources()
    assert set(sources) == {part_holder.peer_id, base_holder.peer_id}, (common.peer_id, sources)
    assert sources[part_holder.peer_id]["bytes"] >= tune.changed_bytes
    shared = minilm.size_bytes - tune.changed_bytes
    assert sources[base_holder.peer_id]["bytes"] >= 0.9 * shared
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(tune.folder)


def forget_tensors(model: Model, *, but: Collection[str]) -> None:
    """Drop a model's tensors from its store, but for some names.

    It is then like a store that received no more: their chunk lists go with them.
    """
    with Store(model.store) as store:
        manifest = store.manifest(parse_reference(model.id).digest)
        assert manifest is not None
        names: dict[bytes, set[str]] = {}
        for file in manifest.files:
            for tensor in file.tensors:
                digest = manifest.objects[tensor.object_index].digest
                names.setdefault(digest, set()).add(tensor.name)
        dropped = {digest for digest, here in names.items() if here.isdisjoint(but)}
        dropped |= {ref.chunk_list for ref in manifest.objects if ref.digest in dropped}
        store.forget(list(dropped - {b""}))


def test_only_what_is_included_moves(
    processes: Processes, small: Model, small_node: Node, tmp_path: Path
) -> None:
    """A tensor's name or a file's path chooses; the rest comes later, and only the rest."""
    store = tmp_path / "store"
    result = processes.fetch(small.id, store, "--include", "medium", bootstrap=[small_node.addr])
    assert 6 * MIB <= result.document["bytes_peers"] < 6 * MIB + 64_000
    result = processes.fetch(
        small.id,
        store,
        *("--include", "*.json", "--out", tmp_path / "out"),
        bootstrap=[small_node.addr],
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert result.document["path"] == str(tmp_path / "out")
    assert result.document["bytes_peers"] < 1000

    result = processes.fetch(
        small.id, store, "--out", tmp_path / "out", bootstrap=[small_node.addr]
    )
    rest = small.size_bytes - 6 * MIB
    assert rest - 1000 < result.document["bytes_peers"] < rest + 1000
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(small.folder)

    result = processes.fetch(
        small.id, store, "--include", "no such tensor", bootstrap=[small_node.addr], expected=2
    )
    assert "no such tensor" in result.document["error"]


def test_a_bare_tensor(
    processes: Processes, small: Model, small_node: Node, tmp_path: Path
) -> None:
    """A tensor is fetched by its digest, or by its CID, without any model."""
    info = processes.run("info", small.id, "--tensors", "--store", small.store, "--json")
    tensors = {tensor["name"]: tensor for tensor in info.document["tensor_list"]}
    whole = (small.folder / WEIGHTS).read_bytes()
    store, out = tmp_path / "store", tmp_path / "out"
    for name, key in (("large", "digest"), ("tiny", "cid")):
        tensor = tensors[name]
        result = processes.fetch(tensor[key], store, "--out", out, bootstrap=[small_node.addr])
        assert result.document["model"] == tensor["cid"]
        assert result.document["bytes_peers"] == result.document["bytes_total"]
        data = (out / tensor["cid"]).read_bytes()
        assert len(data) == tensor["size"]
        assert data in whole
        again = processes.fetch(tensor["cid"], store)
        assert again.document["bytes_local"] == again.document["bytes_total"]
    verified = processes.run("verify", tensors["large"]["digest"], "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["ok"]


def test_what_is_complete_needs_no_network(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """A fetch of what is here asks nobody: its only bootstrap leads nowhere."""
    nowhere = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    result = processes.fetch(
        small.id,
        small.store,
        *("--origin", "http://127.0.0.1:1/", "--out", tmp_path / "out"),
        bootstrap=[nowhere],
    )
    assert result.document["sources"] == []
    assert result.document["bytes_local"] == result.document["bytes_total"]
    assert result.document["bytes_peers"] == result.document["bytes_origin"] == 0
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(small.folder)


def test_a_node_on_the_same_store_is_the_bootstrap(
    processes: Processes, small: Model, small_node: Node, tmp_path: Path
) -> None:
    """A fetch without --bootstrap begins with the node that runs on its store."""
    store = tmp_path / "store"
    running = processes.node(store, bootstrap=[small_node.addr])
    result = processes.fetch(small.id, store)
    assert result.sources()[small_node.peer_id]["bytes"] >= small.size_bytes

    # What the command brought in, the running node gives to others.
    result = processes.fetch(small.id, tmp_path / "other", bootstrap=[running.addr])
    assert running.peer_id in result.sources()


def test_two_nodes_on_one_store(processes: Processes, tmp_path: Path) -> None:
    """The second gets an identity of its own, and both give what the store holds."""
    folder = make_random_model(tmp_path / "files", {"weights": 12 * MIB}, seed=2)
    model = add(processes, folder, tmp_path / "store")
    first, second = (processes.node(model.store) for _ in range(2))
    assert first.peer_id != second.peer_id
    result = processes.fetch(model.id, tmp_path / "new", bootstrap=[first.addr, second.addr])
    sources = result.sources()
    assert set(sources) == {first.peer_id, second.peer_id}
    assert all(source["bytes"] > 0 for source in sources.values()), sources

    first.kill()
    third = processes.node(model.store)
    assert third.peer_id == first.peer_id, "the store's identity is free again after a kill"


def test_bootstraps_from_a_file(
    processes: Processes, small: Model, small_node: Node, tmp_path: Path
) -> None:
    """``--bootstrap @FILE`` takes one address a line; blanks and comments are skipped."""
    addresses = tmp_path / "peers.txt"
    addresses.write_text(f"# our peers\n\n  {small_node.addr}  \n")
    result = processes.fetch(
        small.id, tmp_path / "store", "--include", "tiny", bootstrap=[f"@{addresses}"]
    )
    assert list(result.sources()) == [small_node.peer_id]


def test_a_gateway_is_an_origin(processes: Processes, small: Model, tmp_path: Path) -> None:
    """A node's HTTP door serves a model's files as any web server does."""
    gateway = processes.node(small.store, "--http", "127.0.0.1:0")
    slow = processes.evil_peer(small.store, "--rate", "500000")  # or it may have given all
    url = f"{gateway.document['http']}/model/{small.id}"
    result = processes.fetch(
        small.id,
        tmp_path / "store",
        *("--origin", url, "--out", tmp_path / "out"),
        bootstrap=[slow.addr],
    )
    sources = result.sources()
    assert set(sources) == {slow.peer_id, url}
    assert all(source["bytes"] > 0 for source in sources.values()), sources
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(small.folder)


def test_two_fetches_of_one_node_share_what_comes(
    minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    """Each ends well, and together they receive little more than the model."""
    results: list[FetchResult] = []

    async def main() -> None:
        async with PeerNode(tmp_path / "store", bootstrap=[minilm_node.addr], server=False) as node:

            async def fetch() -> None:
                results.append(await node.fetch(minilm.id))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch)
                nursery.start_soon(fetch)

    trio.run(main)
    assert len(results) == 2
    assert all(result.bytes_total >= minilm.size_bytes for result in results)
    with Store(tmp_path / "store") as store:
        manifest = store.manifest(parse_reference(minilm.id).digest)
        assert manifest is not None
        assert not store.missing_objects(manifest, range(len(manifest.objects)))
