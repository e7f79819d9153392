"""The manifest: what files a model has, and of what bytes each of them is made.

A manifest lists *objects* (tensors and blobs, by digest), *files* made of
objects in order, and the *tensors* named in each file. Its canonical encoding is
the model's identity: the model id is the CID of these bytes, so one manifest has
exactly one encoding, and `Manifest.decode` refuses every other. The encoding is
specified in ``docs/format.md``.

A `Manifest` is checked when it is made, whether by `Manifest.decode` from bytes
of a stranger or by `ManifestBuilder` from files at hand: whoever holds one may
rely on every rule below.

- Objects are sorted by digest, unique, and each is used by some file.
- Files are sorted by path; the paths are safe and do not collide (``names.py``).
- A file's parts, concatenated, are the file. Empty objects are not parts.
- A file's tensors are in file order: each that has bytes is a part, not before
  the part of the tensor ahead of it; two may share a part (tied weights).
- A tensor's size follows from its dtype and shape, and is its object's.
- An object has a chunk list exactly if it has more than one chunk.

A manifest does not say where bytes can be had, who made it, or what the model is
for, and nobody checks here that objects hold what they are named for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import msgpack

from .cid import model_cid
from .digest import CHUNK_SIZE, DIGEST_SIZE, EMPTY_DIGEST, MAX_OBJECT_SIZE, digest_of
from .dtypes import MAX_DIMENSIONS, tensor_size_bytes
from .errors import BadInput
from .names import check_paths, check_tensor_name, quoted

VERSION = 1
"""Version of the encoding; the first field of every manifest."""

MAX_MANIFEST_BYTES = 64 << 20
"""Longest encoding. A tensor takes about 130 bytes, so this holds half a million;
the largest published models have some 200,000."""

MAX_OBJECTS = 1 << 20
"""Most objects: MAX_TENSORS tensors, and as many blobs again."""

MAX_TENSORS = 1 << 19
"""Most named tensors in all files: as many as MAX_MANIFEST_BYTES has room for."""

MAX_FILES = 1 << 16
"""Most files. Published models have some hundreds; each costs a file on disk."""

MAX_PARTS = 1 << 20
"""Most parts in all files. A repeated part takes only 2 bytes of a manifest, so
without this limit a small one could describe a file of endless pieces."""

MAX_FILE_BYTES = MAX_OBJECT_SIZE
"""Largest file, in bytes: kept verbatim, it would be a single object."""

_LONGEST_ARRAY = max(MAX_OBJECTS, MAX_TENSORS, MAX_FILES, MAX_PARTS)

_FORMAT_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}", re.ASCII)
"""Format names are only passed on, so that a node can carry formats it cannot parse."""


class ObjectRef(NamedTuple):
    """A tensor or blob.

    Attributes
    ----------
    digest : bytes
        BLAKE3-256 of the bytes.
    size_bytes : int
        Length in bytes.
    chunk_list : bytes
        Digest of the chunk list for an object of more than one chunk, else empty.
    """

    digest: bytes
    size_bytes: int
    chunk_list: bytes


class NamedTensor(NamedTuple):
    """A tensor as one file names it.

    Attributes
    ----------
    name : str
        Unique within the file.
    dtype : str
        A name from ``dtypes.DTYPE_BITS``.
    shape : tuple of int
        Length of each dimension.
    object_index : int
        Which of the manifest's objects has the tensor's bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    object_index: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a model.

    Attributes
    ----------
    path : str
        Relative path, with ``/`` between its parts.
    size_bytes : int
        Length in bytes, the sum of the parts'.
    format : str
        Which parser found the tensors: ``"safetensors"``, ``"verbatim"``.
    parts : tuple of int
        Indices of the objects whose bytes, concatenated, are the file.
    tensors : tuple of NamedTensor
        The tensors in the file, in file order.
    """

    path: str
    size_bytes: int
    format: str
    parts: tuple[int, ...]
    tensors: tuple[NamedTensor, ...]


@dataclass(frozen=True)
class Manifest:
    """The description of one model.

    Parameters
    ----------
    objects : tuple of ObjectRef
        Sorted by digest.
    files : tuple of FileEntry
        Sorted by path.

    Raises
    ------
    BadInput
        A rule in this module's header is broken.
    """

    objects: tuple[ObjectRef, ...]
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every rule in this module's header.

        Raises
        ------
        BadInput
            A rule is broken; the message says which.
        """
        _check_counts(self)
        _check_objects(self.objects)
        _check_paths(self.files)
        used = bytearray(len(self.objects))
        for entry in self.files:
            try:
                _check_parts(entry, self.objects, used)
                _check_tensors(entry, self.objects, used)
            except BadInput as error:
                raise BadInput(f"file {quoted(entry.path)}: {error}") from error
        unused = used.find(0)
        if unused >= 0:
            raise BadInput(f"object {unused} is used by no file")

    def encode(self) -> bytes:
        """Return the canonical encoding: the same manifest gives the same bytes.

        Raises
        ------
        BadInput
            The encoding is longer than ``MAX_MANIFEST_BYTES``.
        """
        files = [
            (entry.path, entry.size_bytes, entry.format, entry.parts, entry.tensors)
            for entry in self.files
        ]
        data: bytes = msgpack.packb((VERSION, self.objects, files))
        if len(data) > MAX_MANIFEST_BYTES:
            raise BadInput(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Parameters
        ----------
        data : bytes
            An encoding, from anyone.

        Raises
        ------
        BadInput
            The bytes are not a canonical encoding of a manifest that keeps every
            rule.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise BadInput(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = cls(*_Reader(data).manifest())
        except (ValueError, msgpack.UnpackException) as error:
            raise BadInput(f"not a manifest: {error}") from error
        except BadInput as error:
            raise BadInput(f"bad manifest: {error}") from error
        # One comparison settles all that makes an encoding canonical: shortest
        # integers and headers, no bytes after the end.
        if manifest.encode() != data:
            raise BadInput("bad manifest: its encoding is not canonical")
        return manifest

    @cached_property
    def digest(self) -> bytes:
        """BLAKE3-256 of the canonical encoding."""
        return digest_of(self.encode())

    @cached_property
    def model_id(self) -> str:
        """The model's CID, made from `digest`."""
        return model_cid(self.digest)

    @cached_property
    def weights_digest(self) -> bytes:
        """BLAKE3-256 over the digests of all named tensors, sorted, each once.

        Equal for equal weights, whatever the files' format and the tensors' names.
        """
        # Objects are sorted by digest, so sorted indices are sorted digests.
        return digest_of(b"".join(self.objects[i].digest for i in sorted(self.tensor_indices)))

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all objects, each counted once."""
        return sum(item.size_bytes for item in self.objects)

    @cached_property
    def tensor_indices(self) -> frozenset[int]:
        """Indices of the objects that some file names as a tensor."""
        return frozenset(tensor.object_index for entry in self.files for tensor in entry.tensors)

    @cached_property
    def file_by_path(self) -> dict[str, FileEntry]:
        """The files, by path."""
        return {entry.path: entry for entry in self.files}


class ManifestBuilder:
    """Collects files and makes a manifest of them."""

    def __init__(self) -> None:
        self._objects: dict[bytes, ObjectRef] = {}
        self._files: list[_PendingFile] = []

    def add_file(
        self,
        path: str,
        format: str,
        parts: Sequence[ObjectRef],
        tensors: Sequence[tuple[str, str, Sequence[int], ObjectRef]],
    ) -> None:
        """Add a file.

        Parameters
        ----------
        path : str
            The file's path in the model.
        format : str
            Name of the file's format.
        parts : sequence of ObjectRef
            What the file's bytes are, in order; empty ones are left out.
        tensors : sequence of (str, str, sequence of int, ObjectRef)
            Name, dtype, shape and bytes of each tensor, in file order.

        Raises
        ------
        BadInput
            An object has the digest of an earlier one, but differs from it. All
            other rules are checked by `build`.
        """
        parts = [part for part in parts if part.size_bytes]
        for item in (*parts, *(tensor[3] for tensor in tensors)):
            if self._objects.setdefault(item.digest, item) != item:
                raise BadInput(f"object {item.digest.hex()} has two sizes or two chunk lists")
        self._files.append(_PendingFile(path, format, parts, tensors))

    def build(self) -> Manifest:
        """Return the manifest of all files added.

        Raises
        ------
        BadInput
            There are none, or they break a rule in this module's header.
        """
        digests = sorted(self._objects)
        index = {digest: position for position, digest in enumerate(digests)}
        files = [
            FileEntry(
                path=file.path,
                size_bytes=sum(part.size_bytes for part in file.parts),
                format=file.format,
                parts=tuple(index[part.digest] for part in file.parts),
                tensors=tuple(
                    NamedTensor(name, dtype, tuple(shape), index[item.digest])
                    for name, dtype, shape, item in file.tensors
                ),
            )
            for file in self._files
        ]
        files.sort(key=lambda entry: entry.path)
        return Manifest(tuple(self._objects[digest] for digest in digests), tuple(files))


class _PendingFile(NamedTuple):
    path: str
    format: str
    parts: Sequence[ObjectRef]
    tensors: Sequence[tuple[str, str, Sequence[int], ObjectRef]]


class _Reader:
    """Reads the fields of an encoded manifest, each of the one type it may have.

    The unpacker is never let loose on an array: it reads one scalar at a time,
    and array headers are read and counted here. An array or map in place of a
    scalar is refused as soon as the innermost one is complete. So memory grows
    with what was asked for, and not with what the bytes claim or nest.
    """

    def __init__(self, data: bytes) -> None:
        unpacker = msgpack.Unpacker(
            raw=False,
            max_buffer_size=MAX_MANIFEST_BYTES,
            max_array_len=_LONGEST_ARRAY,
            max_map_len=0,
            list_hook=_refuse_container,
            object_hook=_refuse_container,
        )
        unpacker.feed(data)
        self._scalar: Any = unpacker.unpack
        self._header: Any = unpacker.read_array_header
        self._parts_left = MAX_PARTS
        self._tensors_left = MAX_TENSORS

    def manifest(self) -> tuple[tuple[ObjectRef, ...], tuple[FileEntry, ...]]:
        self._tuple(3, "manifest")
        version = self._scalar()
        if type(version) is not int or version != VERSION:
            raise BadInput(f"version {quoted(str(version))}, only {VERSION} is known")
        objects = tuple([self._object() for _ in range(self._array(MAX_OBJECTS, "objects"))])
        files = tuple([self._file() for _ in range(self._array(MAX_FILES, "files"))])
        return objects, files

    def _object(self) -> ObjectRef:
        self._tuple(3, "object")
        scalar = self._scalar
        item = ObjectRef(scalar(), scalar(), scalar())
        if (
            type(item.digest) is not bytes
            or type(item.size_bytes) is not int
            or type(item.chunk_list) is not bytes
        ):
            raise BadInput("an object is not a digest, a size and a chunk list")
        return item

    def _file(self) -> FileEntry:
        self._tuple(5, "file")
        path, size_bytes, format_name = self._scalar(), self._scalar(), self._scalar()
        if type(path) is not str or type(size_bytes) is not int or type(format_name) is not str:
            raise BadInput("a file is not a path, a size and a format")
        part_count = self._array(self._parts_left, "parts")
        self._parts_left -= part_count
        parts = self._integers(part_count, "parts")
        tensor_count = self._array(self._tensors_left, "tensors")
        self._tensors_left -= tensor_count
        tensors = tuple([self._tensor() for _ in range(tensor_count)])
        return FileEntry(path, size_bytes, format_name, parts, tensors)

    def _tensor(self) -> NamedTensor:
        self._tuple(4, "tensor")
        name, dtype = self._scalar(), self._scalar()
        shape = self._integers(self._array(MAX_DIMENSIONS, "dimensions"), "dimensions")
        object_index = self._scalar()
        if type(name) is not str or type(dtype) is not str or type(object_index) is not int:
            raise BadInput("a tensor is not a name, a dtype, a shape and an object's index")
        return NamedTensor(name, dtype, shape, object_index)

    def _tuple(self, length: int, what: str) -> None:
        if self._header() != length:
            raise BadInput(f"a {what} does not have {length} fields")

    def _array(self, limit: int, what: str) -> int:
        count: int = self._header()
        if count > limit:
            raise BadInput(f"too many {what}")
        return count

    def _integers(self, count: int, what: str) -> tuple[int, ...]:
        scalar = self._scalar
        values = tuple([scalar() for _ in range(count)])
        for value in values:
            if type(value) is not int:
                raise BadInput(f"{what} that are not integers")
        return values


def _refuse_container(_: object) -> NoReturn:
    raise BadInput("an array or map where a single value belongs")


def _check_counts(manifest: Manifest) -> None:
    if not manifest.files:
        raise BadInput("a model without files")
    for what, count, limit in (
        ("files", len(manifest.files), MAX_FILES),
        ("objects", len(manifest.objects), MAX_OBJECTS),
        ("parts", sum(len(entry.parts) for entry in manifest.files), MAX_PARTS),
        ("tensors", sum(len(entry.tensors) for entry in manifest.files), MAX_TENSORS),
    ):
        if count > limit:
            raise BadInput(f"{count} {what}, at most {limit}")


def _check_objects(objects: Sequence[ObjectRef]) -> None:
    previous = b""
    for position, (digest, size_bytes, chunk_list) in enumerate(objects):
        if len(digest) != DIGEST_SIZE:
            raise BadInput(f"object {position} has a digest of {len(digest)} bytes")
        if digest <= previous:
            raise BadInput(f"object {position} is not in the order of digests, or is there twice")
        if not 0 <= size_bytes <= MAX_OBJECT_SIZE:
            raise BadInput(f"object {position} is of {size_bytes} bytes, at most {MAX_OBJECT_SIZE}")
        if (size_bytes == 0) != (digest == EMPTY_DIGEST):
            raise BadInput(f"object {position} has the digest of no bytes, or should have it")
        if len(chunk_list) != (DIGEST_SIZE if size_bytes > CHUNK_SIZE else 0):
            raise BadInput(f"object {position} lacks a chunk list, or should not have one")
        previous = digest


def _check_paths(files: Sequence[FileEntry]) -> None:
    check_paths(entry.path for entry in files)
    for i in range(1, len(files)):
        if files[i - 1].path >= files[i].path:
            raise BadInput(f"file {quoted(files[i].path)} is not in the order of paths")


def _check_parts(entry: FileEntry, objects: Sequence[ObjectRef], used: bytearray) -> None:
    if not _FORMAT_NAME.fullmatch(entry.format):
        raise BadInput(f"bad format name {quoted(entry.format)}")
    total_bytes = 0
    for index in entry.parts:
        if not 0 <= index < len(objects):
            raise BadInput(f"a part is object {index} of {len(objects)}")
        size_bytes = objects[index].size_bytes
        if not size_bytes:
            raise BadInput("an empty object is a part")
        total_bytes += size_bytes
        used[index] = 1
    if total_bytes != entry.size_bytes:
        raise BadInput(f"{entry.size_bytes} bytes, but its parts have {total_bytes}")
    if total_bytes > MAX_FILE_BYTES:
        raise BadInput(f"{total_bytes} bytes, at most {MAX_FILE_BYTES}")


def _check_tensors(entry: FileEntry, objects: Sequence[ObjectRef], used: bytearray) -> None:
    names: set[str] = set()
    parts, position = entry.parts, 0
    for name, dtype, shape, index in entry.tensors:
        check_tensor_name(name)
        if name in names:
            raise BadInput(f"tensor {quoted(name)} is there twice")
        names.add(name)
        if not 0 <= index < len(objects):
            raise BadInput(f"tensor {quoted(name)} is object {index} of {len(objects)}")
        size_bytes = objects[index].size_bytes
        if tensor_size_bytes(dtype, shape) != size_bytes:
            raise BadInput(
                f"tensor {quoted(name)} is of {size_bytes} bytes, "
                "which its dtype and shape contradict"
            )
        if size_bytes == 0:
            used[index] = 1
            continue
        # Tensors come in file order, so one walk along the parts finds them all;
        # a tied tensor stays where the walk stands.
        while position < len(parts) and parts[position] != index:
            position += 1
        if position == len(parts):
            raise BadInput(f"tensor {quoted(name)} is not a part of the file, in file order")
