"""Stamped copies and sidecars of files on this disk: hashing, reading, writing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from .adding import Progress
from .digest import CHUNK_SIZE, digest_of
from .errors import BadInput
from .formats import stamps
from .formats.companions import companions
from .formats.layout import Extent, absolute, pieces_made_of
from .ingest import Describing, HashingTaker, Source, read_sources, sources_of
from .manifest import Manifest, ObjectRef
from .place import disk_errors, remove_file


class _WithLists(HashingTaker):
    """Keeps the chunk lists of what it hashes."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.lists: dict[bytes, bytes] = {}
        self._progress = progress

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Return what a range of an open file would be, and keep its chunk list."""
        digest, chunk_list = self._hasher.scan(descriptor, offset, size_bytes)
        list_digest = digest_of(chunk_list) if chunk_list else b""
        if chunk_list:
            self.lists[list_digest] = chunk_list
        self._progress(size_bytes)
        return ObjectRef(digest, size_bytes, list_digest)


def _stamps_of(path: Path, progress: Progress) -> dict[str, stamps.Stamped]:
    """Hash a file's tensors, and those in the files that it names, and say what they are."""
    sources = _sources(path)
    manifest, lists = _describe(sources, progress)
    layouts = {source.name: source.layout for source in sources}
    pieces = pieces_made_of(layouts)
    made = _made_parts(manifest)
    tensors: dict[str, stamps.Stamped] = {}
    ambiguous: set[str] = set()
    for entry in manifest.files:
        parts_of = {
            held.name: pieces.get(absolute(held.content, entry.path), [])
            for held in layouts[entry.path].held
        }
        for tensor in entry.tensors:
            if manifest.recipe(tensor.object_index) is not None:
                continue  # it is made from the header's bytes, which are read anyway
            item = manifest.objects[tensor.object_index]
            if not item.size_bytes:
                continue
            parts = [made.get(piece, b"") for piece in parts_of.get(tensor.name, ())]
            told = stamps.Stamped(
                item.digest, lists.get(item.chunk_list, b""), tuple(parts) if all(parts) else ()
            )
            if tensors.setdefault(tensor.name, told) != told:
                ambiguous.add(tensor.name)  # a name that two files use for different tensors
    return {name: told for name, told in tensors.items() if name not in ambiguous}


def _sources(path: Path) -> list[Source]:
    """Return a file and those that it names, or a folder's files."""
    if path.is_dir():
        return read_sources([path])
    try:
        with path.open("rb") as file:
            descriptor = file.fileno()
            names = companions(
                path.name,
                os.fstat(descriptor).st_size,
                lambda offset, length: os.pread(descriptor, length, offset),
            )
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return sources_of([(path, path.name), *((path.parent / name, name) for name in names)])


def _made_parts(manifest: Manifest) -> dict[Extent, bytes]:
    """Return the digests of the parts of files that are made from others, by their places."""
    found: dict[Extent, bytes] = {}
    for file in manifest.files:
        offset = 0
        for index in file.parts:
            recipe, size_bytes = manifest.recipe(index), manifest.size_of(index)
            if recipe is not None:
                found[Extent(file.path, offset, size_bytes)] = recipe.digest
            offset += size_bytes
    return found


def describe_with_lists(
    path: Path, progress: Progress = lambda count: None
) -> tuple[Manifest, dict[bytes, bytes]]:
    """Return the manifest of a file or folder, and its chunk lists by their digests.

    With a file come those that it names: shards, external data.

    Raises
    ------
    BadInput
        It cannot be read, or is malformed.
    """
    return _describe(_sources(path), progress)


def _describe(sources: Sequence[Source], progress: Progress) -> tuple[Manifest, dict[bytes, bytes]]:
    taker = _WithLists(progress)
    try:
        manifest = Describing(sources, taker, None).manifest()
    finally:
        taker.close()
    wanted = {ref.chunk_list for ref in manifest.objects if ref.chunk_list}
    return manifest, {digest: taker.lists[digest] for digest in wanted}


def stamp_file(path: Path, target: Path, progress: Progress = lambda count: None) -> int:
    """Write a stamped copy of a file, and return how many tensors the stamp names.

    Tensors in other files that it names, beside it, are hashed and named too.

    Raises
    ------
    BadInput
        The file cannot be stamped, or bears a stamp already.
    NoRoom
        The disk is full.
    """
    if target.exists() and path.exists() and target.samefile(path):
        raise BadInput(f"{target}: a stamped copy cannot take the place of its own original")
    tensors = _stamps_of(path, progress)
    with disk_errors(f"cannot read {path}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    temporary = target.with_name(f".tensorswarm-{uuid.uuid4().hex}.part")
    try:

        def read_at(offset: int, length: int) -> bytes:
            return os.pread(descriptor, length, offset)

        size = os.fstat(descriptor).st_size
        try:
            parts = stamps.stamped(path.name, size, read_at, stamps.text_of(tensors))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        with disk_errors(f"cannot write {target}"):
            with temporary.open("xb") as output:
                for block in stamps.bytes_of(parts, read_at, CHUNK_SIZE):
                    output.write(block)
            os.replace(temporary, target)
    finally:
        os.close(descriptor)
        remove_file(temporary)
    return len(tensors)
