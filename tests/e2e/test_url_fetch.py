"""Models at a plain web server, by URL: stamped, with a sidecar, or neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e.conftest import add, assert_one_error
from tests.support.format_files import (
    write_gguf,
    write_npz_compressed,
    write_onnx,
    write_onnx_external,
    write_safetensors,
    write_sharded,
    write_tfjs,
)
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

Arrays = dict[str, NDArray[Any]]

HEADERS = 40_000
"""Most bytes of header, stamp and manifest for these few tensors."""


def some_arrays() -> Arrays:
    generator = np.random.default_rng(0)
    return {f"layer.{i}": generator.standard_normal(700_000).astype(np.float32) for i in range(3)}


def base_and_tune(folder: Path, write: Any) -> tuple[Path, Path, int]:
    """Write a base, and a model that differs in one tensor; return the size of that."""
    arrays = some_arrays()
    for name in ("base", "site"):
        (folder / name).mkdir()
    write(folder / "base", arrays)
    arrays["layer.1"] = arrays["layer.1"] + 1
    write(folder / "site", arrays)
    return folder / "base", folder / "site", arrays["layer.1"].nbytes


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_safetensors, "model.safetensors"),
        (write_gguf, "model.gguf"),
        (write_onnx, "model.onnx"),
        (write_onnx_external, "model.onnx"),
        (write_tfjs, "model.json"),  # the tensor that differs lies in two shards
        (write_sharded, "model.safetensors.index.json"),
    ],
)
def test_stamped_file_costs_its_header_and_what_is_missing(
    write: Any, name: str, processes: Processes, tmp_path: Path
) -> None:
    base, site, changed = base_and_tune(tmp_path, write)
    completed = processes.run("stamp", site / name, "--out", tmp_path / name, "--json")
    assert completed.exit_code == 0, completed
    (tmp_path / name).replace(site / name)
    add(processes, base, tmp_path / "store")
    origin = processes.nginx(site)
    out = tmp_path / "out"
    result = processes.fetch(f"{origin.url}/{name}", tmp_path / "store", "--out", out).document
    for path in site.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert changed <= served < changed + HEADERS
    assert changed <= result["bytes_origin"] < changed + HEADERS
    assert result["model"] == add(processes, site, tmp_path / "check").id


def test_stamped_onnx_of_many_tensors(processes: Processes, tmp_path: Path) -> None:
    """What lies between the tensors is asked for, and little of them."""
    generator = np.random.default_rng(0)
    arrays: Arrays = {
        f"encoder.layer.{i}.attention.output.dense.weight": generator.standard_normal(
            (64, 96 * (1 + i % 3))
        ).astype(np.float32)
        for i in range(60)
    }
    arrays["shape"] = np.array([1, -1, 384], np.int64)
    site, base = tmp_path / "site", tmp_path / "base"
    base.mkdir()
    site.mkdir()
    write_onnx(base, arrays)
    arrays["encoder.layer.7.attention.output.dense.weight"] += 1
    changed = arrays["encoder.layer.7.attention.output.dense.weight"].nbytes
    write_onnx(tmp_path, arrays)
    processes.run("stamp", tmp_path / "model.onnx", "--out", site / "model.onnx", "--json")
    add(processes, base, tmp_path / "store")
    origin = processes.nginx(site)
    out = tmp_path / "out"
    processes.fetch(f"{origin.url}/model.onnx", tmp_path / "store", "--out", out)
    assert (out / "model.onnx").read_bytes() == (site / "model.onnx").read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    size = (site / "model.onnx").stat().st_size
    headers = size - sum(array.nbytes for array in arrays.values())
    assert served < changed + headers + 61 * 512 + 4096


@pytest.mark.parametrize(
    ("write", "name"), [(write_onnx_external, "model.onnx"), (write_tfjs, "model.json")]
)
def test_unstamped_model_of_several_files(
    write: Any, name: str, processes: Processes, tmp_path: Path
) -> None:
    _, site, _ = base_and_tune(tmp_path, write)
    origin = processes.nginx(site)
    out = tmp_path / "out"
    result = processes.fetch(f"{origin.url}/{name}", tmp_path / "store", "--out", out).document
    for path in site.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    size = sum(path.stat().st_size for path in site.iterdir())
    assert size <= served < size + 5000
    assert result["model"] == add(processes, site, tmp_path / "check").id


def test_sidecar_of_a_folder_with_a_tensor_in_two_shards(
    processes: Processes, tmp_path: Path
) -> None:
    base, site, changed = base_and_tune(tmp_path, write_tfjs)
    assert processes.run("manifest", site, "--json").exit_code == 0
    add(processes, base, tmp_path / "store")
    origin = processes.nginx(site)
    out = tmp_path / "out"
    processes.fetch(f"{origin.url}/", tmp_path / "store", "--out", out)
    for path in site.glob("*.bin"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert changed <= served < changed + HEADERS


def test_sidecar_of_a_compressed_model(processes: Processes, tmp_path: Path) -> None:
    """Its tensors cannot be asked for by range: it is downloaded once."""
    _, site, _ = base_and_tune(tmp_path, write_npz_compressed)
    assert processes.run("manifest", site / "model.npz", "--json").exit_code == 0
    origin = processes.nginx(site)
    out = tmp_path / "out"
    url = f"{origin.url}/model.npz"
    for _ in range(2):  # the second time there is nothing to download
        processes.fetch(url, tmp_path / "store", "--out", out)
    assert (out / "model.npz").read_bytes() == (site / "model.npz").read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert served < (site / "model.npz").stat().st_size + HEADERS


def test_sidecar_costs_itself_and_what_is_missing(processes: Processes, tmp_path: Path) -> None:
    base, site, changed = base_and_tune(tmp_path, write_safetensors)
    name = "model.safetensors"
    assert processes.run("manifest", site / name, "--json").exit_code == 0
    add(processes, base, tmp_path / "store")
    origin = processes.nginx(site)
    out = tmp_path / "out"
    processes.fetch(f"{origin.url}/{name}", tmp_path / "store", "--out", out)
    assert (out / name).read_bytes() == (site / name).read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert changed <= served < changed + HEADERS


def test_neither_is_downloaded_once_and_fills_the_store(
    processes: Processes, tmp_path: Path
) -> None:
    _, site, _ = base_and_tune(tmp_path, write_safetensors)
    name = "model.safetensors"
    origin = processes.nginx(site)
    size = (site / name).stat().st_size
    out = tmp_path / "out"
    result = processes.fetch(f"{origin.url}/{name}", tmp_path / "store", "--out", out).document
    assert (out / name).read_bytes() == (site / name).read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert size <= served < size + 1000
    assert result["model"] == add(processes, site, tmp_path / "check").id
    assert add(processes, site, tmp_path / "store").id == result["model"]


def test_index_of_stamped_shards(processes: Processes, tmp_path: Path) -> None:
    base, site, changed = base_and_tune(tmp_path, write_sharded)
    for path in sorted(site.glob("*.safetensors")):
        processes.run("stamp", path, "--out", tmp_path / "copy", "--json")
        (tmp_path / "copy").replace(path)
    add(processes, base, tmp_path / "store")
    origin = processes.nginx(site)
    url = f"{origin.url}/model.safetensors.index.json"
    out = tmp_path / "out"
    processes.fetch(url, tmp_path / "store", "--out", out)
    for path in site.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    served = sum(request.body_bytes for request in origin.stop())
    assert changed <= served < changed + HEADERS


def test_false_stamp_does_no_harm(processes: Processes, tmp_path: Path) -> None:
    """A stamp that names other bytes than the file has: refused, and nothing false kept."""
    _, site, _ = base_and_tune(tmp_path, write_safetensors)
    name = "model.safetensors"
    processes.run("stamp", site / name, "--out", tmp_path / name, "--json")
    data = bytearray((tmp_path / name).read_bytes())
    data[-5] ^= 1
    (site / name).write_bytes(data)
    origin = processes.nginx(site)
    completed = processes.run(
        *(
            "fetch",
            f"{origin.url}/{name}",
            "--store",
            tmp_path / "store",
            "--timeout",
            "5",
            "--json",
        )
    )
    assert completed.exit_code in (3, 5), completed
    verified = processes.run("verify", "--store", tmp_path / "store", "--json").document
    assert verified["ok"]


def test_urls_of_no_use(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "bad.safetensors").write_text(json.dumps({"not": "a model"}))
    origin = processes.nginx(tmp_path / "site")
    for path, exit_code in (("missing.safetensors", 3), ("bad.safetensors", 2), ("", 3)):
        completed = processes.run(
            "fetch", f"{origin.url}/{path}", "--store", tmp_path / "store", "--json"
        )
        assert_one_error(completed, exit_code)
