"""Adding files: what is taken, what is refused, and that a refusal leaves no trace."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tensorswarm.store import ingest
from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST, digest_of
from tensorswarm.store.errors import BadInput, TensorswarmError
from tensorswarm.store.index import Index
from tensorswarm.store.ingest import Ingested, add_paths, describe_paths, files_under
from tensorswarm.store.load import load_tensors
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.place import COPY_BUFFER_SIZE
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    assert_holds,
    assert_sound,
    chunk_of,
    files_below,
    random_bytes,
    random_model,
    ref_of,
    rubbish,
    state_of,
    write_safetensors,
)

SIZES = [0, 1, 100, INLINE_LIMIT, INLINE_LIMIT + 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * MIB + 5]
LARGE_SIZES = [COPY_BUFFER_SIZE, COPY_BUFFER_SIZE + 1, 2 * COPY_BUFFER_SIZE + 4099]

both_ways = pytest.mark.parametrize("copy", [True, False], ids=["copied", "adopted"])


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
