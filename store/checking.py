"""Hashing what the store has, where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from .digest import digest_of
from .errors import StoreDamaged
from .place import COPY_BUFFER_SIZE, read_exactly
from .store import Store


def iterate_object(store: Store, digest: bytes) -> Iterator[memoryview]:
    """Yield a whole object's bytes in order, and verify them at the end.

    The pieces share one buffer: use each before asking for the next.

    Raises
    ------
    StoreDamaged
        The object is not here, or (after the last piece) its bytes are not those its
        digest names.
    """
    found = store.locate(digest)
    if found is None:
        raise StoreDamaged(f"tensor {digest.hex()} is not in the store")
    if isinstance(found, bytes):
        if digest_of(found) != digest:
            raise StoreDamaged(f"tensor {digest.hex()}: its bytes in the index are damaged")
        yield memoryview(found)
        return
    path, offset = found
    size_bytes = store.records([digest])[digest].size_bytes
    yield from iterate_range(path, offset, size_bytes, digest)


def iterate_range(path: Path, offset: int, size_bytes: int, digest: bytes) -> Iterator[memoryview]:
    """Yield a byte range of a file in order, and verify it at the end."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, max(size_bytes, 1))))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreDamaged(f"{path}: {error.strerror}") from error
    try:
        for start in range(0, size_bytes, len(buffer)):
            view = buffer[: min(len(buffer), size_bytes - start)]
            read_exactly(descriptor, offset + start, view)
            hasher.update(view)
            yield view
    except OSError as error:
        raise StoreDamaged(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if hasher.digest() != digest:
        raise StoreDamaged(f"tensor {digest.hex()}: the bytes on disk do not match its digest")


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
