"""What only one format has: views and hostile pickles, typed fields, shard borders, and more."""

from __future__ import annotations

import collections
import fractions
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tensorswarm
from tensorswarm.store import recipes
from tensorswarm.store.digest import digest_of
from tensorswarm.store.dtypes import tensor_size_bytes
from tensorswarm.store.errors import BadInput
from tensorswarm.store.export import export_files
from tensorswarm.store.formats import layout_of, tile
from tensorswarm.store.formats import torch_zip as checkpoints
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.load import load_tensors
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tests.support.format_files import import_torch, onnx_model, write_sharded, write_tfjs
from tests.support.tools import require_module

Array = NDArray[Any]


def some(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_file(path: Path, arrays: dict[str, Array], work: Path) -> Manifest:
    """Add a file, and assert that it holds these tensors and comes out bit for bit."""
    with Store(work / "store") as store:
        manifest = add_paths(store, [path]).manifest
        digests = {
            t.name: manifest.digest_of(t.object_index) for f in manifest.files for t in f.tensors
        }
        assert digests == {name: digest_of(array.tobytes()) for name, array in arrays.items()}
        for name, array in load_tensors(store, manifest).items():
            np.testing.assert_array_equal(array, arrays[name])
        export_files(store, manifest, manifest.files, work / "out")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        assert (work / "out" / name).read_bytes() == file.read_bytes()
    return manifest


def total_bytes(manifest: Manifest) -> int:
    return sum(ref.size_bytes for ref in manifest.objects)


# ---- PyTorch


def test_views_of_one_storage(tmp_path: Path) -> None:
    torch = import_torch()

    base = torch.arange(2000, dtype=torch.float32).reshape(40, 50)
    other = torch.arange(600, dtype=torch.float32).reshape(20, 30) + 0.5
    third = torch.arange(900, dtype=torch.float32) + 0.25
    tensors = {
        "base": base,
        "tied": base,
        "rows": base[10:20],
        "column": base[:, 3],
        "transposed beside": base.t(),
        "every other": base[::2, 1::3],
        "transposed alone": other.t(),
        "overlap a": third[:600],
        "overlap b": third[300:],
        "expanded": torch.tensor([1.5]).expand(7, 3),
        "permuted": torch.arange(120.0).reshape(2, 3, 4, 5).permute(3, 1, 0, 2),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    torch.save(tensors, tmp_path / "views.pt")
    manifest = check_file(
        tmp_path / "views.pt", {name: t.numpy() for name, t in tensors.items()}, tmp_path
    )
    assert total_bytes(manifest) < 2000 * 4 + 600 * 4 + 900 * 4 + 480 + 8000  # once each


def test_views_in_a_file_that_torch_wrote_once(tmp_path: Path) -> None:
    """The same without PyTorch; `tests/vectors/README.md` says how it was made."""
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    other = np.arange(12, dtype=np.float32).reshape(3, 4) + np.float32(0.5)
    arrays: dict[str, Array] = {
        "base": base,
        "tied": base,
        "rows": base[2:4],
        "every other": base[::2, 1::3],
        "nested.transposed": other.T,
        "nested.list.0": np.arange(5),
        "scalar": np.array(3.5, np.float32),
    }
    check_file(Path(__file__).parents[1] / "vectors" / "views.pt", arrays, tmp_path)


def test_checkpoint_with_a_large_scattered_tensor_is_kept_verbatim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better none of its tensors than all but one; limits of bytes instead of a gigabyte."""
    for module in (recipes, tile, checkpoints):
        monkeypatch.setattr(module, "MAX_STRIDED_BYTES", 200)
    path = Path(__file__).parents[1] / "vectors" / "views.pt"
    check_file(path, {}, tmp_path)
    with Store(tmp_path / "noted") as store:
        added = add_paths(store, [path])
    assert [file.format for file in added.manifest.files] == ["verbatim"]
    assert len(added.notes) == 1
    assert re.search(r"views\.pt: kept whole, .*'every other' is not contig", added.notes[0])


def test_parts_of_a_fused_weight_are_tensors_of_their_own(tmp_path: Path) -> None:
    torch = import_torch()

    fused = torch.arange(3000, dtype=torch.float32).reshape(30, 100)
    q, k, v = fused.split(10)
    torch.save({"q": q, "k": k, "v": v}, tmp_path / "qkv.pt")
    manifest = check_file(
        tmp_path / "qkv.pt", {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}, tmp_path
    )
    assert len(manifest.tensor_indices) == 3


def test_what_a_training_run_saves(tmp_path: Path) -> None:
    torch = import_torch()

    layer = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    state = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "note": "fine",
        "loss": 0.25,
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "float8": torch.ones(4).to(torch.float8_e4m3fn),
        "large": 1 << 60,
        "history": [1, 2.5, None, True, (3, b"x")],
    }
    torch.save(state, tmp_path / "run.ckpt")
    with Store(tmp_path / "store") as store:
        manifest = add_paths(store, [tmp_path / "run.ckpt"]).manifest
        loaded = load_tensors(store, manifest)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(loaded[f"model.{name}"], value.numpy())
    assert {"optimizer.state.0.exp_avg", "parameter", "float8"} <= loaded.keys()


def torch_zip(path: Path, pickled: bytes, storages: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return path


class Caller:
    """Pickles as a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "os.system": Caller(os.system, ("touch ran",)),
    "eval": Caller(eval, ("open('ran', 'w')",)),
    "open": Caller(open, ("ran", "w")),
    "a file opened inside": {"a": [1, Caller(open, ("ran", "w"))]},
    "a class": collections.Counter("abc"),
    "a plain object": fractions.Fraction(1, 3),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("what", HOSTILE)
def test_pickle_that_calls_anything_is_refused_and_nothing_runs(
    what: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = torch_zip(tmp_path / "evil.pt", pickle.dumps(HOSTILE[what], protocol), {})
    with Store(tmp_path / "store") as store:
        with pytest.raises(BadInput, match=r"evil\.pt"):
            add_paths(store, [path])
        assert store.models() == []
        assert not (tmp_path / "ran").exists()
        kept = add_paths(store, [path], verbatim=["*.pt"]).manifest  # but it can be kept
        assert kept.files[0].format == "verbatim"
    assert not (tmp_path / "ran").exists()


def test_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 10
    for value in (circle, laughs):
        path = torch_zip(tmp_path / "evil.pt", pickle.dumps(value, 2), {})
        data = path.read_bytes()
        with pytest.raises(BadInput, match="nested too deeply, or that holds itself"):
            layout_of("evil.pt", len(data), lambda at, n, data=data: data[at : at + n])


def test_key_nested_too_deeply_to_be_hashed_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02})" + b"\x85" * 500_000 + b"Ns."
    path = torch_zip(tmp_path / "evil.pt", program, {})
    data = path.read_bytes()
    with pytest.raises(BadInput, match="neither a string nor a number"):
        layout_of("evil.pt", len(data), lambda at, n: data[at : at + n])


def test_older_checkpoints_and_other_bin_files_are_kept_unread(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(pickle.dumps(HOSTILE["eval"]))
    (tmp_path / "weights.bin").write_bytes(b"PK\x03\x04 not an archive"[4:])
    with Store(tmp_path / "store") as store:
        manifest = add_paths(store, [tmp_path / "old.pt", tmp_path / "weights.bin"]).manifest
    assert [file.format for file in manifest.files] == ["verbatim", "verbatim"]


# ---- NumPy


def test_orders_of_arrays(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "fortran": np.asfortranarray(some(30, 40)),
        "swapped": some(30, 40, seed=1).astype(">f4"),
        "both": np.asfortranarray(some(3, 4, 5, seed=2).astype(">f8")),
        "swapped integers": np.arange(9, dtype=">i2"),
    }
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    same = {
        name: np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
        for name, array in arrays.items()
    }
    manifest = check_file(tmp_path / "a.npz", same, tmp_path)
    assert total_bytes(manifest) < sum(a.nbytes for a in arrays.values()) + 2000


def test_what_is_no_tensor_is_kept_unread(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        objects=np.array([{"a": 1}], dtype=object),
        text=np.array(["x", "yz"]),
        records=np.zeros(2, dtype=[("a", "<f4"), ("b", "<i8")]),
        dates=np.array(["2020-01-01"], dtype="datetime64[D]"),
        tensor=some(3),
    )
    check_file(tmp_path / "a.npz", {"tensor": some(3)}, tmp_path)


def deflated(path: Path, level: int, array: Array) -> Path:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array(file, array)
    return path


@pytest.mark.parametrize("level", [1, 6, 9])
def test_deflated_array_is_kept_once_whatever_the_level(level: int, tmp_path: Path) -> None:
    array = np.repeat(some(200, 10), 7, axis=0)
    manifest = check_file(deflated(tmp_path / "a.npz", level, array), {"x": array}, tmp_path)
    assert [recipe.kind for recipe in manifest.recipes] == ["deflate"]
    assert total_bytes(manifest) < array.nbytes + 1000


def test_deflated_array_in_another_order(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {
        "fortran": np.asfortranarray(some(20, 30)),
        "big": np.arange(500, dtype=">i4").reshape(5, 100),
        "both": np.asfortranarray(some(7, 9).astype(">f8")),
        "plain": some(8, 8),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    little: dict[str, Array] = {
        name: np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
        for name, array in arrays.items()
    }
    manifest = check_file(tmp_path / "a.npz", little, tmp_path)
    assert sorted({recipe.kind for recipe in manifest.recipes}) == ["deflate", "strided"]
    np.savez(tmp_path / "b.npz", **little)  # type: ignore[arg-type]
    with Store(tmp_path / "store") as store:
        other = add_paths(store, [tmp_path / "b.npz"]).manifest
    assert other.weights_digest == manifest.weights_digest


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_files_that_make_each_others_arrays(names: str, tmp_path: Path) -> None:
    """Stored, the file's bytes are made from the tensor; deflated, the other way round."""
    array = np.asfortranarray(some(30, 4))
    folder = tmp_path / "model"
    folder.mkdir()
    np.savez(folder / f"{names[0]}.npz", x=array)
    np.savez_compressed(folder / f"{names[1]}.npz", x=array)
    check_file(folder, {"x": np.ascontiguousarray(array)}, tmp_path)


def test_deflated_array_that_zlib_would_pack_otherwise_is_kept_packed(tmp_path: Path) -> None:
    array = np.repeat(some(200, 10), 7, axis=0)
    path = deflated(tmp_path / "a.npz", 0, array)  # stored blocks of a size of its own
    data = path.read_bytes()
    at = data.index(b"\x93NUMPY") - 5  # the first stored block's header
    body = data[at:]
    first = struct.unpack_from("<H", body, 1)[0]
    inner = body[5 : 5 + first]
    split = b"\0" + struct.pack("<HH", 10, 10 ^ 0xFFFF) + inner[:10]
    split += body[:1] + struct.pack("<HH", first - 10, (first - 10) ^ 0xFFFF) + inner[10:]
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[0]
        packed = split + body[5 + first : info.compress_size]
    write_raw_member(path, "x.npy", packed, info.file_size, info.CRC)
    manifest = check_file(path, {"x": array}, tmp_path)
    assert [recipe.kind for recipe in manifest.recipes] == ["inflate"]


def write_raw_member(path: Path, name: str, packed: bytes, size: int, crc: int) -> None:
    """Write an archive of one member that is deflated already."""
    raw = name.encode()
    common = struct.pack("<4H3L2H", 0, 8, 0, 0, crc, len(packed), size, len(raw), 0)
    local = b"PK\x03\x04" + struct.pack("<H", 20) + common + raw
    entry = b"PK\x01\x02" + struct.pack("<2H", 20, 20) + common
    entry += struct.pack("<3H2L", 0, 0, 0, 0, 0) + raw
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(entry), len(local) + len(packed), 0)
    path.write_bytes(local + packed + entry + end)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


# ---- files that name others


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_sharded(folder, {"a": some(3), "b": some(4), "c": some(5)})
    with Store(tmp_path / "store") as store:
        assert add_paths(store, [folder]).notes == ()
        (folder / "model-00002-of-00003.safetensors").unlink()
        (note,) = add_paths(store, [folder]).notes
        assert "names 'model-00002-of-00003.safetensors', not added with it" in note
        (folder / "model-00003-of-00003.safetensors").unlink()
        (note,) = add_paths(store, [folder]).notes
        assert "and 1 more" in note
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
        assert add_paths(store, [folder]).notes == ()


# ---- ONNX


def test_typed_fields(tmp_path: Path) -> None:
    require_module("onnx")
    from onnx import TensorProto, helper

    half = np.array([1.5, -2.25, 0, 6e4], np.float16)
    arrays: dict[str, Array] = {
        "float": some(3, 4),
        "double": some(5).astype(np.float64),
        "int64": np.array([0, -1, 1 << 40, -(1 << 62)], np.int64),
        "int32": np.array([5, -5, 1 << 30], np.int32),
        "int8": np.array([-128, 127, 0], np.int8),
        "uint8": np.array([255, 0, 1], np.uint8),
        "uint64": np.array([1 << 63, 3], np.uint64),
        "bool": np.array([True, False]),
        "half": half,
    }
    kinds = {
        "float": TensorProto.FLOAT,
        "double": TensorProto.DOUBLE,
        "int64": TensorProto.INT64,
        "int32": TensorProto.INT32,
        "int8": TensorProto.INT8,
        "uint8": TensorProto.UINT8,
        "uint64": TensorProto.UINT64,
        "bool": TensorProto.BOOL,
        "half": TensorProto.FLOAT16,
    }
    model = onnx_model({})
    for name, array in arrays.items():
        model.graph.initializer.append(
            helper.make_tensor(name, kinds[name], array.shape, array.flatten().tolist())
        )
    constant = helper.make_tensor("", TensorProto.FLOAT, [2], some(2, seed=4).tobytes(), raw=True)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=constant))
    (tmp_path / "typed.onnx").write_bytes(model.SerializeToString())
    manifest = check_file(tmp_path / "typed.onnx", {**arrays, "c": some(2, seed=4)}, tmp_path)
    assert {recipe.kind for recipe in manifest.recipes} == {"varint"}


def test_floats_with_a_tag_each(tmp_path: Path) -> None:
    array = some(4, 3)
    tensor = b"\x08\x04\x08\x03\x10\x01" + b"".join(
        b"\x25" + value.tobytes() for value in array.flatten()
    )
    tensor += b"\x42\x01x"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "old.onnx").write_bytes(b"\x08\x03\x3a" + bytes([len(graph)]) + graph)
    check_file(tmp_path / "old.onnx", {"x": array}, tmp_path)


def test_graphs_that_share_weights_share_them(tmp_path: Path) -> None:
    require_module("onnx")
    arrays: dict[str, Array] = {"w": some(100, 100)}
    first, second = onnx_model(arrays), onnx_model(arrays)
    second.graph.node[0].name = "renamed"
    second.producer_name = "somebody else"
    with Store(tmp_path / "store") as store:
        for name, model in (("a.onnx", first), ("b.onnx", second)):
            (tmp_path / name).write_bytes(model.SerializeToString())
            added = add_paths(store, [tmp_path / name])
    assert added.new_bytes < 500


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "missing.bin", ""])
def test_external_data_elsewhere_is_not_looked_for(location: str, tmp_path: Path) -> None:
    require_module("onnx")
    from onnx import TensorProto

    model = onnx_model({})
    tensor = model.graph.initializer.add(name="w", dims=[4], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.onnx").write_bytes(model.SerializeToString())
    check_file(tmp_path / "m", {}, tmp_path)


# ---- GGUF


def test_quantised_blocks(tmp_path: Path) -> None:
    require_module("gguf")
    import gguf
    from gguf import quants

    kinds = ["Q4_0", "Q5_1", "Q8_0", "BF16"]
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    packed = {}
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        packed[name] = quants.quantize(some(4, 256), kind)
        writer.add_tensor(name, packed[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "q.gguf").read_bytes()
    layout = layout_of("q.gguf", len(data), lambda at, n: data[at : at + n])
    found = {tensor.name: tensor for tensor in layout.tensors}
    assert {name: found[name].dtype for name in kinds} == {
        "Q4_0": "Q4_0[32:18]",
        "Q5_1": "Q5_1[32:24]",
        "Q8_0": "Q8_0[32:34]",
        "BF16": "BF16",
    }
    for name, array in packed.items():
        tensor = found[name]
        assert tensor.shape == (4, 256)
        assert data[tensor.offset : tensor.offset + tensor.size_bytes] == array.tobytes()
    loaded = tensorswarm.load(str(tmp_path / "q.gguf"), store=tmp_path / "store")
    for read in gguf.GGUFReader(tmp_path / "q.gguf").tensors:
        shown = loaded[read.name].view(np.uint8)
        assert shown.shape == read.data.shape
        np.testing.assert_array_equal(shown, read.data)


def test_sizes_of_opaque_types() -> None:
    assert tensor_size_bytes("Q4_K[256:144]", (3, 512)) == 3 * 2 * 144
    with pytest.raises(BadInput, match="whole blocks"):
        tensor_size_bytes("Q4_K[256:144]", (3, 100))
    for bad in ("q4[32:18]", "Q4[0:18]", "Q4[32:0]", "Q4[32:18", "Q4[1234567:1]", "Q4"):
        with pytest.raises(BadInput, match="unknown dtype"):
            tensor_size_bytes(bad, (32,))


def test_type_table_is_that_of_the_public_library() -> None:
    require_module("gguf")
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    from tensorswarm.store.formats.gguf import TYPES

    for kind in GGMLQuantizationType:
        elements, size = GGML_QUANT_SIZES[kind]
        name = kind.name if elements == 1 else f"{kind.name}[{elements}:{size}]"
        assert TYPES[kind.value] == name


# ---- TensorFlow.js


def test_tensor_over_many_shards_is_kept_once(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {"big": some(500, 50), "small": some(3), "next": some(100, seed=1)}
    folder = tmp_path / "model"
    folder.mkdir()
    write_tfjs(folder, arrays, shard_bytes=9999)
    manifest = check_file(folder, arrays, tmp_path)
    total = sum(array.nbytes for array in arrays.values())
    assert total_bytes(manifest) < total + 1500
    assert {recipe.kind for recipe in manifest.recipes} == {"slice"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["weightsManifest"][0]["weights"].pop(), "weights of"),
        (lambda d: d["weightsManifest"][0]["weights"][0].update(shape=[99999]), "end before"),
        (lambda d: d["weightsManifest"][0]["weights"][0].update(dtype="f99"), "unknown dtype"),
        (lambda d: d["weightsManifest"][0].update(weights=None), "lists none"),
        (lambda d: d["weightsManifest"][0].update(paths=["model.json"]), "another format"),
    ],
)
def test_manifest_that_does_not_fit_its_shards(change: Any, message: str, tmp_path: Path) -> None:
    write_tfjs(tmp_path, {"a": some(10), "b": some(10)})
    document = json.loads((tmp_path / "model.json").read_text())
    change(document)
    (tmp_path / "model.json").write_text(json.dumps(document))
    with Store(tmp_path.parent / "store") as store, pytest.raises(BadInput, match=message):
        add_paths(store, [tmp_path])
