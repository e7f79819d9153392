"""Every format through the same cases: the same tensors, and the same file again.

Each format's own library writes the file. What has to hold for all of them: each array is
listed with its name, dtype and shape; its digest is that of its little-endian bytes in C
order, so it is equal in every format; what is loaded is equal; every file comes out of
another store bit for bit, when only the objects were carried there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorswarm.store.digest import digest_of
from tensorswarm.store.export import export_files
from tensorswarm.store.ingest import add_paths, describe_paths
from tensorswarm.store.load import load_tensors
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tests.support.format_files import WRITERS, Writer
from tests.support.store_world import files_below

Arrays = dict[str, NDArray[Any]]

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
}


def some(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> NDArray[Any]:
    generator = np.random.default_rng(seed)
    return np.asarray(generator.standard_normal(shape) * 50).astype(DTYPES[dtype])


def case_every_dtype(writer: Writer) -> Arrays:
    return {f"t.{name}": some((5, 3), name) for name in sorted(writer.dtypes)}


def case_one_tensor(writer: Writer) -> Arrays:
    return {"only": some((7,))}


def case_many_dimensions(writer: Writer) -> Arrays:
    count = 4 if writer.name == "gguf" else 6
    return {"deep": some((2, 1, 3, 2, 1, 2)[:count])}


def case_scalar(writer: Writer) -> Arrays:
    if not writer.takes_scalars:
        return {"scalar": some((1,))}
    return {"scalar": some(()), "other": some((2,))}


def case_empty(writer: Writer) -> Arrays:
    if not writer.takes_empty:
        return {"full": some((3,))}
    return {"a": some((3,)), "none": some((0, 4)), "b": some((2, 2), seed=1)}


def case_equal_bytes(writer: Writer) -> Arrays:
    return {"a": some((4, 4)), "same": some((4, 4)), "z": np.zeros((4, 4), np.float32)}


def case_strange_names(writer: Writer) -> Arrays:
    names = ["weight", "layer.0/attention", "Ünïcode-名前", "with space", "a" * 60]
    if writer.name == "npy":
        names = ["weight", "Ünïcode-名前", "with space"]
    return {name: some((3, i + 1), seed=i) for i, name in enumerate(names)}


def case_larger_than_a_chunk(writer: Writer) -> Arrays:
    if writer.name == "tfjs-small-shards":
        return {"big": some((700, 3))}
    return {"big": some((700, 500)), "small": some((9,), seed=1), "next": some((300_001,), seed=2)}


def case_compressible(writer: Writer) -> Arrays:
    return {"zeros": np.zeros((400, 300 if "small" not in writer.name else 1), np.float32)}


CASES = [value for name, value in sorted(globals().items()) if name.startswith("case_")]


def write(writer: Writer, arrays: Arrays, folder: Path) -> Path:
    folder.mkdir()
    writer.write(folder, arrays)
    return folder


def tensors_of(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        tensor.name: (tensor.dtype, tensor.shape, manifest.digest_of(tensor.object_index))
        for file in manifest.files
        for tensor in file.tensors
    }


def carry(source: Store, manifest: Manifest, target: Store) -> int:
    """Copy a model's objects as a network would, those that are missing; return the bytes."""
    moved = 0
    for index in target.missing_objects(manifest, range(len(manifest.objects))):
        ref = manifest.objects[index]
        data = source.get_blob(ref.digest, 1 << 40)
        assert data is not None
        target.put_blob(data)
        moved += len(data)
    target.put_manifest(manifest, "")
    return moved


@pytest.mark.parametrize("case", CASES, ids=[case.__name__[5:] for case in CASES])
@pytest.mark.parametrize("writer", WRITERS, ids=[writer.name for writer in WRITERS])
def test_format(writer: Writer, case: Any, tmp_path: Path) -> None:
    arrays = case(writer)
    folder = write(writer, arrays, tmp_path / "model")
    with Store(tmp_path / "store") as store, Store(tmp_path / "other") as other:
        manifest = add_paths(store, [folder]).manifest
        listed = tensors_of(manifest)
        assert sorted(listed) == sorted(arrays)
        for name, array in arrays.items():
            assert listed[name][1] == array.shape
            assert listed[name][2] == digest_of(array.tobytes()), name
        loaded = load_tensors(store, manifest)
        for name, array in arrays.items():
            if array.dtype.name == "bfloat16" and not writer.bfloat16_is_named:
                assert loaded[name].tobytes() == array.tobytes()
                continue
            np.testing.assert_array_equal(loaded[name], array)
            assert loaded[name].dtype == array.dtype
            assert not loaded[name].flags.writeable
        carry(store, manifest, other)
        export_files(other, manifest, manifest.files, tmp_path / "out")
        again = Manifest.decode(manifest.encode())
        assert again == manifest
    assert describe_paths([folder]) == manifest
    assert files_below(tmp_path / "out") == files_below(folder)
    for name in files_below(folder):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("writer", WRITERS, ids=[writer.name for writer in WRITERS])
def test_added_where_it_lies(writer: Writer, tmp_path: Path) -> None:
    arrays = {"a": some((300, 250)), "b": some((40_000,), seed=1)}
    folder = write(writer, {k: v[:60] for k, v in arrays.items()}, tmp_path / "model")
    with Store(tmp_path / "store") as store:
        manifest = add_paths(store, [folder], copy=False).manifest
        assert manifest == describe_paths([folder])
        export_files(store, manifest, manifest.files, tmp_path / "out")
        for name, array in load_tensors(store, manifest).items():
            np.testing.assert_array_equal(array, arrays[name][:60])
    for name in files_below(folder):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_form_after_the_first_adds_only_its_headers(dtype: str, tmp_path: Path) -> None:
    arrays = {f"layer.{i}": some((120, 100 + i), dtype, seed=i) for i in range(4)}
    total = sum(array.nbytes for array in arrays.values())
    writers = [w for w in WRITERS if dtype in w.dtypes and "small" not in w.name]
    weights = set()
    with Store(tmp_path / "store") as store:
        for number, writer in enumerate(writers):
            added = add_paths(store, [write(writer, arrays, tmp_path / writer.name)])
            weights.add(added.manifest.weights_digest)
            if number:
                assert added.new_bytes < 8000, writer.name
            else:
                assert added.new_bytes >= total
    assert len(weights) == 1
