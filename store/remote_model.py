"""The manifest of files that lie elsewhere, as far as stamps in their headers tell.

Everything in a file that is no stamped tensor is read: headers, padding, small tensors
that the stamp leaves out. It is written into a sparse file of the same size, so that no
byte is asked for twice, and the manifest is made by the very code that describes files on
a disk, and comes out the same.

A stamp speaks for the file it stands in and for those that this one names (`companions`);
what a file says of itself goes first.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .digest import chunk_count, chunk_list_of, digest_of
from .errors import BadInput, TensorswarmError
from .formats import layouts_of
from .formats.companions import companions
from .formats.layout import Content, Extent, Layout, ReadAt, absolute, pieces_made_of
from .formats.stamps import Stamped, check_entry, read_stamp
from .ingest import Describing, Source
from .manifest import Manifest, ObjectRef, RecipeSpec
from .place import disk_errors, read_exactly, write_fully
from .records import FileState
from .store import Store

MAX_READ_BYTES = 256 << 20
"""Most bytes read of a file beside its stamped tensors: beyond, the stamp saves nothing."""

REQUEST_BYTES = 16 << 20
"""Most bytes asked for at a time: they are in memory until they are written."""


class TooMuch(TensorswarmError):
    """More would have to be read of a file than a stamp is worth."""


class RemoteCopy:
    """A file elsewhere, and on this disk what was read of it; close it when done.

    Parameters
    ----------
    name : str
        Its path in the model.
    size_bytes : int
        Its size.
    read_at : ReadAt
        Reads it where it is.
    path : Path
        The file to write, which must not be there yet.
    """

    def __init__(self, name: str, size_bytes: int, read_at: ReadAt, path: Path) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.path = path
        self._read_remote = read_at
        self._starts: list[int] = []  # runs that are here, in order, with gaps between them
        self._stops: list[int] = []
        self._read_bytes = 0
        with disk_errors("cannot write a header"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            os.ftruncate(self._descriptor, size_bytes)

    def close(self) -> None:
        """Close the file on this disk."""
        os.close(self._descriptor)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of the file, those not yet read from where it is.

        Raises
        ------
        TooMuch
            More than `MAX_READ_BYTES` would be read.
        """
        stop = offset + length
        for start, end in list(self._gaps(offset, stop)):
            self._read_bytes += end - start
            if self._read_bytes > MAX_READ_BYTES:
                raise TooMuch(f"{self.name}: more than {MAX_READ_BYTES} bytes without a stamp")
            for at in range(start, end, REQUEST_BYTES):
                data = self._read_remote(at, min(REQUEST_BYTES, end - at))
                with disk_errors("cannot write a header"):
                    write_fully(self._descriptor, at, memoryview(data))
        if length:
            self._note(offset, stop)
        with disk_errors("cannot read a header"):
            return os.pread(self._descriptor, length, offset)

    def _gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the runs of a range that are not here."""
        at = bisect.bisect_right(self._stops, start)
        while start < stop:
            here = self._starts[at] if at < len(self._starts) else stop
            if start < here:
                yield start, min(here, stop)
            if at < len(self._stops):
                start = max(start, self._stops[at])
            else:
                return
            at += 1

    def _note(self, start: int, stop: int) -> None:
        """Note that a range is here now, and join it with those that it touches."""
        first = bisect.bisect_left(self._stops, start)
        last = bisect.bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]


def describe_remote(store: Store, files: Sequence[RemoteCopy]) -> tuple[Manifest, int] | None:
    """Return the manifest of stamped files, and how many bytes of it were put in the store.

    What is read, and the chunk lists of the stamps, are in the store afterwards; the
    tensors are not.

    Returns
    -------
    tuple of Manifest and int, or None
        None if a file with tensors is not stamped, or too little of it is.

    Raises
    ------
    BadInput
        A header or a stamp is malformed.
    """
    try:
        stamps = _stamps_for(files)
        layouts = layouts_of({file.name: (file.size_bytes, file.read_at) for file in files})
        known = _Known(store, layouts, stamps)
        for name, layout in layouts.items():
            tensors = [piece for piece in layout.pieces if piece.is_tensor]
            if tensors and not any(Extent(name, *each[:2]) in known.pieces for each in tensors):
                return None
        if not known.contents and not known.pieces:
            return None
        for file in files:
            for offset, size_bytes, _ in layouts[file.name].pieces:
                if Extent(file.name, offset, size_bytes) not in known.pieces:
                    file.read_at(offset, size_bytes)
    except TooMuch:
        return None
    sources = [
        Source(file.path, file.name, FileState.of(file.path.stat()), layouts[file.name])
        for file in files
    ]
    taker = _Taker(store)
    scratch = store.place.temporary().parent
    manifest = Describing(sources, taker, scratch, known.pieces, known.contents).manifest()
    return manifest, taker.put_bytes


def _stamps_for(files: Sequence[RemoteCopy]) -> dict[str, dict[str, Stamped]]:
    """Return, for each file, what its own stamp and those of files that name it say."""
    own = {file.name: read_stamp(file.name, file.size_bytes, file.read_at) for file in files}
    found: dict[str, dict[str, Stamped]] = {file.name: {} for file in files}
    for file in files:
        if stamp := own[file.name]:
            for name in companions(file.name, file.size_bytes, file.read_at):
                found.get(name, {}).update(stamp)
    for name, stamp in own.items():
        found[name] |= stamp or {}
    return found


class _Known:
    """Pieces and contents that stamps tell; chunk lists go into the store.

    Attributes
    ----------
    pieces : dict of Extent to ObjectRef or RecipeSpec
        Pieces of files that are stamped tensors, or made of one.
    contents : dict of Content to ObjectRef
        Stamped tensors that are not one piece of a file.
    """

    def __init__(
        self,
        store: Store,
        layouts: Mapping[str, Layout],
        stamps: Mapping[str, Mapping[str, Stamped]],
    ) -> None:
        self.pieces: dict[Extent, ObjectRef | RecipeSpec] = {}
        self.contents: dict[Content, ObjectRef] = {}
        self._store = store
        self._layouts = layouts
        made_of = pieces_made_of(layouts)
        places = {Extent(p, *piece[:2]) for p, each in layouts.items() for piece in each.pieces}
        for path, layout in layouts.items():
            for tensor in layout.tensors:
                entry = _said(stamps[path], tensor.name, tensor.size_bytes)
                if entry is not None:
                    ref = self._ref(tensor.name, entry, tensor.size_bytes)
                    self._tell(Extent(path, tensor.offset, tensor.size_bytes), ref)
            for held in layout.held:
                entry = _said(stamps[path], held.name, held.content.size_bytes)
                if entry is None:
                    continue
                content = absolute(held.content, path)
                pieces = made_of.get(content, [])
                if pieces and len(pieces) == len(entry.parts):
                    ref = self._ref(held.name, entry, content.size_bytes)
                    self.contents[content] = ref
                    for piece, digest in zip(pieces, entry.parts, strict=True):
                        self._tell(piece, self._recipe(piece, digest, ref))
                elif (
                    not content.decode
                    and len(content.extents) == 1
                    and content.extents[0] in places
                ):
                    ref = self._ref(held.name, entry, content.size_bytes)
                    self._tell(content.first, ref)

    def _ref(self, name: str, entry: Stamped, size_bytes: int) -> ObjectRef:
        list_digest = check_entry(name, entry, size_bytes)
        if entry.chunk_list:
            self._store.put_blob(entry.chunk_list)
        return ObjectRef(entry.digest, size_bytes, list_digest)

    def _recipe(self, piece: Extent, digest: bytes, ref: ObjectRef) -> RecipeSpec:
        made = self._layouts[piece.path].made[piece.offset]
        return RecipeSpec(digest, piece.size_bytes, made.kind, made.parameters, (ref,))

    def _tell(self, piece: Extent, ref: ObjectRef | RecipeSpec) -> None:
        if self.pieces.setdefault(piece, ref) != ref:
            raise BadInput("a stamp that says two things of the same bytes")


def _said(stamp: Mapping[str, Stamped], name: str, size_bytes: int) -> Stamped | None:
    """Return what a stamp says of a tensor, if it is enough to fetch it by."""
    entry = stamp.get(name)
    if entry is None or not size_bytes:
        return None
    return entry if entry.chunk_list or chunk_count(size_bytes) == 1 else None


class _Taker:
    """Stands in for `Adding`: what is read of the files goes into the store."""

    def __init__(self, store: Store) -> None:
        self.put_bytes = 0
        self._store = store

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Put a range of an open file into the store."""
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
