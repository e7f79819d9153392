"""Loading into PyTorch and lazily, from every format."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tensorswarm
from tensorswarm.store.errors import BadInput
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.load import LazyTensors, load_tensors
from tensorswarm.store.store import Store
from tests.support.format_files import WRITERS, Writer, import_torch


@pytest.mark.parametrize("writer", WRITERS, ids=[writer.name for writer in WRITERS])
def test_torch_tensors(writer: Writer, tmp_path: Path) -> None:
    torch = import_torch()
    arrays = {
        "large": np.arange(40_000 if "small" not in writer.name else 100, dtype=np.float32),
        # TensorFlow.js itself has no 16-bit floats.
        "matrix": np.arange(12).astype("i4" if writer.name == "tfjs" else "f2").reshape(3, 4),
    }
    (tmp_path / "m").mkdir()
    writer.write(tmp_path / "m", arrays)
    loaded = tensorswarm.load(str(tmp_path / "m"), store=tmp_path / "store", framework="pt")
    for name, array in arrays.items():
        assert torch.equal(loaded[name], torch.from_numpy(array.copy())), name


def test_written_tensor_stays_ours(tmp_path: Path) -> None:
    torch = import_torch()
    array = np.arange(100_000, dtype=np.float32)
    np.savez(tmp_path / "m.npz", a=array, b=np.ones(3, np.float32))
    before = (tmp_path / "m.npz").read_bytes()
    for copy in (True, False):
        with Store(tmp_path / f"store-{copy}") as store:
            manifest = add_paths(store, [tmp_path / "m.npz"], copy=copy).manifest
            tensors = load_tensors(store, manifest, framework="pt")
            for tensor in tensors.values():
                tensor.mul_(2)
            assert torch.equal(tensors["a"], torch.from_numpy(array * 2))
            again = load_tensors(store, manifest)
            np.testing.assert_array_equal(again["a"], array)
            np.testing.assert_array_equal(again["b"], np.ones(3))
    assert (tmp_path / "m.npz").read_bytes() == before


def test_types_of_torch(tmp_path: Path) -> None:
    torch = import_torch()
    from safetensors.torch import save_file

    tensors = {
        "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "f8": torch.ones(4).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(5),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    loaded = tensorswarm.load(
        str(tmp_path / "m.safetensors"), store=tmp_path / "store", framework="pt"
    )
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].float(), tensor.float())


def test_lazily(tmp_path: Path) -> None:
    arrays = {"layer.0": np.zeros(50_000, np.float32), "layer.1": np.ones(3, np.float32)}
    np.savez(tmp_path / "m.npz", **arrays, other=np.ones(2, ml_dtypes.bfloat16))  # type: ignore[arg-type]
    with tensorswarm.load(
        str(tmp_path / "m.npz"), store=tmp_path / "store", lazy=True, include=["layer.*"]
    ) as tensors:
        assert isinstance(tensors, LazyTensors)
        assert sorted(tensors) == ["layer.0", "layer.1"]
        assert len(tensors) == 2
        kept = tensors["layer.0"]
        with pytest.raises(KeyError):
            tensors["other"]
    np.testing.assert_array_equal(kept, arrays["layer.0"])  # valid after the store is closed


def test_unknown_framework(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(BadInput, match="framework"):
        tensorswarm.load(str(tmp_path / "a.npy"), store=tmp_path / "store", framework="jax")
