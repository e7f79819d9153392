"""Rules of manifests about files: their parts, their tensors, and recipes.

Each function raises ``BadInput`` for a broken rule, and notes in `used` what the file
uses, by index: objects first, then recipes. `sizes` are the sizes by the same index.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import lt
from typing import TYPE_CHECKING, Any

from .digest import CHUNK_SIZE, DIGEST_SIZE, EMPTY_DIGEST, MAX_OBJECT_SIZE
from .dtypes import tensor_size_bytes
from .errors import BadInput
from .names import check_tensor_name, quoted
from .object_table import EncodedRows
from .recipes import check_recipe

if TYPE_CHECKING:
    from .manifest_rows import FileEntry, NamedTensor, ObjectRef, Recipe

FORMAT_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}", re.ASCII)
"""Format names are only passed on, so that a node can carry formats it cannot parse."""


Row = tuple[str, str, Sequence[int], int]
"""A tensor of a file: name, dtype, shape and object index."""

BLOCK_TENSORS = 1024
"""Tensors looked at together. All at once would be hundreds of thousands of tuples, which the
collector of cycles then goes through, and everything else in the program with them."""


def blocks_of(tensors: Sequence[NamedTensor]) -> Iterator[Sequence[Row]]:
    """Yield the tensors of a file as rows, some at a time.

    Those that are encoded are checked together: many tensors are the usual case, and what
    is wrong with one is told by whoever makes it, which takes four times as long.
    """
    if not isinstance(tensors, EncodedRows):
        yield tensors
        return
    unpacked = tensors.unpacked()
    while rows := list(islice(unpacked, BLOCK_TENSORS)):
        yield rows if _are_typed(rows) else list(map(tensors.make, rows))


def _are_typed(rows: Sequence[Any]) -> bool:
    """Tell whether rows have the types of a tensor, all of them."""
    if {*map(type, rows)} != {tuple} or {*map(len, rows)} != {4}:
        return False
    names, dtypes, shapes, indices = ({*map(type, column)} for column in zip(*rows, strict=True))
    if not (names == dtypes == {str} and shapes == {tuple} and indices == {int}):
        return False
    return {*map(type, chain.from_iterable([row[2] for row in rows]))} <= {int}


def check_recipes(recipes: Sequence[Recipe], objects: Sequence[ObjectRef]) -> None:
    """Check what recipes make and are made from."""
    if not recipes:
        return
    kept = {item.digest for item in objects}
    previous = b""
    for position, recipe in enumerate(recipes):
        if len(recipe.digest) != DIGEST_SIZE or recipe.digest in kept:
            raise BadInput(f"recipe {position} makes an object, or has a bad digest")
        if recipe.digest <= previous:
            raise BadInput(f"recipe {position} is not in the order of digests, or is there twice")
        if not all(0 <= index < len(objects) for index in recipe.inputs):
            raise BadInput(f"recipe {position} uses objects that are not there")
        sizes = [objects[index].size_bytes for index in recipe.inputs]
        check_recipe(recipe.kind, recipe.parameters, sizes, recipe.size_bytes)
        previous = recipe.digest


def check_objects(objects: Sequence[ObjectRef], start: int = 0, previous: bytes = b"") -> bytes:
    """Check objects from position `start` on, behind `previous`; return the last digest."""
    if objects and _are_right(objects, previous):
        return objects[-1][0]
    for position, (digest, size_bytes, chunk_list) in enumerate(objects, start):
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
    return previous


def _are_right(objects: Sequence[ObjectRef], previous: bytes) -> bool:
    """Tell whether many objects keep every rule, none of them empty or of several chunks.

    The usual case of many objects, found out in a few steps; of others each is looked at.
    """
    digests, sizes, lists = zip(*objects, strict=True)
    return (
        {*map(len, digests)} == {DIGEST_SIZE}
        and previous < digests[0]
        and all(map(lt, digests, digests[1:]))
        and min(sizes) > 0
        and max(sizes) <= CHUNK_SIZE
        and not any(lists)
        and EMPTY_DIGEST not in digests
    )


def check_parts(entry: FileEntry, sizes: Sequence[int], used: bytearray) -> None:
    """Check the parts of a file, and note which objects and recipes they use."""
    if not FORMAT_NAME.fullmatch(entry.format):
        raise BadInput(f"bad format name {quoted(entry.format)}")
    total_bytes = 0
    for index in entry.parts:
        if not 0 <= index < len(sizes):
            raise BadInput(f"a part is object {index} of {len(sizes)}")
        size_bytes = sizes[index]
        if not size_bytes:
            raise BadInput("an empty object is a part")
        total_bytes += size_bytes
        used[index] = 1
    if total_bytes != entry.size_bytes:
        raise BadInput(f"{entry.size_bytes} bytes, but its parts have {total_bytes}")
    if total_bytes > MAX_OBJECT_SIZE:
        raise BadInput(f"{total_bytes} bytes, at most {MAX_OBJECT_SIZE}")


def check_tensors(
    blocks: Iterable[Sequence[Row]],
    sizes: Sequence[int],
    used: bytearray,
    first_recipe: int,
) -> array[int]:
    """Check the tensors of a file, and note the recipes and empty objects they use.

    Returns
    -------
    array of int
        Their objects, in order.
    """
    objects = array("q")
    names: set[str] = set()
    known: dict[tuple[object, ...], int] = {}  # most tensors are of a few shapes
    for name, dtype, shape, index in chain.from_iterable(blocks):
        check_tensor_name(name)
        if name in names:
            raise BadInput(f"tensor {quoted(name)} is there twice")
        names.add(name)
        if not 0 <= index < len(sizes):
            raise BadInput(f"tensor {quoted(name)} is object {index} of {len(sizes)}")
        kind = dtype, *shape
        size_bytes = known.get(kind)
        if size_bytes is None:
            size_bytes = known[kind] = tensor_size_bytes(dtype, shape)
        if size_bytes != sizes[index]:
            raise BadInput(
                f"tensor {quoted(name)} is of {sizes[index]} bytes, "
                "which its dtype and shape contradict"
            )
        # A tensor's own object has to be in a file; what is empty cannot be.
        if not sizes[index] or index >= first_recipe:
            used[index] = 1
        objects.append(index)
    return objects


def in_file_order(parts: Sequence[int], tensors: Sequence[int], sizes: Sequence[int]) -> bool:
    """Tell whether each tensor, by its object, is a part of its file, none before the last."""
    position = 0
    count = len(parts)
    for object_index in tensors:
        if not sizes[object_index]:
            continue
        # One walk along the parts finds them all; a tied tensor stays where it stands.
        while position < count and parts[position] != object_index:
            position += 1
        if position == count:
            return False
    return True
