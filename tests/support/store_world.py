"""What the tests of the store share: bytes, objects in chunks, small disks, other processes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from tensorswarm.store.digest import CHUNK_SIZE, chunk_list_of, digest_of
from tensorswarm.store.export import export_files
from tensorswarm.store.incoming import Incoming
from tensorswarm.store.manifest import Manifest, ObjectRef
from tensorswarm.store.store import Store

MIB = 1 << 20

PROJECT = Path(__file__).resolve().parents[2]

DEADLINE_S = 60.0
"""Longest wait for anything that should happen, on the slowest of machines."""


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


SMALL = random_bytes(100, 1)
MIDDLE = random_bytes(300_000, 2)
LARGE = random_bytes(3 * MIB + 17, 3)
"""One object for each way to be kept: in the index, as one chunk, as several."""


def ref_of(data: bytes) -> ObjectRef:
    chunk_list = chunk_list_of(data)
    return ObjectRef(digest_of(data), len(data), digest_of(chunk_list) if chunk_list else b"")


def chunk_of(data: bytes, index: int) -> memoryview:
    return memoryview(data)[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]


def begin(store: Store, data: bytes) -> Incoming:
    """Begin to receive `data`."""
    return store.receive(ref_of(data), chunk_list_of(data))


def receive_all(store: Store, data: bytes) -> None:
    """Receive all that is missing of `data`, and wait until it is in the store."""
    incoming = begin(store, data)
    for index in range(incoming.chunk_count):
        if incoming.is_missing(index):
            incoming.write_chunk(index, chunk_of(data, index))
    incoming.finished.result(DEADLINE_S)


def bytes_of(store: Store, digest: bytes) -> bytes | None:
    """Return what the store gives out under a digest, by its reader; None if not whole."""
    reader = store.open_reader(digest)
    if reader is None:
        return None
    try:
        if not reader.covers(0, reader.size_bytes):
            return None
        data = bytearray(reader.size_bytes)
        reader.read_into(0, memoryview(data))
        return bytes(data)
    finally:
        reader.close()


def assert_sound(store: Store) -> None:
    """Assert that everything visible is what its digest says, whole objects and chunks."""
    for digest in store.all_digests():
        data = bytes_of(store, digest)
        assert data is not None, f"{digest.hex()} is listed, and cannot be read"
        assert digest_of(data) == digest, f"{digest.hex()} is false"
        record = store.records([digest])[digest]
        assert record.size_bytes == len(data)
        assert record.chunk_list == ref_of(data).chunk_list
        if record.chunk_list:
            assert store.get_blob(record.chunk_list, MIB) == chunk_list_of(data)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def rubbish(root: Path) -> list[str]:
    """Return the files of a store that are neither objects nor the index nor locks."""
    names = (name for name in files_below(root) if not name.endswith(".lock"))
    return [name for name in names if name.startswith(("tmp/", "partial/"))]


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]], pad: int = 0
) -> Path:
    """Write dtypes, shapes and bytes by name; `pad` more bytes of header shift the offsets."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data)
    return path


def random_model(path: Path, sizes: Sequence[int], seed: int = 0) -> Path:
    """Write a safetensors file of random U8 tensors of these sizes, named by position."""
    return write_safetensors(
        path,
        {
            f"t{i}": ("U8", [size], random_bytes(size, seed * 1000 + i))
            for i, size in enumerate(sizes)
        },
    )


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


# ---- looking into a store's index from outside


def edit_index(root: Path, sql: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
    """Run a statement on a closed store's index, as no store would."""
    connection = sqlite3.connect(root / "index.db")
    try:
        rows = connection.execute(sql, parameters).fetchall()
        connection.commit()
        return rows
    finally:
        connection.close()


def cut_the_power(root: Path) -> None:
    """Make a closed store look as if the machine had been started anew since.

    What the disk had not taken by then is for the test to destroy.
    """
    edit_index(root, "UPDATE objects SET boot='before' WHERE boot IS NOT NULL")
    edit_index(root, "UPDATE packs SET boot='before'")
    edit_index(root, "UPDATE partials SET boot='before'")


# ---- disks that are full


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Give a disk of this size, mounted on `folder`.

    Only Linux's root may mount, and not in every container: elsewhere the test is skipped,
    also in CI. What it is about is tested there by a limit on file sizes.
    """
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux, to mount a small disk")
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={size_bytes}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options) != 0:
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH: even if a file is still open


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Write a file that takes all room in a folder, but for `leave_bytes`."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(64 << 10))
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - leave_bytes))
    return path


# ---- other processes


def start_python(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a Python process that finds the project, with pipes to its stdin and stdout."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, *arguments: str | Path) -> str:
    """Run a Python process to its end and return what it printed."""
    process = start_python(code, *arguments)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, f"exit code {process.returncode}"
    return output


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


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
