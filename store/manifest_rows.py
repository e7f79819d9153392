"""What a manifest is made of, and how much of it there may be. See `manifest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .object_table import ObjectRef as ObjectRef
from .recipes import MAX_DIMENSIONS as MAX_RECIPE_DIMENSIONS

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
    tensors : sequence of NamedTensor
        The tensors in the file, in file order. In a decoded manifest they are made anew
        whenever they are looked through (see `object_table`).
    """

    path: str
    size_bytes: int
    format: str
    parts: tuple[int, ...]
    tensors: Sequence[NamedTensor]
