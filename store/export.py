"""Writing a model's files out of the store, bit for bit.

Each object is hashed on its way out, so a damaged store never makes a damaged
file. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import fnmatch
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .checking import iterate_object, iterate_part
from .errors import BadInput, StoreDamaged
from .manifest import FileEntry, Manifest
from .names import check_path
from .place import disk_errors, remove_file, write_fully
from .store import Store

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


def select(manifest: Manifest, include: Sequence[str]) -> frozenset[int]:
    """Return the indices of the objects that `include` asks for.

    A pattern matches a file's path, or a tensor's name; with a file come all its parts,
    and for what is made by a recipe, the objects it is made from. Without patterns it is
    every object.

    Raises
    ------
    BadInput
        A pattern matches nothing.
    """
    if not include:
        return frozenset(range(len(manifest.objects)))
    chosen: set[int] = set()
    for pattern in include:
        found: set[int] = set()
        for file in manifest.files:
            if fnmatch.fnmatchcase(file.path, pattern):
                found.update(file.parts)
                found.update(tensor.object_index for tensor in file.tensors)
            else:
                found.update(
                    tensor.object_index
                    for tensor in file.tensors
                    if fnmatch.fnmatchcase(tensor.name, pattern)
                )
        if not found and not any(fnmatch.fnmatchcase(f.path, pattern) for f in manifest.files):
            raise BadInput(f"--include {pattern!r} matches no file and no tensor of the model")
        chosen |= found
    return manifest.objects_of(chosen)


def whole_files(manifest: Manifest, objects: Iterable[int]) -> list[FileEntry]:
    """Return the files of which all parts are among `objects`."""
    chosen = frozenset(objects)
    return [file for file in manifest.files if chosen.issuperset(manifest.objects_of(file.parts))]


def export_files(
    store: Store,
    manifest: Manifest,
    files: Sequence[FileEntry],
    folder: Path,
    *,
    progress: Progress = lambda count: None,
) -> list[Path]:
    """Write files of a model below `folder`.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    StoreDamaged
        The store lacks a part, or a part's bytes do not match its digest.
    NoRoom
        The disk is full.
    """
    written = []
    for file in files:
        target = folder / check_path(file.path)
        with disk_errors(f"cannot make the folder {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise BadInput(f"{target} is a folder: cannot write a file of that name")
        _write_file(store, manifest, file, target, progress)
        written.append(target)
    return written


def export_object(store: Store, digest: bytes, target: Path) -> None:
    """Write one object's bytes to a file, verified on the way.

    Raises
    ------
    StoreDamaged
        The store lacks it, or its bytes do not match.
    NoRoom
        The disk is full.
    """
    with disk_errors(f"cannot make the folder {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, iterate_object(store, digest))


def _write_file(
    store: Store, manifest: Manifest, file: FileEntry, target: Path, progress: Progress
) -> None:
    def pieces() -> Iterator[memoryview]:
        for part in file.parts:
            for piece in iterate_part(store, manifest, part):
                yield piece
                progress(len(piece))

    _write(target, pieces(), file.size_bytes)


def _write(target: Path, pieces: Iterable[memoryview], size_bytes: int | None = None) -> None:
    """Write pieces to a file that gets its name once it is complete."""
    # Not made from the target's name, which may be as long as a name can be.
    temporary = target.with_name(f".tensorswarm-{uuid.uuid4().hex}.part")
    try:
        with disk_errors(f"cannot write {target}"):
            size = 0
            with temporary.open("xb", buffering=0) as output:
                for piece in pieces:
                    write_fully(output.fileno(), size, piece)
                    size += len(piece)
            if size_bytes is not None and size != size_bytes:
                raise StoreDamaged(f"{target}: its parts have {size} bytes, it has {size_bytes}")
            os.replace(temporary, target)
    finally:
        remove_file(temporary)
