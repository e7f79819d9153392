"""Loading tensors: the right numbers, read-only, and not copied."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorswarm.store import load as load_module
from tensorswarm.store.errors import BadInput, StoreDamaged
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.load import Loader, load_tensor, load_tensors
from tensorswarm.store.manifest import ManifestBuilder, NamedTensor, ObjectRef
from tensorswarm.store.mapping import Mapping
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    random_bytes,
    random_model,
    receive_all,
    ref_of,
    write_safetensors,
)

both_ways = pytest.mark.parametrize("copy", [True, False], ids=["copied", "adopted"])

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


def root_of(array: np.ndarray) -> object:
    """Return what an array's memory belongs to at last."""
    base: object = array
    while getattr(base, "base", None) is not None or isinstance(base, memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [6, 140_000], ids=["inline", "in a file"])
@both_ways
def test_every_dtype(store: Store, tmp_path: Path, dtype: str, count: int, copy: bool) -> None:
    kind = np.dtype(DTYPES[dtype])
    values = (1 + np.arange(count) % 2).astype(kind).reshape(2, count // 2)
    path = write_safetensors(
        tmp_path / "m.safetensors", {"a": (dtype, [2, count // 2], values.tobytes())}
    )
    array = load_tensors(store, add_paths(store, [path], copy=copy).manifest)["a"]
    assert array.dtype == kind and array.shape == values.shape
    assert np.array_equal(array.astype(np.float32), values.astype(np.float32))
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 0
    with pytest.raises(ValueError):
        array.flags.writeable = True
    assert isinstance(root_of(array), Mapping if values.nbytes > 65_536 else bytes)


def test_packed_types_are_their_bytes(store: Store, tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, list[int], bytes]] = {
        "rows": ("F4", [3, 4], b"abcdef"),
        "odd rows": ("F4", [2, 3], b"abc"),
        "none": ("F4", [0, 4], b""),
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    loaded = load_tensors(store, add_paths(store, [path]).manifest)
    assert {name: (array.dtype, array.shape) for name, array in loaded.items()} == {
        "rows": (np.uint8, (3, 2)),
        "odd rows": (np.uint8, (3,)),
        "none": (np.uint8, (0, 2)),
    }
    assert loaded["rows"].tobytes() == b"abcdef" and not loaded["rows"].flags.writeable


@both_ways
def test_scalars_and_empty_tensors(store: Store, tmp_path: Path, copy: bool) -> None:
    path = write_safetensors(
        tmp_path / "m.safetensors",
        {
            "scalar": ("F32", [], np.float32(1.5).tobytes()),
            "empty": ("BF16", [3, 0, 2], b""),
            "none": ("I64", [0], b""),
            "one": ("I64", [1, 1, 1], np.int64(-7).tobytes()),
        },
    )
    arrays = load_tensors(store, add_paths(store, [path], copy=copy).manifest)
    assert arrays["scalar"].shape == () and arrays["scalar"] == 1.5
    assert arrays["empty"].shape == (3, 0, 2) and arrays["empty"].dtype == ml_dtypes.bfloat16
    assert arrays["none"].shape == (0,)
    assert arrays["one"].tolist() == [[[-7]]]
    for array in arrays.values():
        assert not array.flags.writeable


@pytest.mark.parametrize("pad", range(8))
def test_unaligned_offsets_in_an_adopted_file(store: Store, tmp_path: Path, pad: int) -> None:
    """A header's length shifts the tensors by any number of bytes; so do odd tensors."""
    values = np.arange(40_000, dtype=np.float64)
    path = write_safetensors(
        tmp_path / "m.safetensors",
        {
            "odd": ("U8", [70_001], random_bytes(70_001)),
            "a": ("F64", [200, 200], values.tobytes()),
        },
        pad=pad,
    )
    array = load_tensors(store, add_paths(store, [path], copy=False).manifest)["a"]
    assert isinstance(root_of(array), Mapping)
    assert np.array_equal(array, values.reshape(200, 200))
    assert (array @ array)[0, 0] == (values.reshape(200, 200) @ values.reshape(200, 200))[0, 0]


@both_ways
def test_arrays_outlive_the_store(store_dir: Path, tmp_path: Path, copy: bool) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 3 * MIB])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=copy).manifest
        arrays = load_tensors(store, manifest)
        expected = {name: array.tobytes() for name, array in arrays.items()}
        store.forget([ref.digest for ref in manifest.objects])
    if not copy:
        path.unlink()
    gc.collect()
    assert {name: array.tobytes() for name, array in arrays.items()} == expected


def test_arrays_share_what_the_store_has(store: Store, tmp_path: Path) -> None:
    """Two arrays of one tensor show one file; nothing was read into memory of their own."""
    path = random_model(tmp_path / "m.safetensors", [200_000])
    manifest = add_paths(store, [path]).manifest
    (ref,) = [ref for ref in manifest.objects if ref.size_bytes == 200_000]
    first, second = (load_tensors(store, manifest)["t0"] for _ in range(2))
    with store.place.object_path(ref.digest).open("r+b") as file:
        file.write(b"\xaa" * 10)  # what no one should do, but it shows
    assert first[:10].tobytes() == second[:10].tobytes() == b"\xaa" * 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_adopted_file_is_mapped_once(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [70_000] * 30)
    manifest = add_paths(store, [path], copy=False).manifest
    arrays = load_tensors(store, manifest)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len([line for line in maps if line.endswith(str(path))]) == 1
    roots = {id(root_of(array)) for array in arrays.values()}
    assert len(arrays) == 30 and len(roots) == 1
    assert np.shares_memory(arrays["t0"], arrays["t0"][1:])


def test_more_tensors_than_maps(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system allows a process so many maps; the rest is read into memory."""
    monkeypatch.setattr(load_module, "MAX_MAPS", 3)
    path = random_model(tmp_path / "m.safetensors", [70_000] * 5)
    arrays = load_tensors(store, add_paths(store, [path]).manifest)
    kinds = [type(root_of(array)) for array in arrays.values()]
    assert kinds.count(Mapping) == 3 and kinds.count(bytes) == 2
    for i, array in enumerate(arrays.values()):
        assert array.tobytes() == random_bytes(70_000, i)
        assert not array.flags.writeable


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_maps_hold_no_descriptors_and_go_with_their_arrays(store: Store, tmp_path: Path) -> None:
    """A process may have some 1,000 files open, and a model has more tensors than that."""
    path = random_model(tmp_path / "m.safetensors", [70_000] * 10)
    manifest = add_paths(store, [path]).manifest
    store.has(manifest.objects[0].digest)

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(store.root / "objects"))

    descriptors = len(os.listdir("/proc/self/fd"))
    arrays = load_tensors(store, manifest)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert maps() == 10
    part = arrays["t0"][5:10]
    del arrays
    gc.collect()
    assert maps() == 1
    assert part.tobytes() == random_bytes(70_000, 0)[5:10]


def test_mapping_that_fails(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "empty").open("rb") as file, pytest.raises(OSError):
        Mapping(file.fileno(), 0)
    with pytest.raises(OSError):
        Mapping(-1, 100)


def test_choosing(store: Store, tmp_path: Path) -> None:
    one = write_safetensors(
        tmp_path / "one.safetensors",
        {"a": ("U8", [1], b"1"), "b": ("U8", [1], b"2"), "same": ("U8", [1], b"s")},
    )
    two = write_safetensors(
        tmp_path / "two.safetensors",
        {"a": ("U8", [1], b"9"), "c": ("U8", [1], b"3"), "same": ("U8", [1], b"s")},
    )
    manifest = add_paths(store, [one, two]).manifest
    assert set(load_tensors(store, manifest, ["two.safetensors"])) == {"a", "c", "same"}
    assert load_tensors(store, manifest, ["two.safetensors"])["a"].tobytes() == b"9"
    assert set(load_tensors(store, manifest, ["b", "same"])) == {"b", "same"}
    with pytest.raises(BadInput, match="'a' names different tensors"):
        load_tensors(store, manifest)
    with pytest.raises(BadInput, match="no tensor matches"):
        load_tensors(store, manifest, ["nothing"])
    tensor = manifest.file_by_path["one.safetensors"].tensors[0]
    assert load_tensor(store, manifest, tensor).tobytes() == b"1"


def test_tensor_that_is_not_here(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000])
    manifest = add_paths(store, [path]).manifest
    store.forget([manifest.objects[manifest.files[0].tensors[1].object_index].digest])
    with pytest.raises(StoreDamaged, match="fetch the model first"):
        load_tensors(store, manifest)
    assert set(load_tensors(store, manifest, ["t0"])) == {"t0"}


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_object(store: Store, tmp_path: Path, damage: str) -> None:
    data = random_bytes(200_000, 0)
    path = random_model(tmp_path / "m.safetensors", [200_000])
    manifest = add_paths(store, [path]).manifest
    stored = store.place.object_path(ref_of(data).digest)
    if damage == "cut":
        os.truncate(stored, 1000)
    else:
        stored.unlink()
    with pytest.raises(StoreDamaged):
        load_tensors(store, manifest)
    receive_all(store, data)
    assert load_tensors(store, manifest)["t0"].tobytes() == data


def test_changed_adopted_file(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000])
    manifest = add_paths(store, [path], copy=False).manifest
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(StoreDamaged):
        load_tensors(store, manifest)


def test_file_replaced_between_the_look_and_the_map(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [200_000])
    manifest = add_paths(store, [path], copy=False).manifest
    real = load_module.Mapping

    def meddling(descriptor: int, size_bytes: int) -> Mapping:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        return real(descriptor, size_bytes)

    monkeypatch.setattr(load_module, "Mapping", meddling)
    with pytest.raises(StoreDamaged, match="changed since"):
        load_tensors(store, manifest)


def test_model_that_lies_about_a_size(store: Store) -> None:
    """The digest is here, with fewer bytes than the model's shape would read."""
    store.put_blob(bytes(100_000))
    builder = ManifestBuilder()
    lie = ObjectRef(ref_of(bytes(100_000)).digest, 200_000, b"")
    builder.add_file("m.safetensors", "safetensors", [lie], [("a", "U8", [200_000], lie)])
    manifest = builder.build()
    with pytest.raises(StoreDamaged, match="another size"):
        load_tensors(store, manifest)


def test_loader_takes_one_at_a_time(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 70_000, 80_000])
    manifest = add_paths(store, [path], copy=False).manifest
    loader = Loader(store, manifest)
    tensors: Sequence[NamedTensor] = manifest.files[0].tensors
    for i, size in enumerate((100, 70_000, 80_000)):
        assert loader.load(tensors[i]).tobytes() == random_bytes(size, i)
