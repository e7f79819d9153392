"""Hashing and copying byte ranges of files, in large pieces and with two threads.

The whole's digest needs every byte in order, the chunk list needs each chunk by
itself: two passes of BLAKE3 over the same bytes. While one thread reads and hashes the
whole, another hashes the chunks and, when copying, writes. What comes back describes
exactly the bytes that were written, whatever happened to the source meanwhile.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from .digest import CHUNK_SIZE, digest_of
from .place import COPY_BUFFER_SIZE, disk_errors, read_exactly, write_fully


def hash_range(descriptor: int, offset: int, size_bytes: int) -> bytes:
    """Return the digest of a byte range of a file.

    Raises
    ------
    OSError
        The file ends too early, or the disk fails.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, max(size_bytes, 1))))
    for start in range(0, size_bytes, len(buffer)):
        view = buffer[: min(len(buffer), size_bytes - start)]
        read_exactly(descriptor, offset + start, view)
        hasher.update(view)
    return hasher.digest()


def hash_file(path: Path, size_bytes: int) -> bytes:
    """Return the digest of a file's first `size_bytes` bytes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hash_range(descriptor, 0, size_bytes)
    finally:
        os.close(descriptor)


def chunk_digests(view: memoryview) -> bytes:
    """Return the digests of a view's chunks, concatenated."""
    return b"".join(
        digest_of(view[start : start + CHUNK_SIZE]) for start in range(0, len(view), CHUNK_SIZE)
    )


class RangeHasher:
    """Hashes ranges of files, and copies them; close it when done.

    It keeps two buffers, and a thread of its own.
    """

    def __init__(self) -> None:
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="store-hasher")
        self._buffers = [memoryview(bytearray(COPY_BUFFER_SIZE)) for _ in range(2)]

    def close(self) -> None:
        """End the thread."""
        self._helper.shutdown(wait=True)

    def read_small(self, descriptor: int, offset: int, size_bytes: int) -> memoryview:
        """Return a range of at most ``COPY_BUFFER_SIZE`` bytes, valid until the next call.

        Raises
        ------
        OSError
            The file ends too early, or the disk fails.
        """
        view = self._buffers[0][:size_bytes]
        read_exactly(descriptor, offset, view)
        return view

    def scan(
        self, descriptor: int, offset: int, size_bytes: int, copy_to: int | None = None
    ) -> tuple[bytes, bytes]:
        """Hash a range, and copy it if a descriptor to write to is given.

        Returns
        -------
        tuple of bytes
            Digest and chunk list (empty for a single chunk) of the bytes read.

        Raises
        ------
        OSError
            The source ends too early, or cannot be read.
        NoRoom, LocalError
            The copy cannot be written.
        """
        whole = blake3(max_threads=blake3.AUTO)
        with_list = size_bytes > CHUNK_SIZE
        chunk_lists: list[bytes] = []
        pending: Future[bytes] | None = None
        try:
            for turn, start in enumerate(range(0, size_bytes, COPY_BUFFER_SIZE)):
                view = self._buffers[turn % 2][: min(COPY_BUFFER_SIZE, size_bytes - start)]
                read_exactly(descriptor, offset + start, view)
                if pending is not None:
                    chunk_lists.append(pending.result())
                pending = self._helper.submit(_take_piece, view, with_list, copy_to, start)
                whole.update(view)
            if pending is not None:
                chunk_lists.append(pending.result())
        finally:
            if pending is not None:
                pending.exception()  # it uses a buffer and the descriptor until it ends
        return whole.digest(), b"".join(chunk_lists)


def _take_piece(view: memoryview, with_list: bool, copy_to: int | None, position: int) -> bytes:
    if copy_to is not None:
        with disk_errors("cannot write to the store"):
            write_fully(copy_to, position, view)
    return chunk_digests(view) if with_list else b""
