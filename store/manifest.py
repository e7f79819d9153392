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
- A part or a tensor is an object, or is made by a *recipe* (``recipes.py``) from
  objects: a shard that ends inside a tensor, a compressed array. What a recipe makes is
  in no store; it has a digest, by which it is verified when it is made.
- In version 1 there are no recipes, and a file's tensors are in file order: each that
  has bytes is a part, not before the part of the tensor ahead of it; two may share a
  part (tied weights). Version 2 is for all other models, and only for them.
- A tensor's size follows from its dtype and shape, and is its object's.
- An object has a chunk list exactly if it has more than one chunk.

A manifest does not say where bytes can be had, who made it, or what the model is
for, and nobody checks here that objects hold what they are named for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import msgpack

from .cid import model_cid
from .digest import CHUNK_SIZE, DIGEST_SIZE, EMPTY_DIGEST, MAX_OBJECT_SIZE, digest_of
from .dtypes import MAX_DIMENSIONS
from .errors import BadInput
from .manifest_rules import check_parts, check_recipes, check_tensors, in_file_order
from .names import check_paths, quoted
from .recipes import MAX_DIMENSIONS as MAX_RECIPE_DIMENSIONS
from .recipes import MAX_INPUTS

VERSION = 1
"""Version of the encoding; the first field of every manifest."""

VERSION_WITH_RECIPES = 2
"""Version for a model that has recipes, or tensors that are in no part of their own file."""

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

MAX_RECIPES = 1 << 19
"""Most recipes: one for each tensor, as in a model of compressed arrays."""

MAX_RECIPE_PARAMETERS = 3 + 2 * MAX_RECIPE_DIMENSIONS
"""Most parameters of a recipe: those of the kind ``strided``."""

_LONGEST_ARRAY = max(MAX_OBJECTS, MAX_TENSORS, MAX_FILES, MAX_PARTS)


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


class Recipe(NamedTuple):
    """Bytes that are made from objects.

    Attributes
    ----------
    digest : bytes
        BLAKE3-256 of what is made.
    size_bytes : int
        Length of what is made.
    kind : str
        One of the kinds in ``recipes.py``.
    parameters : tuple of int
        The kind's parameters.
    inputs : tuple of int
        Indices of the objects that it is made from.
    """

    digest: bytes
    size_bytes: int
    kind: str
    parameters: tuple[int, ...]
    inputs: tuple[int, ...]


class RecipeSpec(NamedTuple):
    """A recipe before its manifest is built: `inputs` are objects."""

    digest: bytes
    size_bytes: int
    kind: str
    parameters: tuple[int, ...]
    inputs: tuple[ObjectRef, ...]


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
        Which of the manifest's objects has the tensor's bytes; beyond the last one,
        which of its recipes makes them.
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
        Indices of the objects whose bytes, concatenated, are the file; beyond the last
        object, of recipes.
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
    recipes : tuple of Recipe
        Sorted by digest.

    Raises
    ------
    BadInput
        A rule in this module's header is broken.
    """

    objects: tuple[ObjectRef, ...]
    files: tuple[FileEntry, ...]
    recipes: tuple[Recipe, ...] = ()

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
        check_recipes(self.recipes, self.objects)
        sizes = self._sizes
        used = bytearray(len(sizes))
        for entry in self.files:
            try:
                check_parts(entry, sizes, used)
                check_tensors(entry, sizes, used, len(self.objects))
            except BadInput as error:
                raise BadInput(f"file {quoted(entry.path)}: {error}") from error
        for recipe in self.recipes:
            for index in recipe.inputs:
                used[index] = 1
        unused = used.find(0)
        if unused >= 0:
            what = "object" if unused < len(self.objects) else "recipe"
            raise BadInput(f"{what} {unused} is used by no file")

    @cached_property
    def _sizes(self) -> list[int]:
        """Sizes by index, of objects and then of recipes."""
        return [item.size_bytes for item in self.objects] + [r.size_bytes for r in self.recipes]

    @cached_property
    def version(self) -> int:
        """Version of the encoding: 1 if that can say it all."""
        if self.recipes or not all(in_file_order(file, self._sizes) for file in self.files):
            return VERSION_WITH_RECIPES
        return VERSION

    def size_of(self, index: int) -> int:
        """Return the size in bytes of an object or, beyond the last one, of a recipe."""
        return self._sizes[index]

    def digest_of(self, index: int) -> bytes:
        """Return the digest of an object or, beyond the last one, of a recipe."""
        count = len(self.objects)
        return (self.objects[index] if index < count else self.recipes[index - count]).digest

    def recipe(self, index: int) -> Recipe | None:
        """Return the recipe at an index beyond the last object, None for an object."""
        count = len(self.objects)
        return self.recipes[index - count] if index >= count else None

    def objects_of(self, indices: Iterable[int]) -> frozenset[int]:
        """Return the objects among `indices`, and those that recipes among them need."""
        count = len(self.objects)
        found: set[int] = set()
        for index in indices:
            if index < count:
                found.add(index)
            else:
                found.update(self.recipes[index - count].inputs)
        return frozenset(found)

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
        fields = (self.version, self.objects, files)
        data: bytes = msgpack.packb(fields if self.version == VERSION else (*fields, self.recipes))
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
        named = {tensor.object_index for entry in self.files for tensor in entry.tensors}
        return digest_of(b"".join(sorted({self.digest_of(index) for index in named})))

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all objects, each counted once."""
        return sum(item.size_bytes for item in self.objects)

    @cached_property
    def tensor_indices(self) -> frozenset[int]:
        """Indices of the objects that some file names as a tensor; recipes are not here."""
        named = (tensor.object_index for entry in self.files for tensor in entry.tensors)
        return frozenset(index for index in named if index < len(self.objects))

    @cached_property
    def file_by_path(self) -> dict[str, FileEntry]:
        """The files, by path."""
        return {entry.path: entry for entry in self.files}


class ManifestBuilder:
    """Collects files and makes a manifest of them."""

    def __init__(self) -> None:
        self._objects: dict[bytes, ObjectRef] = {}
        self._recipes: dict[bytes, RecipeSpec] = {}
        self._files: list[_PendingFile] = []

    def add_file(
        self,
        path: str,
        format: str,
        parts: Sequence[ObjectRef | RecipeSpec],
        tensors: Sequence[tuple[str, str, Sequence[int], ObjectRef | RecipeSpec]],
    ) -> None:
        """Add a file.

        Parameters
        ----------
        path : str
            The file's path in the model.
        format : str
            Name of the file's format.
        parts : sequence of ObjectRef or RecipeSpec
            What the file's bytes are, in order; empty ones are left out.
        tensors : sequence of (str, str, sequence of int, ObjectRef or RecipeSpec)
            Name, dtype, shape and bytes of each tensor, in file order.

        Raises
        ------
        BadInput
            An object has the digest of an earlier one, but differs from it. All
            other rules are checked by `build`.
        """
        parts = [part for part in parts if part.size_bytes]
        for item in (*parts, *(tensor[3] for tensor in tensors)):
            if isinstance(item, RecipeSpec):
                self._recipes.setdefault(item.digest, item)
                items: Sequence[ObjectRef] = item.inputs
            else:
                items = (item,)
            for each in items:
                if self._objects.setdefault(each.digest, each) != each:
                    raise BadInput(f"object {each.digest.hex()} has two sizes or two chunk lists")
        self._files.append(_PendingFile(path, format, parts, tensors))

    def build(self) -> Manifest:
        """Return the manifest of all files added.

        Raises
        ------
        BadInput
            There are none, or they break a rule in this module's header.
        """
        # What is an object anyway needs no recipe; then its inputs may be of no use.
        recipes = [self._recipes[d] for d in sorted(self._recipes) if d not in self._objects]
        digests = sorted(self._needed(recipes))
        index = {digest: position for position, digest in enumerate(digests)}
        index |= {recipe.digest: len(digests) + i for i, recipe in enumerate(recipes)}
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
        return Manifest(
            tuple(self._objects[digest] for digest in digests),
            tuple(files),
            tuple(
                Recipe(*spec[:4], tuple(index[ref.digest] for ref in spec.inputs))
                for spec in recipes
            ),
        )

    def _needed(self, recipes: Sequence[RecipeSpec]) -> set[bytes]:
        """Return the digests of the objects that the files and `recipes` use."""
        needed = {ref.digest for recipe in recipes for ref in recipe.inputs}
        for file in self._files:
            needed |= {part.digest for part in file.parts}
            needed |= {tensor[3].digest for tensor in file.tensors}
        return needed & self._objects.keys()


class _PendingFile(NamedTuple):
    path: str
    format: str
    parts: Sequence[ObjectRef | RecipeSpec]
    tensors: Sequence[tuple[str, str, Sequence[int], ObjectRef | RecipeSpec]]


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

    def manifest(
        self,
    ) -> tuple[tuple[ObjectRef, ...], tuple[FileEntry, ...], tuple[Recipe, ...]]:
        fields: int = self._header()
        if fields not in (3, 4):
            raise BadInput("a manifest does not have 3 fields, or 4 with recipes")
        version = self._scalar()
        if type(version) is not int or version not in (VERSION, VERSION_WITH_RECIPES):
            raise BadInput(
                f"version {quoted(str(version))}, only {VERSION} and {VERSION_WITH_RECIPES} "
                "are known"
            )
        if fields != (3 if version == VERSION else 4):
            raise BadInput(f"a manifest of version {version} does not have {fields} fields")
        objects = tuple([self._object() for _ in range(self._array(MAX_OBJECTS, "objects"))])
        files = tuple([self._file() for _ in range(self._array(MAX_FILES, "files"))])
        if version == VERSION:
            return objects, files, ()
        recipes = tuple([self._recipe() for _ in range(self._array(MAX_RECIPES, "recipes"))])
        return objects, files, recipes

    def _recipe(self) -> Recipe:
        self._tuple(5, "recipe")
        scalar = self._scalar
        digest, size_bytes, kind = scalar(), scalar(), scalar()
        if type(digest) is not bytes or type(size_bytes) is not int or type(kind) is not str:
            raise BadInput("a recipe is not a digest, a size and a kind")
        count = self._array(MAX_RECIPE_PARAMETERS, "parameters")
        parameters = self._integers(count, "parameters")
        inputs = self._integers(self._array(MAX_INPUTS, "inputs"), "inputs")
        return Recipe(digest, size_bytes, kind, parameters, inputs)

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
        ("recipes", len(manifest.recipes), MAX_RECIPES),
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
