"""Taking files into the store: from paths on disk to a manifest.

Every file's layout is read and checked before a byte is kept, so that one
malformed file leaves the store as it was. A piece whose digest is known already
is not written again. Bytes are hashed while they are copied, and the copy must
agree with the first reading: a file that changes under our hands is refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from .digest import CHUNK_SIZE, EMPTY_DIGEST, digest_of
from .errors import BadInput
from .formats import layout_of
from .formats.layout import Layout, Piece
from .manifest import MAX_FILES, Manifest, ManifestBuilder, ObjectRef
from .names import check_path, check_paths
from .place import COPY_BUFFER_SIZE, disk_errors, read_exactly
from .records import AdoptedFile
from .store import INLINE_LIMIT, Store

SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
"""Folders that hold a tool's own state, not the model's files."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Ingested(NamedTuple):
    """What `add_paths` did."""

    manifest: Manifest
    new_bytes: int


class _Source(NamedTuple):
    path: Path
    name: str
    size_bytes: int
    layout: Layout


def files_under(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the files that paths stand for, with their names in the model.

    A file keeps its own name; a folder gives every file below it, named relative to it.

    Raises
    ------
    BadInput
        A path is missing or of no use, two files have one name, or there are too many.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            found += [(file, file.relative_to(path).as_posix()) for file in _walk(path)]
        elif path.exists():
            found.append((path, path.name))
        else:
            raise BadInput(f"{path}: no such file or folder")
        if len(found) > MAX_FILES:
            raise BadInput(f"{path}: more than {MAX_FILES} files in one model")
    if not found:
        raise BadInput(f"nothing to add: no files in {', '.join(str(path) for path in paths)}")
    for _, name in found:
        check_path(name)
    check_paths([name for _, name in found])
    return sorted(found, key=lambda item: item[1])


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            yield Path(parent) / name


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path}: not a regular file")
    return descriptor


def _read_source(path: Path, name: str) -> _Source:
    descriptor = _open(path)
    try:
        size = os.fstat(descriptor).st_size

        def read_at(offset: int, length: int) -> bytes:
            return os.pread(descriptor, length, offset)

        try:
            layout = layout_of(name, size, read_at)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return _Source(path, name, size, layout)


def read_sources(paths: Sequence[Path]) -> list[_Source]:
    """Find the files of a model and check the layout of each; nothing is kept."""
    return [_read_source(path, name) for path, name in files_under(paths)]


def add_paths(
    store: Store,
    paths: Sequence[Path],
    *,
    copy: bool = True,
    progress: Progress = lambda count: None,
) -> Ingested:
    """Add one model, made of all files that `paths` stand for.

    Parameters
    ----------
    store : Store
        Where it goes.
    paths : sequence of Path
        Files and folders.
    copy : bool
        False to register byte ranges of the files where they lie.
    progress : callable
        Hears of bytes read.

    Returns
    -------
    Ingested
        The manifest, and how many bytes of its objects were new to the store.

    Raises
    ------
    BadInput
        A path or a file is of no use; the store is as it was.
    NoRoom
        The disk is full; what this call had added is removed again.
    """
    sources = read_sources(paths)
    builder = ManifestBuilder()
    new: dict[bytes, int] = {}
    try:
        for source in sources:
            _add_file(store, source, builder, new, copy, progress)
        manifest = builder.build()
        store.put_manifest(manifest, model_name(paths))
    except BaseException:
        store.forget(list(new))
        raise
    return Ingested(manifest, sum(new.values()))


def describe_paths(paths: Sequence[Path]) -> Manifest:
    """Return the manifest that `add_paths` would make; nothing is kept.

    Raises
    ------
    BadInput
        A path or a file is of no use.
    """
    builder = ManifestBuilder()
    for source in read_sources(paths):
        descriptor = _open(source.path)
        try:
            refs: dict[tuple[int, int], ObjectRef] = {}
            for piece in source.layout.pieces:
                digest, chunk_list = _hash_range(descriptor, piece.offset, piece.size_bytes)
                list_digest = digest_of(chunk_list) if chunk_list else b""
                refs[piece.offset, piece.size_bytes] = ObjectRef(
                    digest, piece.size_bytes, list_digest
                )
        except OSError as error:
            raise BadInput(f"{source.path}: cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)
        _put_into(builder, source, refs)
    return builder.build()


def _put_into(
    builder: ManifestBuilder, source: _Source, refs: Mapping[tuple[int, int], ObjectRef]
) -> None:
    """Add a file to a manifest, given the object of each of its pieces."""
    empty = ObjectRef(EMPTY_DIGEST, 0, b"")
    layout = source.layout
    tensors = [
        (t.name, t.dtype, t.shape, refs[t.offset, t.size_bytes] if t.size_bytes else empty)
        for t in layout.tensors
    ]
    parts = [refs[piece.offset, piece.size_bytes] for piece in layout.pieces]
    builder.add_file(source.name, layout.format, parts, tensors)


def model_name(paths: Sequence[Path]) -> str:
    """Return a name for people: the folder or file that was added."""
    path = paths[0].absolute()
    return path.name or str(path)


def _add_file(
    store: Store,
    source: _Source,
    builder: ManifestBuilder,
    new: dict[bytes, int],
    copy: bool,
    progress: Progress,
) -> None:
    descriptor = _open(source.path)
    try:
        before = os.fstat(descriptor)
        adopted = None if copy else store.adopted.register(source.path.resolve())
        by_range: dict[tuple[int, int], ObjectRef] = {}
        for piece in source.layout.pieces:
            by_range[piece.offset, piece.size_bytes] = _add_piece(
                store, source, descriptor, piece, adopted, new, progress
            )
        after = os.fstat(descriptor)
    except OSError as error:
        raise BadInput(f"{source.path}: cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or (
        before.st_size != source.size_bytes
    ):
        raise BadInput(f"{source.path}: changed while it was being read; add it again")
    _put_into(builder, source, by_range)


def _add_piece(
    store: Store,
    source: _Source,
    descriptor: int,
    piece: Piece,
    adopted: AdoptedFile | None,
    new: dict[bytes, int],
    progress: Progress,
) -> ObjectRef:
    digest, chunk_list = _hash_range(descriptor, piece.offset, piece.size_bytes)
    progress(piece.size_bytes)
    known = store.records([digest]).get(digest)
    if known is not None and store.locate(digest) is not None:
        return ObjectRef(digest, piece.size_bytes, known.chunk_list)
    list_digest = b""
    if chunk_list:
        list_digest = digest_of(chunk_list)
        if not store.has(list_digest):
            store.put_blob(chunk_list)
            new.setdefault(list_digest, 0)
    new[digest] = piece.size_bytes
    if piece.size_bytes <= INLINE_LIMIT:
        data = os.pread(descriptor, piece.size_bytes, piece.offset)
        if digest_of(data) != digest:
            raise BadInput(f"{source.path}: changed while it was being read; add it again")
        store.keep_inline(digest, data, list_digest).result()
    elif adopted is not None:
        store.keep_range(adopted, piece.offset, digest, piece.size_bytes, list_digest).result()
    else:
        _copy_range(
            store, source, descriptor, piece, ObjectRef(digest, piece.size_bytes, list_digest)
        )
    return ObjectRef(digest, piece.size_bytes, list_digest)


def _hash_range(descriptor: int, offset: int, size_bytes: int) -> tuple[bytes, bytes]:
    """Return a range's digest and chunk list, read in large pieces."""
    whole = blake3(max_threads=blake3.AUTO)
    single = size_bytes <= CHUNK_SIZE
    chunk_digests: list[bytes] = []
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, max(size_bytes, 1))))
    for start in range(0, size_bytes, len(buffer)):
        view = buffer[: min(len(buffer), size_bytes - start)]
        read_exactly(descriptor, offset + start, view)
        whole.update(view)
        if not single:
            chunk_digests += [
                digest_of(view[at : at + CHUNK_SIZE]) for at in range(0, len(view), CHUNK_SIZE)
            ]
    return whole.digest(), b"".join(chunk_digests)


def _copy_range(
    store: Store, source: _Source, descriptor: int, piece: Piece, ref: ObjectRef
) -> None:
    """Copy a range into the store, hashing what is copied."""
    path = store.place.temporary()
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, piece.size_bytes)))
    try:
        with disk_errors(f"cannot copy {source.path} into the store"), path.open("wb") as file:
            for start in range(0, piece.size_bytes, len(buffer)):
                view = buffer[: min(len(buffer), piece.size_bytes - start)]
                read_exactly(descriptor, piece.offset + start, view)
                hasher.update(view)
                file.write(view)
        if hasher.digest() != ref.digest:
            raise BadInput(f"{source.path}: changed while it was being read; add it again")
        store.keep_file(path, ref.digest, ref.size_bytes, ref.chunk_list).result()
    finally:
        path.unlink(missing_ok=True)
