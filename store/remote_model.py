"""The manifest of files that lie elsewhere, as far as stamps in their headers tell.

Everything in a file that is no stamped tensor is read: headers, padding, small tensors
that the stamp leaves out. It is written into a sparse file of the same size, so that the
manifest is made by the very code that describes files on a disk, and comes out the same.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .digest import chunk_list_of, digest_of
from .errors import BadInput
from .formats import layouts_of
from .formats.layout import Layout
from .formats.stamps import Stamped, check_entry, read_stamp
from .ingest import Describing, Source
from .manifest import Manifest, ObjectRef
from .place import disk_errors, read_exactly, write_fully
from .records import FileState
from .store import Store

MAX_READ_BYTES = 256 << 20
"""Most bytes read of files beside their stamped tensors: beyond, the stamp saves nothing."""


class RemotePart(NamedTuple):
    """A file elsewhere: its name, its size, and a way to read it."""

    name: str
    size_bytes: int
    read_at: Callable[[int, int], bytes]


def describe_remote(store: Store, files: Sequence[RemotePart]) -> tuple[Manifest, int] | None:
    """Return the manifest of stamped files, and how many bytes of it were put in the store.

    What is read, and the chunk lists of the stamps, are in the store afterwards; the
    tensors are not.

    Returns
    -------
    tuple of Manifest and int, or None
        None if a file with tensors is not stamped.

    Raises
    ------
    BadInput
        A header or a stamp is malformed.
    """
    stamps: dict[str, dict[str, Stamped]] = {}
    for file in files:
        if file.name.endswith(".json"):
            continue
        found = read_stamp(file.name, file.size_bytes, file.read_at)
        if found is None:
            return None
        stamps[file.name] = found
    layouts = layouts_of({file.name: (file.size_bytes, file.read_at) for file in files})
    taker = _Taker(store)
    with tempfile.TemporaryDirectory(dir=store.place.temporary().parent) as folder:
        sources = []
        for file in files:
            path = Path(folder) / file.name
            known = taker.known_in(file.name, layouts[file.name], stamps.get(file.name, {}))
            if not _copy_rest(file, layouts[file.name], known, path):
                return None
            state = FileState.of(path.stat())
            sources.append(Source(path, file.name, state, layouts[file.name]))
        taker.paths = {source.path.stat().st_ino: source.name for source in sources}
        manifest = Describing(sources, taker, Path(folder)).manifest()
    return manifest, taker.put_bytes


def _copy_rest(file: RemotePart, layout: Layout, known: set[int], path: Path) -> bool:
    """Write what is not stamped into a sparse file; False if that would be too much."""
    rest = [piece for piece in layout.pieces if piece.offset not in known]
    if sum(piece.size_bytes for piece in rest) > MAX_READ_BYTES:
        return False
    with disk_errors("cannot write a header"), path.open("xb", buffering=0) as target:
        target.truncate(file.size_bytes)
        for piece in rest:
            data = file.read_at(piece.offset, piece.size_bytes)
            write_fully(target.fileno(), piece.offset, memoryview(data))
    return True


class _Taker:
    """Stands in for `Adding`: stamped tensors are believed, all else goes into the store."""

    def __init__(self, store: Store) -> None:
        self.paths: dict[int, str] = {}
        self.put_bytes = 0
        self._store = store
        self._known: dict[tuple[str, int, int], ObjectRef] = {}

    def known_in(self, name: str, layout: Layout, stamp: dict[str, Stamped]) -> set[int]:
        """Note the stamped tensors of a file; return where they begin."""
        for tensor in layout.tensors:
            entry = stamp.get(tensor.name)
            if entry is None or not tensor.size_bytes:
                continue
            list_digest = check_entry(tensor.name, entry, tensor.size_bytes)
            if entry.chunk_list:
                self._store.put_blob(entry.chunk_list)
            ref = ObjectRef(entry.digest, tensor.size_bytes, list_digest)
            place = (name, tensor.offset, tensor.size_bytes)
            if self._known.setdefault(place, ref) != ref:
                raise BadInput("a stamp that says two things of the same bytes")
        return {offset for where, offset, _ in self._known if where == name}

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Return a stamped tensor's object, or put the bytes into the store."""
        if not own:
            name = self.paths.get(os.fstat(descriptor).st_ino, "")
            ref = self._known.get((name, offset, size_bytes))
            if ref is not None:
                return ref
        data = bytearray(size_bytes)
        read_exactly(descriptor, offset, memoryview(data))
        whole = bytes(data)
        chunk_list = chunk_list_of(whole)
        if not self._store.has(digest_of(whole)):
            self.put_bytes += size_bytes
        digest = self._store.put_blob(whole)
        return ObjectRef(digest, size_bytes, digest_of(chunk_list) if chunk_list else b"")

    def ahead(
        self, descriptor: int, ranges: Sequence[tuple[int, int]]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a block that does nothing: what is read is little."""
        return contextlib.nullcontext()

    def finish_file(self, path: Path, state: FileState) -> None:
        """Do nothing: nothing lies where it is."""
