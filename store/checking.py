"""Hashing what the store has, where it lies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from blake3 import blake3

from .errors import BadInput, StoreDamaged
from .manifest import Manifest, Recipe
from .place import COPY_BUFFER_SIZE
from .reader import ObjectReader
from .recipes import Bytes, Input, make
from .store import Store


def iterate_object(store: Store, digest: bytes) -> Iterator[memoryview]:
    """Yield a whole object's bytes in order, and verify them at the end.

    The pieces share one buffer: use each before asking for the next.

    Raises
    ------
    StoreDamaged
        The object is not here, or (after the last piece) its bytes are not those its
        digest names.
    LocalError
        It is here but cannot be opened now.
    """
    reader = store.open_whole(digest)
    if reader is None:
        raise StoreDamaged(f"tensor {digest.hex()} is not in the store")
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, max(reader.size_bytes, 1))))
    try:
        for start in range(0, reader.size_bytes, len(buffer)):
            view = buffer[: min(len(buffer), reader.size_bytes - start)]
            reader.read_into(start, view)
            hasher.update(view)
            yield view
    except OSError as error:
        raise StoreDamaged(f"tensor {digest.hex()}: {error.strerror or error}") from error
    finally:
        reader.close()
    if hasher.digest() != digest:
        raise StoreDamaged(f"tensor {digest.hex()}: the bytes on disk do not match its digest")


def iterate_part(store: Store, manifest: Manifest, index: int) -> Iterator[memoryview]:
    """Yield the bytes of an object or, beyond the last one, of what a recipe makes.

    Raises
    ------
    StoreDamaged
        As for `iterate_object`; or what a recipe made is not what its digest names.
    """
    recipe = manifest.recipe(index)
    if recipe is None:
        yield from iterate_object(store, manifest.objects[index].digest)
    else:
        yield from _iterate_recipe(store, manifest, recipe)


def _iterate_recipe(store: Store, manifest: Manifest, recipe: Recipe) -> Iterator[memoryview]:
    hasher = blake3(max_threads=blake3.AUTO)
    size = 0
    with contextlib.ExitStack() as stack:
        inputs = []
        for index in recipe.inputs:
            digest = manifest.objects[index].digest
            reader = store.open_whole(digest)
            if reader is None:
                raise StoreDamaged(f"tensor {digest.hex()} is not in the store")
            stack.callback(reader.close)
            inputs.append(input_of(reader))
        try:
            for block in make(recipe.kind, recipe.parameters, inputs, recipe.size_bytes):
                size += len(block)
                if size > recipe.size_bytes:
                    break
                hasher.update(block)
                yield memoryview(block)
        except OSError as error:
            raise StoreDamaged(f"a tensor cannot be read: {error.strerror or error}") from error
        except BadInput as error:
            raise StoreDamaged(f"part {recipe.digest.hex()} cannot be made: {error}") from error
    if size != recipe.size_bytes or hasher.digest() != recipe.digest:
        raise StoreDamaged(
            f"part {recipe.digest.hex()}: {recipe.kind} did not make the bytes its digest names"
        )


def input_of(reader: ObjectReader) -> Input:
    """Return an open object as a recipe's input."""

    def read_at(offset: int, length: int) -> Bytes:
        data = memoryview(bytearray(length))
        reader.read_into(offset, data)
        return data

    return Input(reader.size_bytes, read_at)


def check_object(store: Store, digest: bytes) -> int:
    """Hash one object where it lies.

    Returns
    -------
    int
        Its size in bytes.

    Raises
    ------
    StoreDamaged
        It is not here, or its bytes are not those its digest names.
    """
    return sum(len(piece) for piece in iterate_object(store, digest))
