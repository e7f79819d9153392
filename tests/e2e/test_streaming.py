"""What comes first, what can be used early, and a node as another's origin."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import tensorswarm
from tensorswarm.refs import parse_ref
from tensorswarm.store.errors import BadInput
from tensorswarm.store.store import Store
from tests.e2e.conftest import MIB, Model, add, copy_of
from tests.support.model_files import WEIGHTS, make_random_model, read_safetensors, sha256_of_files
from tests.support.swarm_processes import Node, Processes

pytestmark = pytest.mark.e2e


def test_a_stream_gives_every_tensor_in_the_order_asked(
    minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    expected = read_safetensors(minilm.folder / WEIGHTS)
    got = list(
        tensorswarm.stream(
            minilm.id,
            store=tmp_path / "store",
            bootstrap=[minilm_node.addr],
            first=["pooler.*", "encoder.layer.5.*"],
        )
    )
    names = [name for name, _ in got]
    assert sorted(names) == sorted(expected)
    pooler = [name for name in names if name.startswith("pooler.")]
    layer = [name for name in names if name.startswith("encoder.layer.5.")]
    assert names[: len(pooler) + len(layer)] == pooler + layer
    for name, array in got:
        assert np.array_equal(array, expected[name]), name


def test_the_first_tensor_is_there_before_the_last_has_been_sent(
    processes: Processes, tmp_path: Path
) -> None:
    """A slow peer: leaving the loop after one tensor leaves most bytes unsent."""
    folder = make_random_model(
        tmp_path / "model", {f"layer.{i}.weight": 2 * MIB for i in range(12)}, seed=5
    )
    model = add(processes, folder, tmp_path / "seed")
    peer = processes.evil_peer(model.store, "--rate", str(8 * MIB))
    stream = tensorswarm.stream(
        model.id, store=tmp_path / "store", bootstrap=[peer.addr], first=["layer.9.*"]
    )
    name, _ = next(stream)
    stream.close()
    assert name == "layer.9.weight"
    assert peer.read_bytes() < 20 * MIB
    with Store(tmp_path / "store") as store:
        manifest = store.manifest(parse_ref(model.id).digest)
        assert manifest is not None
        kept = len(manifest.objects) - len(
            store.missing_objects(manifest, range(len(manifest.objects)))
        )
    assert kept >= 1, "what was proved is kept"


def test_a_stream_of_what_is_here_needs_nobody(minilm: Model, tmp_path: Path) -> None:
    store = copy_of(minilm, tmp_path / "store")
    names = [name for name, _ in tensorswarm.stream(minilm.id, store=store)]
    assert sorted(names) == sorted(read_safetensors(minilm.folder / WEIGHTS))


def test_a_stream_says_why_it_fails(minilm: Model, tmp_path: Path) -> None:
    with pytest.raises(tensorswarm.TensorswarmError, match="nobody to ask"):
        next(tensorswarm.stream(minilm.id, store=tmp_path / "store"))
    with pytest.raises(BadInput, match="no file and no tensor"):
        next(tensorswarm.stream(minilm.id, store=minilm.store, first=["nothing.like.it"]))


def test_fetch_first_is_checked(
    processes: Processes, minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    refused = processes.fetch(
        minilm.id,
        tmp_path / "store",
        *("--first", "nothing.like.it"),
        bootstrap=[minilm_node.addr],
        expected=2,
    )
    assert "nothing.like.it" in refused.document["error"]
    processes.fetch(
        minilm.id, tmp_path / "store", "--first", "*.json", bootstrap=[minilm_node.addr]
    )


def test_a_node_is_another_nodes_origin(
    processes: Processes, minilm: Model, tmp_path: Path
) -> None:
    """The HTTP gateway gives files and tensors by hash, by ranges, and nothing else."""
    node = processes.node(copy_of(minilm, tmp_path / "seed"), "--http", "127.0.0.1:0")
    url = node.document["http"]
    whole = (minilm.folder / "config.json").read_bytes()
    base = f"{url}/model/{minilm.id}"
    with urllib.request.urlopen(f"{base}/config.json", timeout=10) as answer:
        assert answer.read() == whole
    request = urllib.request.Request(f"{base}/config.json", headers={"Range": "bytes=3-9"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert (answer.status, answer.read()) == (206, whole[3:10])
    for path in ("", "/", f"/model/{minilm.id}", f"/model/{minilm.id}/../x", "/tensor/zz"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + path, timeout=10)

    result = processes.fetch(
        minilm.id,
        tmp_path / "store",
        *("--origin", f"{base}/", "--out", tmp_path / "out"),
        bootstrap=[node.addr],
    )
    assert result.sources()[f"{base}/"]["bytes"] > 0
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(minilm.folder)


def test_a_false_size_does_not_keep_a_bare_tensor_away(
    processes: Processes, minilm: Model, minilm_node: Node, tmp_path: Path
) -> None:
    """Asked by digest alone, what one liar says of its size is only tried, not believed."""
    with Store(minilm.store) as store:
        manifest = store.manifest(parse_ref(minilm.id).digest)
        assert manifest is not None
        ref = max(
            (manifest.objects[i] for i in manifest.tensor_indices), key=lambda r: r.size_bytes
        )
    liar = processes.evil_peer(copy_of(minilm, tmp_path / "liar"), "--false-size", "1000")
    result = processes.fetch(
        ref.digest.hex(),
        tmp_path / "store",
        bootstrap=[liar.addr, minilm_node.addr],
    )
    assert result.document["bytes_total"] >= ref.size_bytes
    with Store(tmp_path / "store") as store:
        assert store.has(ref.digest)
