"""Stamped files and sidecars: read by every other tool as before, and by us for their hashes."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensorswarm.cli.main import main
from tensorswarm.store import remote_model, sidecar
from tensorswarm.store.cid import model_cid
from tensorswarm.store.digest import chunk_list_of, digest_of
from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats.companions import MAX_COMPANIONS, companions
from tensorswarm.store.formats.stamps import Stamped, parse_text, read_stamp, text_of
from tensorswarm.store.ingest import describe_paths
from tensorswarm.store.remote_model import RemoteCopy, describe_remote
from tensorswarm.store.stamping import describe_with_lists, stamp_file
from tensorswarm.store.store import Store
from tests.support.format_files import (
    onnx_model,
    write_gguf,
    write_npz,
    write_onnx,
    write_onnx_external,
    write_safetensors,
    write_sharded,
    write_tfjs,
)

Arrays = dict[str, NDArray[Any]]

ARRAYS: Arrays = {
    "large": np.random.default_rng(0).standard_normal(600_000).astype(np.float32),
    "small": np.arange(12, dtype=np.float32).reshape(3, 4),
}


def read_back_safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def read_back_gguf(path: Path) -> Arrays:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "bert"
    return {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in reader.tensors}


def read_back_onnx(path: Path) -> Arrays:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    assert {each.key for each in model.metadata_props} == {"tensorswarm"}
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


FORMATS = {
    "model.safetensors": (write_safetensors, read_back_safetensors),
    "model.gguf": (write_gguf, read_back_gguf),
    "model.onnx": (write_onnx, read_back_onnx),
}


def reader(path: Path) -> Any:
    data = path.read_bytes()
    return lambda at, length: data[at : at + length]


@pytest.mark.parametrize("name", FORMATS)
def test_stamped_file_loads_in_its_own_library(name: str, tmp_path: Path) -> None:
    write, read_back = FORMATS[name]
    write(tmp_path, ARRAYS)
    path, copy = tmp_path / name, tmp_path / "stamped" / name
    copy.parent.mkdir()
    assert stamp_file(path, copy) == 2
    for key, array in read_back(copy).items():
        np.testing.assert_array_equal(array, ARRAYS[key])
    stamp = read_stamp(name, copy.stat().st_size, reader(copy))
    assert stamp == {
        key: Stamped(digest_of(a.tobytes()), chunk_list_of(a.tobytes()))
        for key, a in ARRAYS.items()
    }
    assert read_stamp(name, path.stat().st_size, reader(path)) is None
    before, after = describe_paths([path]), describe_paths([copy])
    assert before.weights_digest == after.weights_digest
    with pytest.raises(BadInput, match="bears a stamp already"):
        stamp_file(copy, tmp_path / "again")


@pytest.mark.parametrize("name", FORMATS)
def test_manifest_from_a_stamp_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    FORMATS[name][0](tmp_path, ARRAYS)
    copy = tmp_path / "s" / name
    copy.parent.mkdir()
    stamp_file(tmp_path / name, copy)
    read = 0
    data = copy.read_bytes()

    def read_at(offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return data[offset : offset + length]

    with Store(tmp_path / "store") as store:
        remote = RemoteCopy(name, len(data), read_at, tmp_path / "headers")
        found = describe_remote(store, [remote])
        remote.close()
        assert found is not None
        assert found[0] == describe_paths([copy])
        missing = store.missing_objects(found[0], range(len(found[0].objects)))
        assert {found[0].objects[i].size_bytes for i in missing} == {2_400_000, 48}
    assert read < 40_000
    with Store(tmp_path / "other") as store:
        plain = tmp_path / name
        remote = RemoteCopy(name, plain.stat().st_size, reader(plain), tmp_path / "again")
        assert describe_remote(store, [remote]) is None
        remote.close()


def typed_onnx(folder: Path, arrays: Arrays) -> None:
    """Write a model whose integers are varints, which are not the tensor's bytes."""
    from onnx import TensorProto, helper

    model = onnx_model(arrays)
    numbers = np.arange(300_000) % 3 - 1
    model.graph.initializer.append(
        helper.make_tensor("typed", TensorProto.INT64, numbers.shape, numbers.tolist())
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_onnx_external, "model.onnx"),
        (typed_onnx, "model.onnx"),
        (write_tfjs, "model.json"),
        (partial(write_tfjs, shard_bytes=1_000_003), "model.json"),
        (partial(write_sharded, shards=2), "model.safetensors.index.json"),
    ],
)
def test_manifest_of_several_files_from_one_stamp(write: Any, name: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    write(site, ARRAYS)
    stamp_file(site / name, tmp_path / name)
    (tmp_path / name).replace(site / name)
    read = 0
    copies = []
    for path in sorted(site.iterdir()):

        def read_at(offset: int, length: int, data: bytes = path.read_bytes()) -> bytes:
            nonlocal read
            read += length
            return data[offset : offset + length]

        copy = tmp_path / "headers" / path.name
        copies.append(RemoteCopy(path.name, path.stat().st_size, read_at, copy))
    with Store(tmp_path / "store") as store:
        found = describe_remote(store, copies)
        assert found is not None
        assert found[0] == describe_paths([site])
        missing = store.missing_objects(found[0], range(len(found[0].objects)))
        assert {2_400_000, 48} <= {found[0].objects[i].size_bytes for i in missing}
    for each in copies:
        each.close()
    assert read < 40_000


def test_a_cut_tensor_whose_parts_the_stamp_does_not_tell_is_read(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    write_tfjs(site, ARRAYS, shard_bytes=1_000_003)
    stamp_file(site / "model.json", tmp_path / "model.json")
    document = json.loads((tmp_path / "model.json").read_text())
    assert len(document["tensorswarm"]["tensors"]["large"].pop("parts")) > 0
    (site / "model.json").write_text(json.dumps(document))
    copies = [
        RemoteCopy(path.name, path.stat().st_size, reader(path), tmp_path / "headers" / path.name)
        for path in sorted(site.iterdir())
    ]
    with Store(tmp_path / "store") as store:
        found = describe_remote(store, copies)
        assert found is not None
        assert found[0] == describe_paths([site])
    for each in copies:
        each.close()


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=20))
def test_no_byte_is_asked_for_twice(reads: list[tuple[int, int]]) -> None:
    data = bytes(range(100, 152))
    asked: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        asked.extend(range(offset, offset + length))
        return data[offset : offset + length]

    with tempfile.TemporaryDirectory() as folder:
        copy = RemoteCopy("m", len(data), read_at, Path(folder) / "m")
        for offset, length in reads:
            assert copy.read_at(offset, length) == data[offset : offset + length]
        copy.close()
    assert sorted(asked) == sorted({at for start, n in reads for at in range(start, start + n)})


def test_a_name_that_two_shards_use_is_not_stamped(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(tmp_path, {"a": ARRAYS["small"] + number, f"b{number}": ARRAYS["small"]})
        (tmp_path / "model.safetensors").rename(tmp_path / f"{number}.safetensors")
    index = {"weight_map": {"b1": "1.safetensors", "b2": "2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    stamp_file(tmp_path / "m.safetensors.index.json", tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert sorted(document["tensorswarm"]["tensors"]) == ["b1", "b2"]


def test_sidecar_of_a_file_covers_those_that_it_names(tmp_path: Path) -> None:
    write_tfjs(tmp_path, ARRAYS, shard_bytes=1_000_003)
    manifest, _ = describe_with_lists(tmp_path / "model.json")
    assert manifest == describe_paths([tmp_path])
    (tmp_path / "group1-shard2of3.bin").unlink()
    with pytest.raises(BadInput, match="shard2of3.bin: cannot be read"):
        describe_with_lists(tmp_path / "model.json")


def test_a_stamp_that_saves_nothing_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_onnx(tmp_path, ARRAYS)
    path = tmp_path / "stamped.onnx"
    stamp_file(tmp_path / "model.onnx", path)
    monkeypatch.setattr(remote_model, "MAX_READ_BYTES", 100)
    with Store(tmp_path / "store") as store:
        copy = RemoteCopy("m.onnx", path.stat().st_size, reader(path), tmp_path / "headers")
        assert describe_remote(store, [copy]) is None
        copy.close()


def test_files_that_a_model_names() -> None:
    def named(name: str, document: Any) -> tuple[str, ...]:
        data = json.dumps(document).encode()
        return companions(name, len(data), lambda at, length: data[at : at + length])

    index = {"weight_map": {"a": "2.safetensors", "b": "s/1.safetensors", "c": "2.safetensors"}}
    assert named("m.index.json", index) == ("2.safetensors", "s/1.safetensors")
    assert named("f/m.index.json", index) == ("f/2.safetensors", "f/s/1.safetensors")
    groups = [{"paths": ["./1.bin"], "weights": []}, {"paths": ["2.bin"], "weights": []}]
    assert named("model.json", {"weightsManifest": groups}) == ("1.bin", "2.bin")
    assert named("config.json", {"a": 1}) == named("config.json", [1]) == ()
    for bad in ("../1.bin", "/etc/passwd", "a\\b", "con", 5, "MODEL.JSON"):
        with pytest.raises(BadInput):
            named("model.json", {"weightsManifest": [{"paths": [bad]}]})
    with pytest.raises(BadInput):
        named("model.json", {"weightsManifest": ["x"]})
    many = {"weight_map": {str(i): f"{i}.safetensors" for i in range(MAX_COMPANIONS + 1)}}
    with pytest.raises(BadInput, match="more than"):
        named("m.json", many)


def test_stamped_json_is_still_read(tmp_path: Path) -> None:
    for name, write, file in (
        ("tfjs", write_tfjs, "model.json"),
        ("sharded", write_sharded, "model.safetensors.index.json"),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name, ARRAYS)
        weights = describe_paths([tmp_path / name]).weights_digest
        path = tmp_path / name / file
        stamp_file(path, tmp_path / "copy")
        document = json.loads((tmp_path / "copy").read_text())
        assert document["tensorswarm"]["tensors"]["small"] == {
            "digest": digest_of(ARRAYS["small"].tobytes()).hex()
        }
        original = json.loads(path.read_text())
        assert {k: v for k, v in document.items() if k != "tensorswarm"} == original
        (tmp_path / "copy").replace(path)
        assert describe_paths([tmp_path / name]).weights_digest == weights


def test_what_cannot_be_stamped(tmp_path: Path) -> None:
    write_npz(tmp_path, ARRAYS)
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.npz", "config.json"):
        with pytest.raises(BadInput):
            stamp_file(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version":2,"tensors":{}}',
        '{"version":1,"tensors":[]}',
        '{"version":1,"tensors":{"a":{"digest":"00"}}}',
        '{"version":1,"tensors":{"a":{"digest":"%s","chunks":"!"}}}' % ("00" * 32),
        '{"version":1,"tensors":{"a":{"digest":"%s","chunks":"AAAA"}}}' % ("00" * 32),
        '{"version":1,"tensors":{"a":null}}',
    ],
)
def test_bad_stamps_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_text(text)


def test_text_of_a_stamp_is_read_back() -> None:
    stamp = {"a": Stamped(bytes(32), b""), "ü": Stamped(b"\1" * 32, b"\2" * 64)}
    assert parse_text(text_of(stamp)) == stamp


def test_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path, ARRAYS)
    path = tmp_path / "model.safetensors"
    assert main(["manifest", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    written = tmp_path / "model.safetensors.tensorswarm.json"
    assert document["path"] == str(written)
    manifest, lists = sidecar.decode(written.read_bytes())
    assert manifest == describe_paths([path])
    assert manifest.model_id == document["model"]
    assert {digest_of(data) for data in lists.values()} == set(lists)
    shown = json.loads(written.read_text())
    assert [t["name"] for t in shown["files"][0]["tensors"]] == ["large", "small"]
    assert main(["manifest", str(tmp_path), "--json"]) == 0
    folder = json.loads(capsys.readouterr().out)
    assert (tmp_path / "tensorswarm.json").exists()
    assert folder["model"] == describe_paths([tmp_path]).model_id == manifest.model_id


def test_false_sidecars_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path, ARRAYS)
    good = json.loads(sidecar.encode(*describe_with_lists(tmp_path / "model.safetensors")))
    for change in (
        {"tensorswarm": 2},
        {"model": model_cid(bytes(32))},
        {"manifest": ""},
        {"manifest": "!!"},
        {"chunk_lists": []},
        {"chunk_lists": None},
    ):
        with pytest.raises(BadInput):
            sidecar.decode(json.dumps({**good, **change}).encode())
    for data in (b"", b"{}", b"[]", b"\xff"):
        with pytest.raises(BadInput):
            sidecar.decode(data)


def test_stamp_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safetensors(tmp_path, ARRAYS)
    assert main(["stamp", str(tmp_path / "model.safetensors"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(tmp_path / "model.stamped.safetensors")
    assert document["tensors"] == 2
