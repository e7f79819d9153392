"""Adopting the caches of other tools: nothing copied, nothing read twice, nothing served wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tensorswarm.cli.main import main
from tensorswarm.store.adopt import adopt
from tensorswarm.store.errors import BadInput
from tensorswarm.store.export import export_files
from tensorswarm.store.records import ObjectPlace
from tensorswarm.store.store import Store
from tests.support.format_files import write_gguf
from tests.support.store_world import files_below, random_bytes, write_safetensors

KIB = 1 << 10
SHARED = random_bytes(200 * KIB, 1)


def snapshot(cache: Path, repository: str, commit: str, files: dict[str, bytes]) -> Path:
    """Put a model into a Hugging Face cache, as huggingface_hub lays it out."""
    root = cache / f"models--{repository.replace('/', '--')}"
    folder = root / "snapshots" / commit
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    return folder


def weights(tmp_path: Path, number: int) -> bytes:
    own = random_bytes(100 * KIB, 100 + number)
    path = write_safetensors(
        tmp_path / "w" / str(number),
        {"shared": ("U8", [len(SHARED)], SHARED), "own": ("U8", [len(own)], own)},
    )
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache of 50 models that share a tensor."""
    folder = tmp_path / "hub"
    for number in range(50):
        files = {
            "model.safetensors": weights(tmp_path, number),
            "config.json": b"{}",
            "1_Pooling/config.json": b"[]",
        }
        snapshot(folder, f"org/model-{number}", f"{number:040x}", files)
    return folder


def test_cache_of_fifty_models(cache: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        result = adopt(store, [cache])
        assert len(result.models) == 50
        assert not result.refused
        assert {each.name for each in result.models} >= {"org/model-7@000000000000"}
        assert result.duplicate_bytes >= 49 * len(SHARED)
        assert result.new_bytes < 50 * 101 * KIB + len(SHARED) + 50 * KIB
        large = [
            record
            for record in store.records(store.all_digests()).values()
            if record.size_bytes > 64 * KIB
        ]
        assert len(large) == 51
        assert {record.place for record in large} == {ObjectPlace.ADOPTED}
        assert files_below(store.root / "objects") == []  # no byte copied
        model = next(each for each in result.models if each.name.startswith("org/model-7@"))
        export_files(store, model.manifest, model.manifest.files, tmp_path / "out")
    original = cache / "models--org--model-7" / "snapshots" / f"{7:040x}"
    for name in files_below(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (original / name).read_bytes()
    assert len(files_below(tmp_path / "out")) == 3


def test_what_is_known_is_not_read_again(cache: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        first = adopt(store, [cache])
        read: list[int] = []
        again = adopt(store, [cache], progress=read.append)
        assert sum(read) == 0
        assert len(again.known) == len(first.models)
        assert not again.models


def test_file_that_changed_is_noticed_and_read_again(cache: Path, tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        first = adopt(store, [cache])
        model = next(each for each in first.models if each.name.startswith("org/model-3@"))
        path = cache / "models--org--model-3" / "snapshots" / f"{3:040x}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.resolve().write_bytes(data)
        missing = store.missing_objects(model.manifest, range(len(model.manifest.objects)))
        assert missing, "a tensor whose file was changed is still given out"
        again = adopt(store, [cache])
        assert model.name in [each.name for each in again.models]
        assert model.manifest.digest not in [each.manifest.digest for each in again.models]


def test_bad_model_does_not_keep_the_others_out(cache: Path, tmp_path: Path) -> None:
    snapshot(cache, "bad/one", "f" * 40, {"model.safetensors": b"not one at all"})
    snapshot(cache, "bad/two", "e" * 40, {"training_args.bin": b"PK\x03\x04" + bytes(40)})
    with Store(tmp_path / "store") as store:
        result = adopt(store, [cache])
    assert len(result.models) == 51  # what is only a pickle of more than tensors is kept unread
    ((name, reason),) = result.refused
    assert name.startswith("bad/one@")
    assert "model.safetensors" in reason


def test_ollama_store(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "blobs").mkdir(parents=True)
    (tmp_path / "made").mkdir()
    write_gguf(tmp_path / "made", {"a": np.arange(50_000, dtype=np.float32)})
    layers = []
    for data in (b'{"config": 1}', (tmp_path / "made" / "model.gguf").read_bytes(), b"template"):
        digest = hashlib.sha256(data).hexdigest()
        (folder / "blobs" / f"sha256-{digest}").write_bytes(data)
        layers.append({"digest": f"sha256:{digest}", "size": len(data)})
    path = folder / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": layers[0], "layers": layers[1:]}))
    with Store(tmp_path / "store") as store:
        (model,) = adopt(store, [folder]).models
        assert model.name == "tiny:latest"
        assert [t.name for file in model.manifest.files for t in file.tensors] == ["a"]
        assert len(model.manifest.files) == 4


def test_snapshot_with_a_link_to_nothing(cache: Path, tmp_path: Path) -> None:
    folder = cache / "models--org--model-3" / "snapshots" / f"{3:040x}"
    (folder / "model.safetensors").resolve().unlink()
    with Store(tmp_path / "store") as store:
        for _ in range(2):
            result = adopt(store, [cache])
            assert [name for name, _ in result.refused] == ["org/model-3@000000000000"]
            assert "model.safetensors: cannot be read: No such file" in result.refused[0][1]
            assert len(result.models) + len(result.known) == 49


@pytest.mark.parametrize(
    "text", ["[[[", "5", "{}", '{"layers": 7}', '{"layers": [{"digest": "x"}]}']
)
def test_damaged_ollama_manifest(text: str, tmp_path: Path) -> None:
    base = tmp_path / "models"
    (base / "blobs").mkdir(parents=True)
    manifest = base / "manifests" / "registry.ollama.ai" / "library" / "bad" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(text)
    with Store(tmp_path / "store") as store:
        assert adopt(store, [base]).refused == [
            ("bad:latest", "its manifest is damaged: it names no layers")
        ]


def test_folder_tree(tmp_path: Path) -> None:
    for name in ("one", "deep/two"):
        write_safetensors(tmp_path / "tree" / name / "m.safetensors", {"a": ("U8", [3], b"abc")})
        (tmp_path / "tree" / name / "config.json").write_text("{}")
    (tmp_path / "tree" / "notes.txt").write_text("no model")
    with Store(tmp_path / "store") as store:
        result = adopt(store, [tmp_path / "tree"])
    assert [each.name for each in result.models] == ["tree/deep/two", "tree/one"]
    assert all(len(each.manifest.files) == 2 for each in result.models)


def test_nothing_to_adopt(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Store(tmp_path / "store") as store:
        for folder in (tmp_path / "empty", tmp_path / "missing"):
            with pytest.raises(BadInput):
                adopt(store, [folder])


def test_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adopt", str(cache), "--store", str(tmp_path / "store"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["models"]) == 50
    assert document["duplicate_bytes"] >= 49 * len(SHARED)
