"""Writing files out of the store: bit for bit, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tensorswarm.store.checking import check_object, iterate_object
from tensorswarm.store.digest import EMPTY_DIGEST, digest_of
from tensorswarm.store.errors import BadInput, LocalError, NoRoom, StoreDamaged
from tensorswarm.store.export import export_files, export_object, select, whole_files
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import FileEntry, Manifest, ManifestBuilder, ObjectRef
from tensorswarm.store.place import COPY_BUFFER_SIZE
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    edit_index,
    files_below,
    random_bytes,
    random_model,
    ref_of,
    small_disk,
)

SIZES = [0, 1, 100, 65_536, 65_537, MIB, MIB + 1, COPY_BUFFER_SIZE + 4099]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    random_model(folder / "m.safetensors", SIZES)
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "deeper" / "config.json").write_text("{}")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture
def manifest(store: Store, folder: Path) -> Manifest:
    return add_paths(store, [folder]).manifest


def blob_file(store: Store, path: str, data: bytes) -> Manifest:
    """Return a model of one file, whose bytes are one object."""
    store.put_blob(data)
    builder = ManifestBuilder()
    builder.add_file(path, "verbatim", [ref_of(data)], [])
    return builder.build()


def test_bit_for_bit(store: Store, manifest: Manifest, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "yet"
    heard: list[int] = []
    written = export_files(store, manifest, manifest.files, out, progress=heard.append)
    assert sorted(written) == sorted(out / name for name in files_below(folder))
    assert files_below(out) == files_below(folder), "something else was left"
    for name in files_below(folder):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert sum(heard) == sum(file.size_bytes for file in manifest.files)


def test_existing_file_is_replaced_at_once(store: Store, tmp_path: Path) -> None:
    """Whoever has the old file open keeps it; nobody ever sees half of the new one."""
    manifest = blob_file(store, "f.bin", b"new bytes")
    target = tmp_path / "f.bin"
    target.write_bytes(b"old")
    with target.open("rb") as old:
        export_files(store, manifest, manifest.files, tmp_path)
        assert old.read() == b"old"
    assert target.read_bytes() == b"new bytes"


def test_link_is_replaced_and_not_followed(store: Store, tmp_path: Path) -> None:
    manifest = blob_file(store, "f.bin", b"new bytes")
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"precious")
    out.mkdir()
    (out / "f.bin").symlink_to(victim)
    export_files(store, manifest, manifest.files, out)
    assert victim.read_bytes() == b"precious"
    assert not (out / "f.bin").is_symlink()


def test_folder_in_the_way(store: Store, tmp_path: Path) -> None:
    manifest = blob_file(store, "f.bin", b"new bytes")
    (tmp_path / "f.bin").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        export_files(store, manifest, manifest.files, tmp_path)
    deeper = blob_file(store, "sub/f.bin", b"new bytes")
    (tmp_path / "sub").write_bytes(b"a file where a folder should be")
    with pytest.raises(LocalError, match="cannot make the folder"):
        export_files(store, deeper, deeper.files, tmp_path)


def test_longest_names(store: Store, tmp_path: Path) -> None:
    """The file that is written first must not need a longer name than the target's."""
    for name in ("x" * 255, "é" * 127, "文" * 85):
        manifest = blob_file(store, f"sub/{name}", name.encode())
        (written,) = export_files(store, manifest, manifest.files, tmp_path)
        assert written.read_bytes() == name.encode()
    assert len(files_below(tmp_path / "sub")) == 3


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "inline"])
def test_damaged_object_makes_no_file(store: Store, tmp_path: Path, damage: str) -> None:
    data = random_bytes(100 if damage == "inline" else COPY_BUFFER_SIZE + 100_000, 3)
    manifest = blob_file(store, "f.bin", data)
    path = store.place.object_path(digest_of(data))
    if damage == "changed":
        with path.open("r+b") as file:
            file.seek(COPY_BUFFER_SIZE + 50_000)
            file.write(b"rotten")
    elif damage == "cut":
        os.truncate(path, COPY_BUFFER_SIZE + 50_000)
    elif damage == "gone":
        path.unlink()
    else:
        edit_index(
            store.root, "UPDATE objects SET data=? WHERE digest=?", (b"x" * 100, digest_of(data))
        )
    out = tmp_path / "out"
    out.mkdir()
    (out / "f.bin").write_bytes(b"old")
    with pytest.raises(StoreDamaged):
        export_files(store, manifest, manifest.files, out)
    assert files_below(out) == ["f.bin"], "a part of it was left"
    assert (out / "f.bin").read_bytes() == b"old"
    with pytest.raises(StoreDamaged):
        check_object(store, digest_of(data))
    with pytest.raises(StoreDamaged):
        export_object(store, digest_of(data), out / "object")
    assert files_below(out) == ["f.bin"]


def test_object_cut_while_it_is_read(store: Store) -> None:
    digest = store.put_blob(random_bytes(COPY_BUFFER_SIZE * 2, 3))
    pieces = iterate_object(store, digest)
    next(pieces)
    os.truncate(store.place.object_path(digest), COPY_BUFFER_SIZE + 5)
    with pytest.raises(StoreDamaged):
        list(pieces)


def test_adopted_file_changed_while_it_is_read(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(random_bytes(COPY_BUFFER_SIZE * 2, 3))
    (ref,) = add_paths(store, [path], copy=False).manifest.objects
    pieces = iterate_object(store, ref.digest)
    next(pieces)
    os.utime(path, (1, 1))
    with pytest.raises(StoreDamaged, match="changed since"):
        list(pieces)


def test_model_that_lies_about_a_size(store: Store, tmp_path: Path) -> None:
    """A digest that is here, under another size: the file would have the wrong length."""
    store.put_blob(b"ten bytes!")
    builder = ManifestBuilder()
    lie = ObjectRef(digest_of(b"ten bytes!"), 9, b"")
    builder.add_file("f.bin", "verbatim", [lie], [])
    manifest = builder.build()
    with pytest.raises(StoreDamaged):
        export_files(store, manifest, manifest.files, tmp_path / "out")
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "a\\b", "CON", "a\0b", ""])
def test_unsafe_names_never_reach_the_disk(store: Store, tmp_path: Path, path: str) -> None:
    """No manifest has such a name; even a file entry made by hand is refused."""
    entry = FileEntry(path, 0, "verbatim", (), ())
    with pytest.raises(BadInput):
        Manifest((), (entry,))
    manifest = blob_file(store, "f.bin", b"x")
    out = tmp_path / "deep" / "er"
    with pytest.raises(BadInput):
        export_files(store, manifest, [entry], out)
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]
    assert files_below(tmp_path / "deep") == [] if (tmp_path / "deep").exists() else True


def test_no_room(store: Store, tmp_path: Path) -> None:
    manifest = blob_file(store, "f.bin", random_bytes(3 * MIB, 1))
    with small_disk(tmp_path / "disk", 2 * MIB) as disk:
        with pytest.raises(NoRoom):
            export_files(store, manifest, manifest.files, disk / "out")
        assert files_below(disk) == []
        with pytest.raises(NoRoom):
            export_object(store, manifest.objects[0].digest, disk / "object")
        assert files_below(disk) == []


def test_interrupted_export_leaves_nothing(store: Store, tmp_path: Path) -> None:
    manifest = blob_file(store, "f.bin", random_bytes(3 * MIB, 1))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_files(store, manifest, manifest.files, tmp_path / "out", progress=interrupt)
    assert files_below(tmp_path / "out") == []


def test_disk_that_fails(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = blob_file(store, "f.bin", b"x")

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(LocalError, match="cannot write"):
        export_files(store, manifest, manifest.files, tmp_path / "out")
    assert files_below(tmp_path / "out") == []


def test_single_object(store: Store, tmp_path: Path) -> None:
    data = random_bytes(2 * MIB + 5, 1)
    export_object(store, store.put_blob(data), tmp_path / "sub" / "object")
    assert (tmp_path / "sub" / "object").read_bytes() == data
    export_object(store, EMPTY_DIGEST, tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""
    with pytest.raises(StoreDamaged, match="not in the store"):
        export_object(store, digest_of(b"nowhere"), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_part_of_an_object_is_not_given_for_the_whole(store: Store, tmp_path: Path) -> None:
    data = random_bytes(2 * MIB, 1)
    from tests.support.store_world import begin, chunk_of

    incoming = begin(store, data)
    incoming.write_chunk(0, chunk_of(data, 0))
    with pytest.raises(StoreDamaged, match="not in the store"):
        export_object(store, digest_of(data), tmp_path / "object")


def test_check_object(store: Store) -> None:
    for size in SIZES:
        assert check_object(store, store.put_blob(random_bytes(size, size))) == size


@pytest.mark.parametrize(
    ("include", "files"),
    [
        ([], ["empty", "m.safetensors", "sub/deeper/config.json"]),
        (["m.safetensors"], ["empty", "m.safetensors"]),
        (["*.json"], ["empty", "sub/deeper/config.json"]),
        (["t3"], ["empty"]),
        (["*"], ["empty", "m.safetensors", "sub/deeper/config.json"]),
    ],
)
def test_choosing(manifest: Manifest, include: Sequence[str], files: Sequence[str]) -> None:
    """An empty file has no part that could be missing."""
    chosen = select(manifest, include)
    assert [file.path for file in whole_files(manifest, chosen)] == files


def test_choosing_tensors(manifest: Manifest) -> None:
    assert len(select(manifest, ["t3", "t5"])) == 2
    with pytest.raises(BadInput, match="matches no file"):
        select(manifest, ["t3", "nothing-like-this"])
    assert select(manifest, ["empty"]) == frozenset()
