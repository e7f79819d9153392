"""One real model in many formats, between real nodes: each tensor is kept and moved once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e.conftest import add
from tests.support.format_files import (
    import_torch,
    write_gguf,
    write_npz,
    write_onnx,
    write_safetensors,
    write_sharded,
    write_tfjs,
    write_torch,
)
from tests.support.model_files import WEIGHTS, read_safetensors, sha256_of_files
from tests.support.swarm_processes import Processes
from tests.support.tfjs_library import read_with_tfjs, write_with_tfjs

pytestmark = pytest.mark.e2e

FORMATS = {
    "safetensors": write_safetensors,
    "npz": write_npz,
    "torch": write_torch,
    "onnx": write_onnx,
    "gguf": write_gguf,
    "tfjs": write_with_tfjs,
    "tfjs-shards": write_tfjs,
}

MAX_HEADER_BYTES = 200_000
"""What a form may have of its own: a header, archive entries and a manifest for some
hundred tensors, chunk lists of the large ones. The tensors are 90 MB."""


@pytest.fixture(scope="module")
def arrays(minilm_dir: Path) -> dict[str, NDArray[Any]]:
    tensors = read_safetensors(minilm_dir / WEIGHTS)
    return {name: array for name, array in tensors.items() if array.dtype == np.float32}


@pytest.mark.deadline(240)
def test_every_format_of_one_model(
    processes: Processes, arrays: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    """The second and later forms cost their headers: on disk, and on the way to another node."""
    import_torch()
    total = sum(array.nbytes for array in arrays.values())
    store, mine = tmp_path / "store", tmp_path / "mine"
    ids, weights = {}, set()
    for number, (name, write) in enumerate(FORMATS.items()):
        (tmp_path / name).mkdir()
        write(tmp_path / name, arrays)
        completed = processes.run("add", tmp_path / name, "--store", store, "--json")
        document = completed.document
        ids[name] = document["model"]
        weights.add(document["weights"])
        assert document["tensors"] == len(arrays)
        if number:
            assert document["new_bytes"] < MAX_HEADER_BYTES, name
        shown = processes.run("info", document["model"], "--store", store, "--json").document
        assert shown["weights"] == document["weights"]
    assert len(weights) == 1
    node = processes.node(store)
    for number, name in enumerate(FORMATS):
        out = tmp_path / f"{name}-out"
        result = processes.fetch(ids[name], mine, "--out", out, bootstrap=[node.addr]).document
        if number:
            assert result["bytes_peers"] < MAX_HEADER_BYTES, name
        else:
            assert result["bytes_peers"] >= total
        assert sha256_of_files(out) == sha256_of_files(tmp_path / name), name
    for name in ("tfjs", "tfjs-shards"):
        found = read_with_tfjs(tmp_path / f"{name}-out")
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[each], arrays[each]) for each in arrays)


def test_resharded_model_moves_no_tensor_twice(
    processes: Processes, arrays: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    """Single file, three shards, five shards: headers alone are new."""
    store, mine = tmp_path / "store", tmp_path / "mine"
    models = {}
    for name, shards in (("single", 0), ("three", 3), ("five", 5)):
        (tmp_path / name).mkdir()
        if shards:
            write_sharded(tmp_path / name, arrays, shards)
        else:
            write_safetensors(tmp_path / name, arrays)
        models[name] = add(processes, tmp_path / name, store, "--no-copy")
    node = processes.node(store)
    moved = {}
    for name, model in models.items():
        out = tmp_path / f"{name}-out"
        result = processes.fetch(model.id, mine, "--out", out, bootstrap=[node.addr]).document
        moved[name] = result["bytes_peers"]
        assert sha256_of_files(out) == sha256_of_files(tmp_path / name), name
    assert max(moved["three"], moved["five"]) < MAX_HEADER_BYTES
