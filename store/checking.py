"""Hashing what the store has, where it lies."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from .errors import StoreDamaged
from .place import COPY_BUFFER_SIZE
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
