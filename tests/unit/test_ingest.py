"""Adding files: what is taken, what is refused, and that a refusal leaves no trace."""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorswarm.store import ingest, records
from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST, digest_of
from tensorswarm.store.errors import BadInput, LocalError, NoRoom, TensorswarmError
from tensorswarm.store.export import export_files
from tensorswarm.store.hashing import RangeHasher
from tensorswarm.store.index import Index
from tensorswarm.store.ingest import Ingested, add_paths, describe_paths, files_under
from tensorswarm.store.load import load_tensors
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.place import COPY_BUFFER_SIZE
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    assert_sound,
    bytes_of,
    chunk_of,
    cut_the_power,
    edit_index,
    files_below,
    fill,
    random_bytes,
    random_model,
    receive_all,
    ref_of,
    rubbish,
    run_python,
    small_disk,
    write_safetensors,
)

SIZES = [0, 1, 100, INLINE_LIMIT, INLINE_LIMIT + 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * MIB + 5]
LARGE_SIZES = [COPY_BUFFER_SIZE, COPY_BUFFER_SIZE + 1, 2 * COPY_BUFFER_SIZE + 4099]

both_ways = pytest.mark.parametrize("copy", [True, False], ids=["copied", "adopted"])


def state_of(store: Store) -> tuple[list[bytes], list[str], list[object]]:
    """Return all that a refused `add` must leave as it was."""
    return store.all_digests(), files_below(store.root / "objects"), list(store.models())


def assert_holds(store: Store, manifest: Manifest, folder: Path, out: Path) -> None:
    """Assert that the store gives the files of `folder` again, bit for bit."""
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    export_files(store, manifest, manifest.files, out)
    assert files_below(out) == files_below(folder)
    for name in files_below(folder):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


# ---- what is taken


@both_ways
def test_folder(store: Store, tmp_path: Path, copy: bool) -> None:
    folder = tmp_path / "model"
    random_model(folder / "a.safetensors", SIZES)
    random_model(folder / "deep" / "b.safetensors", LARGE_SIZES, seed=1)
    (folder / "config.json").write_text("{}")
    (folder / "empty").write_bytes(b"")
    (folder / "verbatim.bin").write_bytes(random_bytes(2 * MIB + 1, 9))
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    heard: list[int] = []
    ingested = add_paths(store, [folder], copy=copy, progress=heard.append)
    (folder / ".git" / "HEAD").unlink()
    manifest = ingested.manifest
    size = sum((folder / name).stat().st_size for name in files_below(folder))
    assert sum(heard) == size
    assert ingested.new_bytes == size, "nothing here occurs twice"
    assert [model.name for model in store.models()] == ["model"]
    assert store.manifest(manifest.digest) == manifest
    assert describe_paths([folder]) == manifest
    assert_sound(store)
    assert_holds(store, manifest, folder, tmp_path / "out")
    assert rubbish(store.root) == []
    again = add_paths(store, [folder], copy=copy)
    assert again == Ingested(manifest, 0)


def test_manifest_is_the_same_copied_and_adopted(
    new_store: Callable[[], Store], tmp_path: Path
) -> None:
    path = random_model(tmp_path / "m.safetensors", SIZES + LARGE_SIZES)
    one, two = (add_paths(new_store(), [path], copy=copy).manifest for copy in (True, False))
    assert one == two == describe_paths([path])


def test_files_named_one_by_one(store: Store, tmp_path: Path) -> None:
    paths = [random_model(tmp_path / folder / f"{folder}.safetensors", [9]) for folder in "ba"]
    manifest = add_paths(store, paths).manifest
    assert [file.path for file in manifest.files] == ["a.safetensors", "b.safetensors"]


def test_name_of_a_model(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    random_model(folder / "m.safetensors", [9])
    monkeypatch.chdir(folder)
    for path in (".", "../my-model/.", "../my-model", str(folder) + "/"):
        add_paths(store, [Path(path)])
        assert [model.name for model in store.models()] == ["my-model"], path
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder / "sub")
    add_paths(store, [Path("..")])
    assert [model.name for model in store.models()] == ["my-model"]


def test_shared_tensors_are_new_once(store: Store, tmp_path: Path) -> None:
    shared, own = random_bytes(300_000, 1), random_bytes(500_000, 2)
    tiny = random_bytes(50, 3)

    def model(name: str, *tensors: bytes) -> Path:
        named = {f"{name}.{i}": ("U8", [len(t)], t) for i, t in enumerate(tensors)}
        return write_safetensors(tmp_path / f"{name}.safetensors", named)

    def header_bytes(path: Path) -> int:
        return 8 + int.from_bytes(path.read_bytes()[:8], "little")

    first, second = model("first", shared, shared, tiny), model("second", tiny, shared, own)
    added = add_paths(store, [first])
    assert added.new_bytes == header_bytes(first) + len(shared) + len(tiny)
    added = add_paths(store, [second])
    assert added.new_bytes == header_bytes(second) + len(own)
    assert add_paths(store, [first, second]).new_bytes == 0
    assert len(store.models()) == 3
    assert_sound(store)


def test_tensors_that_begin_alike(store: Store, tmp_path: Path) -> None:
    """Whether an object may be known is told by its first chunk, and only that."""
    base = random_bytes(COPY_BUFFER_SIZE + 3 * MIB, 1)
    tensors = [base, base[:-1] + b"x", base[:-1], base, base + b"y"]
    path = write_safetensors(
        tmp_path / "m.safetensors",
        {f"t{i}": ("U8", [len(t)], t) for i, t in enumerate(tensors)},
    )
    added = add_paths(store, [path])
    sizes = {digest_of(t): len(t) for t in tensors}
    assert len(sizes) == 4
    header = path.stat().st_size - sum(map(len, tensors))
    assert added.new_bytes == header + sum(sizes.values())
    assert_sound(store)
    for name, array in load_tensors(store, added.manifest).items():
        assert array.tobytes() == tensors[int(name[1:])]


def test_known_large_tensor_is_not_written_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [COPY_BUFFER_SIZE + 5, 3 * MIB])
    add_paths(store, [path])

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "written again")

    monkeypatch.setattr(os, "pwrite", refuse)
    assert add_paths(store, [path]).new_bytes == 0


def test_tensor_that_occurs_twice_is_written_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the first is not in the index yet."""
    shared = random_bytes(COPY_BUFFER_SIZE + 5, 1)
    tensors = {name: ("U8", [len(shared)], shared) for name in "abc"}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    written = 0
    real = os.pwrite

    def counting(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    added = add_paths(store, [path])
    assert written == len(shared)
    assert added.new_bytes == path.stat().st_size - 2 * len(shared)


def test_chunk_list_that_was_lost_comes_back(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [3 * MIB, COPY_BUFFER_SIZE + 5])
    manifest = add_paths(store, [path]).manifest
    lists = [ref.chunk_list for ref in manifest.objects if ref.chunk_list]
    store.forget(lists)
    assert add_paths(store, [path]).new_bytes == 0
    assert all(store.has(digest) for digest in lists)


def test_add_uses_what_a_fetch_left_in_part(store: Store, tmp_path: Path) -> None:
    data = random_bytes(3 * MIB, 4)
    incoming = store.receive(ref_of(data), b"".join(digest_of(chunk_of(data, i)) for i in range(3)))
    incoming.write_chunk(0, chunk_of(data, 0))
    (tmp_path / "f.bin").write_bytes(data)
    add_paths(store, [tmp_path / "f.bin"])
    assert store.holdings([digest_of(data)])[digest_of(data)].proved is None
    incoming.write_chunk(1, chunk_of(data, 1))
    incoming.write_chunk(2, chunk_of(data, 2))
    incoming.finished.result(60)
    assert_sound(store)


# ---- links, and files that are none


def test_cache_of_links_is_followed(store: Store, tmp_path: Path) -> None:
    """As huggingface_hub lays its cache out: snapshots are links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    random_model(blobs / "0123", [100, 70_000])
    (blobs / "4567").write_text("{}")
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    (snapshot / "config.json").symlink_to(blobs / "4567")
    manifest = add_paths(store, [snapshot]).manifest
    assert [(f.path, f.format) for f in manifest.files] == [
        ("config.json", "verbatim"),
        ("model.safetensors", "safetensors"),
    ]
    assert_sound(store)
    adopted = add_paths(store, [snapshot], copy=False)
    assert adopted.new_bytes == 0


def test_adopted_link_is_noted_by_its_target(store: Store, tmp_path: Path) -> None:
    target = random_model(tmp_path / "blob", [70_000])
    (tmp_path / "m.safetensors").symlink_to(target)
    manifest = add_paths(store, [tmp_path / "m.safetensors"], copy=False).manifest
    (tmp_path / "m.safetensors").unlink()
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    assert_sound(store)


def test_link_to_a_folder_inside_a_folder_is_refused(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model(folder / "m.safetensors", [9])
    (folder / "loop").symlink_to(folder)
    with pytest.raises(BadInput, match="loop: a link to a folder"):
        add_paths(store, [folder])
    (tmp_path / "link").symlink_to(folder)
    (folder / "loop").unlink()
    add_paths(store, [tmp_path / "link"])  # given by name, it is what was meant


def test_dangling_link_is_refused(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model(folder / "m.safetensors", [9])
    (folder / "config.json").symlink_to("nowhere")
    with pytest.raises(BadInput, match=r"config\.json: cannot be read"):
        add_paths(store, [folder])
    assert state_of(store) == ([], [], [])


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@both_ways
def test_what_is_no_regular_file_is_refused(
    store: Store, tmp_path: Path, kind: str, copy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody waits for the other end of a FIFO: it is not even opened."""
    folder = tmp_path / "model"
    random_model(folder / "a.safetensors", [9])
    special = folder / "m.safetensors"
    if kind == "fifo":
        os.mkfifo(special)
    elif kind == "device":
        special.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(folder)  # a socket's path must be short
        server = socket.socket(socket.AF_UNIX)
        server.bind(special.name)
        server.close()
    for path in (folder, special):
        with pytest.raises(BadInput, match="not a regular file"):
            add_paths(store, [path], copy=copy)
    assert state_of(store) == ([], [], [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_refused(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    path = random_model(folder / "sub" / "m.safetensors", [9])
    random_model(folder / "a.safetensors", [9])
    path.chmod(0)
    with pytest.raises(BadInput, match="cannot be read"):
        add_paths(store, [folder])
    path.parent.chmod(0)
    try:
        with pytest.raises(BadInput, match="cannot be read"):
            add_paths(store, [folder])
    finally:
        path.parent.chmod(0o700)
    assert state_of(store) == ([], [], [])


def test_folder_that_cannot_be_listed_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may list everything, so the system's refusal is made up."""
    random_model(tmp_path / "model" / "a.safetensors", [9])
    random_model(tmp_path / "model" / "sub" / "b.safetensors", [9])
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match="sub: cannot be read"):
        files_under([tmp_path / "model"])


@pytest.mark.parametrize(
    "names",
    [
        ["model/a\nb.bin"],
        ["model/CON"],
        ["model/A.bin", "model/a.bin"],
        ["model/a\\b"],
        ["model/x:y"],
    ],
)
def test_unsafe_names_are_refused(store: Store, tmp_path: Path, names: Sequence[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput) as caught:
        add_paths(store, [tmp_path / "model"])
    assert "\n" not in str(caught.value)
    assert state_of(store) == ([], [], [])


def test_name_that_is_no_unicode_is_refused(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"\xff\xfe.bin")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    with pytest.raises(BadInput, match="not valid Unicode"):
        add_paths(store, [folder])


def test_nothing_to_add(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(BadInput):
            add_paths(store, [path])
    path = random_model(tmp_path / "m.safetensors", [9])
    with pytest.raises(BadInput, match="one file"):
        add_paths(store, [path, path])


def test_too_many_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "MAX_FILES", 3)
    for i in range(4):
        (tmp_path / f"{i}.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="more than 3 files"):
        add_paths(store, [tmp_path])


# ---- malformed safetensors


def tensor(dtype: str, shape: list[object], begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


MALFORMED = {
    "no bytes": b"",
    "short header length": b"\x08\0\0",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "header of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "not JSON": header(b"{not json}"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "not an object": header(b"[1, 2]"),
    "nested too deeply": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "overlap": header({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 2, 6)}) + bytes(6),
    "gap": header({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 4, 6)}) + bytes(6),
    "begins late": header({"a": tensor("U8", [2], 2, 4)}) + bytes(4),
    "ends early": header({"a": tensor("U8", [2], 0, 2)}) + bytes(4),
    "ends late": header({"a": tensor("U8", [8], 0, 8)}) + bytes(4),
    "backwards": header({"a": tensor("U8", [2], 4, 2)}) + bytes(4),
    "unknown dtype": header({"a": tensor("F7", [4], 0, 4)}) + bytes(4),
    "shape too small": header({"a": tensor("F32", [1], 0, 8)}) + bytes(8),
    "shape overflows": header({"a": tensor("F32", [1 << 32, 1 << 32], 0, 4)}) + bytes(4),
    "negative shape": header({"a": tensor("U8", [-4], 0, 4)}) + bytes(4),
    "shape of floats": header({"a": tensor("U8", [4.0], 0, 4)}) + bytes(4),
    "offsets of strings": header({"a": tensor("U8", [4], "0", "4")}) + bytes(4),
    "no dtype": header({"a": {"shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
    "entry is a list": header({"a": [1]}),
    "same name twice": header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    + bytes(1),
    "metadata of numbers": header({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("fault", MALFORMED)
@both_ways
def test_malformed_file_leaves_no_trace(
    store: Store, tmp_path: Path, fault: str, copy: bool
) -> None:
    """Not even of the good files beside it."""
    add_paths(store, [random_model(tmp_path / "old.safetensors", [100, 70_000, 2 * MIB])])
    before = state_of(store)
    folder = tmp_path / "model"
    random_model(folder / "a.safetensors", [200, 80_000], seed=1)
    (folder / "m.safetensors").write_bytes(MALFORMED[fault])
    (folder / "z.json").write_text("{}")
    for path in (folder, folder / "m.safetensors"):
        with pytest.raises(BadInput) as caught:
            add_paths(store, [path], copy=copy)
        message = str(caught.value)
        assert message.isprintable(), "more than one line"
        assert "m.safetensors" in message and len(message) < 1500
        with pytest.raises(BadInput):
            describe_paths([path])
    assert state_of(store) == before
    assert rubbish(store.root) == []
    assert_sound(store)


# ---- files that change


class Meddler:
    """Changes a file when `add` has read a certain number of its bytes."""

    def __init__(self, path: Path, change: Callable[[Path], object], after_bytes: int) -> None:
        self._path, self._change, self._left = path, change, after_bytes

    def __call__(self, count: int) -> None:
        before, self._left = self._left, self._left - count
        if before > 0 >= self._left:
            self._change(self._path)


def rewrite(path: Path) -> None:
    """Change bytes in place, and the modification time back to what it was."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"different!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-10] + b"different!")


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def vanish(path: Path) -> None:
    path.unlink()


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [rewrite, grow, cut])
@both_ways
def test_file_that_changes_while_it_is_read(
    store: Store, tmp_path: Path, change: Callable[[Path], object], copy: bool
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    before = state_of(store)
    with pytest.raises(BadInput, match=r"changed while|cannot be read"):
        add_paths(store, [path], copy=copy, progress=Meddler(path, change, 200_000))
    assert state_of(store) == before
    assert rubbish(store.root) == []


def test_file_that_changes_between_its_header_and_its_bytes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header that was parsed would not be the header that is kept."""
    path = random_model(tmp_path / "m.safetensors", [100, 200])
    other = random_model(tmp_path / "other", [200, 100], seed=3).read_bytes()
    assert len(other) == path.stat().st_size
    real = ingest.read_sources

    def read_then_change(paths: Sequence[Path]) -> object:
        sources = real(paths)
        path.write_bytes(other)
        return sources

    monkeypatch.setattr(ingest, "read_sources", read_then_change)
    for call in (lambda: add_paths(store, [path]), lambda: describe_paths([path])):
        path.write_bytes(other)
        with pytest.raises(BadInput, match="changed while"):
            call()
    assert state_of(store) == ([], [], [])


# ---- adopted files

CHANGES = [rewrite, replace, grow, cut, vanish, become_folder, become_fifo]


@pytest.fixture
def adopted(store: Store, tmp_path: Path) -> tuple[Path, Manifest]:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    return path, add_paths(store, [path], copy=False).manifest


def test_adopting_copies_nothing(store: Store, adopted: tuple[Path, Manifest]) -> None:
    assert files_below(store.root / "objects") == []
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_adopted_file_is_not_given_out(
    store: Store, adopted: tuple[Path, Manifest], change: Callable[[Path], object]
) -> None:
    path, manifest = adopted
    readers = [store.open_reader(ref.digest) for ref in manifest.objects]
    change(path)
    large = [ref for ref in manifest.objects if ref.size_bytes > INLINE_LIMIT]
    assert len(large) == 3
    for ref in large:
        assert not store.has(ref.digest)
        assert store.open_reader(ref.digest) is None
        assert store.get_blob(ref.digest, 3 * MIB) is None
        assert ref.digest not in store.holdings([ref.digest])
        assert ref.digest not in store.all_digests()
    assert len(store.missing_objects(manifest, range(len(manifest.objects)))) == 3
    for ref, reader in zip(manifest.objects, readers, strict=True):
        assert reader is not None
        data = bytearray(ref.size_bytes)
        try:
            reader.read_into(0, memoryview(data))
        except OSError:
            assert ref in large
        else:
            assert digest_of(data) == ref.digest, "an open reader gave what is not the object"
        reader.close()
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copy", [True, False])
def test_content_of_a_changed_adopted_file_can_come_again(
    store: Store,
    adopted: tuple[Path, Manifest],
    tmp_path: Path,
    change: Callable[[Path], object],
    copy: bool,
) -> None:
    path, manifest = adopted
    elsewhere = tmp_path / "elsewhere" / "m.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(path.read_bytes())
    change(path)
    ingested = add_paths(store, [elsewhere], copy=copy)
    assert ingested.manifest == manifest
    assert ingested.new_bytes == 200_000 + 2 * MIB + 300_000
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
def test_content_of_a_changed_adopted_file_can_be_received(
    store: Store, adopted: tuple[Path, Manifest], change: Callable[[Path], object]
) -> None:
    path, manifest = adopted
    contents = [bytes_of(store, ref.digest) for ref in manifest.objects]
    change(path)
    for data in contents:
        assert data is not None
        receive_all(store, data)
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    assert_sound(store)


def test_changed_file_is_added_again(store: Store, adopted: tuple[Path, Manifest]) -> None:
    path, manifest = adopted
    rewrite(path)
    ingested = add_paths(store, [path], copy=False)
    assert ingested.manifest != manifest
    assert ingested.new_bytes == 200_000 + 2 * MIB + 300_000
    assert_sound(store)
    assert len(store.missing_objects(manifest, range(len(manifest.objects)))) == 1
    assert len(store.adopted.all()) == 1


def test_touched_file_is_hashed_again_when_the_store_opens(store_dir: Path, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
        everything = range(len(manifest.objects))
        os.utime(path, (1, 1))
        assert len(store.missing_objects(manifest, everything)) == 3
        with Store(store_dir):
            pass
        assert store.missing_objects(manifest, everything) == []
        rewrite(path)
        with Store(store_dir) as other:
            assert len(other.missing_objects(manifest, everything)) == 1
            assert_sound(other)
        assert len(store.missing_objects(manifest, everything)) == 1


def test_vanished_file_may_come_back(store_dir: Path, tmp_path: Path) -> None:
    """As a disk does that is mounted later."""
    path = random_model(tmp_path / "disk" / "m.safetensors", [200_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
    path.parent.rename(tmp_path / "away")
    with Store(store_dir) as store:
        assert len(store.missing_objects(manifest, range(2))) == 1
        assert_sound(store)
        (tmp_path / "away").rename(path.parent)
        assert store.missing_objects(manifest, range(2)) == []
        assert_sound(store)


def test_power_cut_after_adopting(store_dir: Path, tmp_path: Path) -> None:
    """The user's own file may be torn too: its times and size can outlive its bytes."""
    path = random_model(tmp_path / "m.safetensors", [200_000, 300_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
    cut_the_power(store_dir)
    rewrite(path)
    stat = path.stat()
    state = (stat.st_mtime_ns, stat.st_ctime_ns)
    edit_index(store_dir, "UPDATE adopted_files SET mtime_ns=?, ctime_ns=?", state)
    with Store(store_dir) as store:
        assert_sound(store)
        assert len(store.missing_objects(manifest, range(3))) == 1
        assert store.sync() == 1
    cut_the_power(store_dir)
    assert edit_index(store_dir, "SELECT COUNT(*) FROM objects WHERE boot IS NOT NULL") == [(0,)]


def test_dropping_an_adopted_object_leaves_the_file(
    store: Store, adopted: tuple[Path, Manifest]
) -> None:
    path, manifest = adopted
    before = path.read_bytes()
    store.forget([ref.digest for ref in manifest.objects])
    assert path.read_bytes() == before
    assert store.adopted.all() == []


def test_own_copy_is_not_replaced_by_an_adopted_one(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [200_000])
    manifest = add_paths(store, [path]).manifest
    add_paths(store, [path], copy=False)
    path.unlink()
    assert store.missing_objects(manifest, range(2)) == []
    assert_sound(store)


@pytest.mark.parametrize(
    ("ctime_ns", "now_ns", "slept_s"),
    [
        (5_000_000_001, 5_000_000_001, 0.02),
        (5_000_000_001, 5_015_000_001, 0.005),
        (5_000_000_001, 5_020_000_001, None),
        (5_000_000_001, 4_000_000_000, None),  # a clock that was set back: nothing to wait for
        (5_000_000_000, 5_500_000_000, 1.5),  # whole seconds: a coarse clock, perhaps
        (5_000_000_000, 7_000_000_000, None),
    ],
)
def test_wait_for_the_clock(
    monkeypatch: pytest.MonkeyPatch, ctime_ns: int, now_ns: int, slept_s: float | None
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(records.time, "time_ns", lambda: now_ns)
    monkeypatch.setattr(records.time, "sleep", slept.append)
    records.wait_for_clock(records.FileState(1, 1, ctime_ns, 1))
    assert slept == ([] if slept_s is None else [pytest.approx(slept_s)])


def test_change_within_one_tick_of_the_clock(tmp_path: Path, store: Store) -> None:
    """A file written just now is hashed only when a further change would show."""
    path = random_model(tmp_path / "m.safetensors", [200_000])
    for _ in range(20):
        with path.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(os.urandom(10))
        manifest = add_paths(store, [path], copy=False).manifest
        with path.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(os.urandom(10))
        assert len(store.missing_objects(manifest, range(2))) == 1


# ---- full disks, and other ends of the road


def test_full_disk_takes_everything_back(tmp_path: Path) -> None:
    old = random_model(tmp_path / "old.safetensors", [100, 200_000])
    new = random_model(tmp_path / "new.safetensors", [100, 60_000, 200_000, 3 * MIB, 30 * MIB], 1)
    with small_disk(tmp_path / "disk", 16 * MIB) as disk, Store(disk / "store") as store:
        add_paths(store, [old])
        before = state_of(store)
        with pytest.raises(NoRoom):
            add_paths(store, [new])
        assert state_of(store) == before
        assert rubbish(store.root) == []
        assert_sound(store)
        add_paths(store, [random_model(tmp_path / "small.safetensors", [100, 3 * MIB], 2)])
        assert_sound(store)


def test_limit_on_file_sizes_takes_everything_back(store_dir: Path, tmp_path: Path) -> None:
    """A full disk of another kind, without root: nothing may be written past a limit."""
    paths = {
        "large": random_model(tmp_path / "large.safetensors", [100, 70_000, 2 * MIB], 1),
        "small": random_model(tmp_path / "small.safetensors", [60_000] * 60, 2),
    }
    with Store(store_dir) as store:
        add_paths(store, [random_model(tmp_path / "old.safetensors", [100, 70_000])])
        before = state_of(store)
    for path in paths.values():
        printed = run_python(
            "import resource, sys; from pathlib import Path\n"
            "from tensorswarm.store.errors import NoRoom\n"
            "from tensorswarm.store.ingest import add_paths\n"
            "from tensorswarm.store.store import Store\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
            "with Store(Path(sys.argv[1])) as store:\n"
            "    try: add_paths(store, [Path(sys.argv[2])])\n"
            "    except NoRoom: print('no room')\n",
            store_dir,
            path,
        )
        assert printed == "no room\n"
        with Store(store_dir) as store:
            assert state_of(store) == before
            assert rubbish(store_dir) == []
            assert_sound(store)
    with Store(store_dir) as store:
        for path in paths.values():
            add_paths(store, [path])
        assert_sound(store)


def test_full_index_takes_everything_back(tmp_path: Path) -> None:
    """Many small tensors: all of it is the index's to take, and to give back when full."""
    new = random_model(tmp_path / "new.safetensors", [60_000] * 400)
    with small_disk(tmp_path / "disk", 16 * MIB) as disk:
        root = disk / "store"
        with Store(root) as store:
            add_paths(store, [random_model(tmp_path / "old.safetensors", [100, 200_000])])
            before = state_of(store)
            with pytest.raises(NoRoom):
                add_paths(store, [new])
            assert state_of(store) == before
            assert_sound(store)
        with Store(root) as store:
            assert state_of(store) == before
            add_paths(store, [random_model(tmp_path / "s.safetensors", [100, 70_000], 2)])
            assert_sound(store)


def test_no_room_for_the_manifest(tmp_path: Path) -> None:
    path = random_model(tmp_path / "new.safetensors", [200_000])
    with small_disk(tmp_path / "disk", 8 * MIB) as disk, Store(disk / "store") as store:
        add_paths(store, [random_model(tmp_path / "old.safetensors", [100])])
        before = state_of(store)
        filler = fill(disk, leave_bytes=4096)
        with pytest.raises(NoRoom):
            add_paths(store, [path])
        filler.unlink()
        assert state_of(store) == before
        assert add_paths(store, [path]).new_bytes == path.stat().st_size
        assert_sound(store)


def test_interrupted_add_takes_everything_back(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, COPY_BUFFER_SIZE + 1, 300_000])

    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    for after in (1, 150_000, COPY_BUFFER_SIZE):
        with pytest.raises(KeyboardInterrupt):
            add_paths(store, [path], progress=Meddler(path, interrupt, after))
        assert state_of(store) == ([], [], [])
        assert rubbish(store.root) == []


def test_failed_add_does_not_take_what_another_relies_on(store_dir: Path, tmp_path: Path) -> None:
    """Two add a shared tensor; the one that brought it fails after the other is done."""
    shared = random_bytes(300_000, 7)
    tiny = random_bytes(50, 8)
    tensors = {"s": ("U8", [len(shared)], shared), "t": ("U8", [50], tiny)}
    rest = {"r": ("U8", [2 * MIB], random_bytes(2 * MIB, 9))}
    failing = write_safetensors(tmp_path / "failing.safetensors", {**tensors, **rest})
    good = write_safetensors(tmp_path / "good.safetensors", tensors)
    with Store(store_dir) as one, Store(store_dir) as two:
        added: list[Manifest] = []

        def meanwhile(_: Path) -> None:
            one.put_blob(tiny)  # known to the other before it begins
            added.append(add_paths(two, [good]).manifest)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            add_paths(one, [failing], progress=Meddler(failing, meanwhile, 300_100))
        assert two.missing_objects(added[0], range(len(added[0].objects))) == []
        assert_sound(two)
        assert len(one.all_digests()) == 1 + len(added[0].objects)


def test_add_begins_anew_when_another_takes_back_what_it_relied_on(
    store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000, 2 * MIB])
    real = Store.put_complete
    calls: list[bool] = []

    def put_complete(self: Store, manifest: Manifest, *rest: Any) -> bool:
        if not calls:
            self.forget([ref.digest for ref in manifest.objects])
        calls.append(real(self, manifest, *rest))
        return calls[-1]

    monkeypatch.setattr(Store, "put_complete", put_complete)
    with Store(store_dir) as store:
        manifest, new_bytes = add_paths(store, [path])
        assert calls == [False, True]
        assert new_bytes == path.stat().st_size
        assert store.missing_objects(manifest, range(len(manifest.objects))) == []
        assert_sound(store)


def test_add_gives_up_when_it_is_robbed_again_and_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000])
    monkeypatch.setattr(Store, "put_complete", lambda *_: False)
    with pytest.raises(LocalError, match="removed from the store"):
        add_paths(store, [path])
    assert state_of(store) == ([], [], [])


def test_undo_that_fails_does_not_hide_the_cause(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000])

    def undo(*_: object) -> None:
        raise NoRoom("no room to undo")

    monkeypatch.setattr(Store, "undo", undo)
    with pytest.raises(BadInput, match="changed while"):
        add_paths(store, [path], progress=Meddler(path, grow, 1))


def test_threads_of_an_add_end_with_it(store: Store, tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        add_paths(store, [random_model(tmp_path / "m.safetensors", [100, 2 * MIB])])
        with pytest.raises(BadInput):
            add_paths(store, [tmp_path / "missing"])
    gc.collect()
    assert threading.active_count() == before


# ---- many, and large


def test_many_small_tensors_take_few_commits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [64] * 3000)
    submitted = 0
    real = Index.submit

    def submit(self: Index, operation: Callable[..., object]) -> object:
        nonlocal submitted
        submitted += 1
        return real(self, operation)

    monkeypatch.setattr(Index, "submit", submit)
    ingested = add_paths(store, [path])
    assert len(ingested.manifest.objects) == 3001
    assert submitted < 20
    assert_sound(store)


# ---- hashing


@pytest.fixture
def hasher() -> Iterator[RangeHasher]:
    opened = RangeHasher()
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [*SIZES, *LARGE_SIZES, COPY_BUFFER_SIZE * 3])
def test_scan_of_a_range(hasher: RangeHasher, tmp_path: Path, size: int) -> None:
    data = random_bytes(size, 5)
    (tmp_path / "f").write_bytes(b"before" + data + b"after")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    try:
        digest, chunk_list = hasher.scan(descriptor, 6, size, target)
        assert (digest, size, digest_of(chunk_list) if chunk_list else b"") == ref_of(data)
        assert hasher.scan(descriptor, 6, size) == (digest, chunk_list)
        assert (tmp_path / "copy").read_bytes() == data
        with pytest.raises(OSError):
            hasher.scan(descriptor, 6, size + 100)
    finally:
        os.close(descriptor)
        os.close(target)


def test_scan_describes_what_was_written(
    hasher: RangeHasher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is of the copy's bytes, even if the source has others by then."""
    (tmp_path / "f").write_bytes(random_bytes(3 * COPY_BUFFER_SIZE, 5))
    descriptor = os.open(tmp_path / "f", os.O_RDWR)
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    real = os.pwrite

    def meddling(fd: int, data: memoryview, offset: int) -> int:
        real(descriptor, random_bytes(1000, offset), (offset + 12345) % (3 * COPY_BUFFER_SIZE))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", meddling)
    try:
        digest, chunk_list = hasher.scan(descriptor, 0, 3 * COPY_BUFFER_SIZE, target)
        written = (tmp_path / "copy").read_bytes()
        assert (digest, len(written), digest_of(chunk_list)) == ref_of(written)
    finally:
        os.close(descriptor)
        os.close(target)


def test_scan_that_cannot_write(
    hasher: RangeHasher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * COPY_BUFFER_SIZE))
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    try:
        with pytest.raises(NoRoom):
            hasher.scan(descriptor, 0, 3 * COPY_BUFFER_SIZE, descriptor)
    finally:
        os.close(descriptor)


def test_empty_tensor_is_in_the_manifest_and_takes_no_row(store: Store, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"e": ("F32", [0], b"")})
    manifest = add_paths(store, [path]).manifest
    assert EMPTY_DIGEST in {ref.digest for ref in manifest.objects}
    assert EMPTY_DIGEST not in store.all_digests()
    array = load_tensors(store, manifest)["e"]
    assert array.shape == (0,) and array.dtype == np.float32


def test_errors_are_of_the_project(store: Store, tmp_path: Path) -> None:
    """Whatever `add` is given, nothing foreign comes out."""
    for path in ("/dev/null", "", "\0", "x" * 5000, "/"):
        try:
            add_paths(store, [Path(path) / "nothing" if path == "/" else Path(path)])
        except TensorswarmError:
            continue
        pytest.fail(f"{path!r} was taken")
