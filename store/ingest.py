"""Taking files into the store: from paths on disk to a manifest.

Every file's layout is read and checked before a byte is kept, so that one
malformed file leaves the store as it was. A piece whose digest is known already
is not written again. A file that changes under our hands is refused.

Links to files are followed: caches of other tools are made of them. A folder that holds
a link to a folder is refused, rather than left out in silence or followed to a place
that nobody meant to share.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from .adding import Adding, Progress
from .digest import EMPTY_DIGEST, digest_of
from .errors import BadInput, LocalError
from .formats import layout_of
from .formats.layout import Layout
from .hashing import RangeHasher
from .manifest import MAX_FILES, Manifest, ManifestBuilder, ObjectRef
from .names import check_path, check_paths
from .records import FileState, wait_for_clock
from .store import Store

SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
"""Folders that hold a tool's own state, not the model's files."""

MAX_ROUNDS = 3
"""Times to add again what somebody else took out of the store before we were done."""

_CHANGED = "changed while it was being read; add it again"


class Ingested(NamedTuple):
    """What `add_paths` did."""

    manifest: Manifest
    new_bytes: int


class _Source(NamedTuple):
    path: Path
    name: str
    state: FileState
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
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{_shown(path)}: cannot be read: {reason}") from error
        if is_folder:
            files = ((file, file.relative_to(path).as_posix()) for file in _walk(path))
            found += itertools.islice(files, MAX_FILES + 1)
        else:
            found.append((path, path.name))
        if len(found) > MAX_FILES:
            raise BadInput(f"{_shown(path)}: more than {MAX_FILES} files in one model")
    if not found:
        raise BadInput(f"nothing to add: no files in {', '.join(map(_shown, paths))}")
    for _, name in found:
        check_path(name)
    check_paths([name for _, name in found])
    return sorted(found, key=lambda item: item[1])


def _shown(path: Path) -> str:
    """Return a path for an error message, which is one line whatever files are called."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:
        raise BadInput(
            f"{_shown(Path(error.filename))}: cannot be read: {error.strerror}"
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in folders:
            link = Path(parent) / name
            if link.is_symlink():
                raise BadInput(f"{_shown(link)}: a link to a folder; add that folder itself")
        for name in sorted(files):
            yield Path(parent) / name


def _open(path: Path) -> int:
    try:
        # Looked at before it is opened: opening a device can have effects of its own.
        if stat.S_ISREG(path.stat().st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise BadInput(f"{_shown(path)}: cannot be read: {error.strerror}") from error
    raise BadInput(f"{_shown(path)}: not a regular file")


def _read_source(path: Path, name: str) -> _Source:
    descriptor = _open(path)
    try:
        state = FileState.of(os.fstat(descriptor))

        def read_at(offset: int, length: int) -> bytes:
            return os.pread(descriptor, length, offset)

        try:
            layout = layout_of(name, state.size_bytes, read_at)
        except BadInput as error:
            raise BadInput(f"{_shown(path)}: {error}") from error
        except OSError as error:
            raise BadInput(f"{_shown(path)}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return _Source(path, name, state, layout)


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
    adding = Adding(store, copy, progress)
    try:
        for _ in range(MAX_ROUNDS):
            builder = ManifestBuilder()
            for source in sources:
                _add_file(source, builder, adding, copy)
            manifest = builder.build()
            if adding.complete(manifest, model_name(paths)):
                return Ingested(manifest, adding.new_bytes)
            adding.begin_anew()
        raise LocalError("the model's tensors are removed from the store while it is added")
    except BaseException:
        adding.undo()
        raise
    finally:
        adding.close()


@contextlib.contextmanager
def _unchanged(source: _Source) -> Iterator[int]:
    """Open a file and give its descriptor; it must be as it was examined, until the end."""
    descriptor = _open(source.path)
    try:
        yield descriptor
        if FileState.of(os.fstat(descriptor)) != source.state:
            raise BadInput(f"{_shown(source.path)}: {_CHANGED}")
    except OSError as error:
        raise BadInput(
            f"{_shown(source.path)}: cannot be read: {error.strerror or error}"
        ) from error
    finally:
        os.close(descriptor)


def _add_file(source: _Source, builder: ManifestBuilder, adding: Adding, copy: bool) -> None:
    with _unchanged(source) as descriptor:
        if FileState.of(os.fstat(descriptor)) != source.state:
            raise BadInput(f"{_shown(source.path)}: {_CHANGED}")
        wait_for_clock(source.state)
        by_range = {
            (piece.offset, piece.size_bytes): adding.take(
                descriptor, piece.offset, piece.size_bytes
            )
            for piece in source.layout.pieces
        }
    if not copy:
        adding.finish_file(source.path.resolve(), source.state)
    _put_into(builder, source, by_range)


def describe_paths(paths: Sequence[Path]) -> Manifest:
    """Return the manifest that `add_paths` would make; nothing is kept.

    Raises
    ------
    BadInput
        A path or a file is of no use.
    """
    builder = ManifestBuilder()
    hasher = RangeHasher()
    try:
        for source in read_sources(paths):
            _put_into(builder, source, _hash_pieces(source, hasher))
    finally:
        hasher.close()
    return builder.build()


def _hash_pieces(source: _Source, hasher: RangeHasher) -> dict[tuple[int, int], ObjectRef]:
    refs: dict[tuple[int, int], ObjectRef] = {}
    with _unchanged(source) as descriptor:
        for piece in source.layout.pieces:
            digest, chunk_list = hasher.scan(descriptor, piece.offset, piece.size_bytes)
            list_digest = digest_of(chunk_list) if chunk_list else b""
            refs[piece.offset, piece.size_bytes] = ObjectRef(digest, piece.size_bytes, list_digest)
    return refs


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
    path = paths[0].resolve() if paths[0].name in ("", "..") else paths[0]
    return path.name or str(path)
