"""Digests and chunks: what a tensor is called, and the units it travels in.

A digest is the BLAKE3-256 hash of the bytes, 32 bytes long. Bytes are cut into
chunks of 1 MiB counted from the first byte; the last chunk may be shorter. A
chunk list is the chunks' digests, concatenated; it exists only for more than
one chunk, because the digest of a single chunk is the digest of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

CHUNK_SIZE = 1 << 20
"""Bytes in a chunk: verifying one costs about 0.25 ms."""

DIGEST_SIZE = 32
"""Bytes in a digest (BLAKE3-256)."""

MAX_OBJECT_SIZE = 1 << 44
"""Largest tensor or blob, in bytes (16 TiB): its chunk list is then 512 MiB."""

EMPTY_DIGEST = blake3(b"").digest()
"""Digest of no bytes at all, the name of every empty tensor."""


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE3-256 digest of `data`."""
    return blake3(data).digest()


def chunk_count(size_bytes: int) -> int:
    """Return the number of chunks in an object of `size_bytes` bytes."""
    return -(-size_bytes // CHUNK_SIZE)


def chunk_length(size_bytes: int, index: int) -> int:
    """Return the length in bytes of chunk `index` of an object of `size_bytes`."""
    return min(CHUNK_SIZE, size_bytes - index * CHUNK_SIZE)


def split_chunk_list(chunk_list: bytes) -> Iterator[bytes]:
    """Yield the digests in a chunk list, in order."""
    for start in range(0, len(chunk_list), DIGEST_SIZE):
        yield chunk_list[start : start + DIGEST_SIZE]


def chunk_list_of(data: bytes | bytearray | memoryview) -> bytes:
    """Return the chunk list of `data`; empty when there are fewer than two chunks."""
    view = memoryview(data)
    if len(view) <= CHUNK_SIZE:
        return b""
    return b"".join(
        digest_of(view[start : start + CHUNK_SIZE]) for start in range(0, len(view), CHUNK_SIZE)
    )
