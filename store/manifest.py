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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import msgpack

from .cid import model_cid
from .digest import digest_of
from .errors import BadInput
from .manifest_reader import BLOCK_ROWS, Reader
from .manifest_rows import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_OBJECTS,
    MAX_PARTS,
    MAX_RECIPES,
    MAX_TENSORS,
    VERSION,
    VERSION_WITH_RECIPES,
    FileEntry,
    NamedTensor,
    Recipe,
    RecipeSpec,
)
from .manifest_rules import (
    blocks_of,
    check_objects,
    check_parts,
    check_recipes,
    check_tensors,
    in_file_order,
)
from .names import check_paths, quoted
from .object_table import EncodedRows, ObjectRef, ObjectTable

__all__ = [
    "MAX_FILES", "MAX_MANIFEST_BYTES", "MAX_OBJECTS", "MAX_PARTS", "MAX_RECIPES", "MAX_TENSORS",
    "VERSION", "VERSION_WITH_RECIPES", "FileEntry", "Manifest", "ManifestBuilder", "NamedTensor",
    "ObjectRef", "Recipe", "RecipeSpec",
]  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The description of one model.

    Parameters
    ----------
    objects : sequence of ObjectRef
        Sorted by digest: a tuple, or an `ObjectTable`.
    files : tuple of FileEntry
        Sorted by path.
    recipes : tuple of Recipe
        Sorted by digest.

    Raises
    ------
    BadInput
        A rule in this module's header is broken.
    """

    objects: Sequence[ObjectRef]
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
        if not isinstance(self.objects, ObjectTable):  # that one was checked on its way in
            check_objects(self.objects)
        _check_paths(self.files)
        check_recipes(self.recipes, self.objects)
        sizes = self._sizes
        used = bytearray(len(sizes))
        is_in_order = True
        for entry in self.files:
            try:
                check_parts(entry, sizes, used)
                blocks = blocks_of(entry.tensors)
                tensors = check_tensors(blocks, sizes, used, len(self.objects))
                is_in_order = is_in_order and in_file_order(entry.parts, tensors, sizes)
            except BadInput as error:
                raise BadInput(f"file {quoted(entry.path)}: {error}") from error
        for recipe in self.recipes:
            for index in recipe.inputs:
                used[index] = 1
        unused = used.find(0)
        if unused >= 0:
            what = "object" if unused < len(self.objects) else "recipe"
            raise BadInput(f"{what} {unused} is used by no file")
        is_plain = is_in_order and not self.recipes
        self.__dict__["version"] = VERSION if is_plain else VERSION_WITH_RECIPES

    @cached_property
    def table(self) -> ObjectTable:
        """The objects in columns."""
        objects = self.objects
        return objects if isinstance(objects, ObjectTable) else ObjectTable(objects)

    @cached_property
    def _sizes(self) -> Sequence[int]:
        """Sizes by index, of objects and then of recipes."""
        objects = self.objects
        known = objects.sizes if isinstance(objects, ObjectTable) else [r[1] for r in objects]
        return [*known, *(r.size_bytes for r in self.recipes)] if self.recipes else known

    @cached_property
    def version(self) -> int:
        """Version of the encoding: 1 if that can say it all."""
        raise AssertionError("set by `validate`")

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
        if self._encoded:
            return self._encoded
        data = b"".join(self._pieces())
        if len(data) > MAX_MANIFEST_BYTES:
            raise BadInput(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
        return data

    @cached_property
    def _encoded(self) -> bytes:
        """The canonical encoding, where it is at hand: a decoded manifest rests on it."""
        return b""

    def _pieces(self) -> Iterator[bytes]:
        """Yield the canonical encoding, a bounded part at a time."""
        packer = msgpack.Packer()
        has_recipes = self.version != VERSION
        yield packer.pack_array_header(4 if has_recipes else 3) + packer.pack(self.version)
        yield packer.pack_array_header(len(self.objects))
        yield from _packed(packer, self.objects)
        yield packer.pack_array_header(len(self.files))
        for entry in self.files:
            yield packer.pack_array_header(5) + b"".join(
                [packer.pack(each) for each in (entry.path, entry.size_bytes, entry.format)]
            )
            yield packer.pack(entry.parts)
            yield packer.pack_array_header(len(entry.tensors))
            yield from _packed(packer, entry.tensors)
        if has_recipes:
            yield packer.pack(self.recipes)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Parameters
        ----------
        data : bytes
            An encoding, from anyone. It is kept: the tensors are read from it.

        Raises
        ------
        BadInput
            The bytes are not a canonical encoding of a manifest that keeps every
            rule.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise BadInput(f"a manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = cls(*Reader(data).manifest())
        except (ValueError, msgpack.UnpackException) as error:
            raise BadInput(f"not a manifest: {error}") from error
        except BadInput as error:
            raise BadInput(f"bad manifest: {error}") from error
        # One comparison settles all that makes an encoding canonical: shortest
        # integers and headers, no bytes after the end.
        start = 0
        for piece in manifest._pieces():
            if not data.startswith(piece, start):
                raise BadInput("bad manifest: its encoding is not canonical")
            start += len(piece)
        if start != len(data):
            raise BadInput("bad manifest: its encoding is not canonical")
        manifest.__dict__["_encoded"] = data
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
        kept = self._recipes.keys() - self._objects.keys()
        needed = self._needed(kept)
        # Two files may make each other's objects. One that then is in no file is made, too.
        kept |= {
            tensor[3].digest
            for file in self._files
            for tensor in file.tensors
            if tensor[3].digest not in needed and self._can_be_made(tensor[3].digest, needed)
        }
        tensors = {tensor[3].digest for file in self._files for tensor in file.tensors}
        digests = sorted(needed | (tensors & self._objects.keys()) - kept)
        recipes = [self._recipes[digest] for digest in sorted(kept)]
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

    def _needed(self, kept: Iterable[bytes]) -> set[bytes]:
        """Return the digests of the objects that files' bytes are, or are made of."""
        needed = {part.digest for file in self._files for part in file.parts}
        needed |= {ref.digest for digest in kept for ref in self._recipes[digest].inputs}
        return needed & self._objects.keys()

    def _can_be_made(self, digest: bytes, needed: set[bytes]) -> bool:
        recipe = self._recipes.get(digest)
        return recipe is not None and all(ref.digest in needed for ref in recipe.inputs)


class _PendingFile(NamedTuple):
    path: str
    format: str
    parts: Sequence[ObjectRef | RecipeSpec]
    tensors: Sequence[tuple[str, str, Sequence[int], ObjectRef | RecipeSpec]]


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


def _check_paths(files: Sequence[FileEntry]) -> None:
    check_paths(entry.path for entry in files)
    for i in range(1, len(files)):
        if files[i - 1].path >= files[i].path:
            raise BadInput(f"file {quoted(files[i].path)} is not in the order of paths")


def _packed(packer: msgpack.Packer, rows: Sequence[object]) -> Iterator[bytes]:
    """Yield the encodings of many rows, some at a time."""
    parts: Iterable[Iterable[object]]
    starts = range(0, len(rows), BLOCK_ROWS)
    if isinstance(rows, EncodedRows):  # they were judged when the manifest was validated
        unpacked = rows.unpacked()
        parts = (islice(unpacked, BLOCK_ROWS) for _ in starts)
    elif isinstance(rows, ObjectTable):
        parts = (rows.rows(start, min(start + BLOCK_ROWS, len(rows))) for start in starts)
    else:
        parts = (rows[start : start + BLOCK_ROWS] for start in starts)
    for part in parts:
        # As an array, without its head: one call for many.
        packed = list(part)
        yield packer.pack(packed)[len(packer.pack_array_header(len(packed))) :]
