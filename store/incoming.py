"""Objects on their way in: each chunk is verified before it is written.

`Incoming` takes the chunks of one object in any order from any thread. An object
of one chunk goes straight to its place. A larger one is a sparse file and a
bitmap of proved chunks; when the last chunk is proved the whole is hashed once
more against the object's own digest, because the chunk list came from whoever
wrote the manifest, and a false list must never put false bytes under a digest
that other models share.

The bitmap reaches the index now and then. After a crash it does not matter if it
is behind: chunks that lie in the file unclaimed are hashed and claimed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from blake3 import blake3

from . import bitmap
from .digest import CHUNK_SIZE, DIGEST_SIZE, chunk_count, chunk_length, digest_of
from .errors import BadInput, HashMismatch
from .place import COPY_BUFFER_SIZE, disk_errors, read_exactly, write_fully


class ChunkMismatch(HashMismatch):
    """A chunk's bytes are not those its digest names; nothing was kept."""


class Incoming:
    """One object being received.

    Parameters
    ----------
    digest : bytes
        The object's digest.
    size_bytes : int
        Its size, at least 1.
    chunk_list : bytes
        Its chunk list (32 bytes a chunk), or empty for an object of one chunk.
    path : Path
        The file in progress; not used for an object of one chunk.
    complete : callable
        Called once, from the thread that proved the last chunk, with this object and
        the bytes when they are a single chunk (else None). It sets `finished`.
    touched : callable
        Called after a chunk of a larger object was proved.

    Attributes
    ----------
    finished : Future
        Done when the whole is verified and in the index; its exception says why not.

    Raises
    ------
    BadInput
        The chunk list's length does not fit the size.
    """

    def __init__(
        self,
        digest: bytes,
        size_bytes: int,
        chunk_list: bytes,
        path: Path,
        complete: Callable[[Incoming, memoryview | None], None],
        touched: Callable[[Incoming], None],
    ) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.chunk_count = chunk_count(size_bytes)
        if self.chunk_count == 1:
            chunk_list = digest
        if len(chunk_list) != DIGEST_SIZE * self.chunk_count:
            raise BadInput(
                f"the chunk list of {digest.hex()} has {len(chunk_list)} bytes, "
                f"{self.chunk_count} chunks need {DIGEST_SIZE * self.chunk_count}"
            )
        self.chunk_list = chunk_list if self.chunk_count > 1 else b""
        self._digests = chunk_list
        self.path = path
        self._complete = complete
        self._touched = touched
        self._lock = threading.Lock()
        self._proved = bitmap.empty(self.chunk_count)
        self._missing = self.chunk_count
        self.finished: Future[None] = Future()

    @property
    def chunk_list_digest(self) -> bytes:
        """Digest of the chunk list; empty for an object of one chunk."""
        return digest_of(self.chunk_list) if self.chunk_list else b""

    def is_missing(self, chunk: int) -> bool:
        """Tell whether a chunk is not proved yet."""
        return not bitmap.is_set(self._proved, chunk)

    def missing_bytes(self) -> int:
        """Return how many bytes are not proved yet."""
        with self._lock:
            if self._missing == 0:
                return 0
            missing = self._missing * CHUNK_SIZE
            last = self.chunk_count - 1
            if not bitmap.is_set(self._proved, last):
                missing -= CHUNK_SIZE - chunk_length(self.size_bytes, last)
            return missing

    def proved(self) -> bytes:
        """Return a copy of the bitmap of proved chunks."""
        with self._lock:
            return bytes(self._proved)

    def write_chunk(self, chunk: int, data: memoryview) -> bool:
        """Verify one chunk and keep it.

        Returns
        -------
        bool
            False if the chunk was proved before.

        Raises
        ------
        ChunkMismatch
            The bytes are not the chunk's; nothing was written.
        NoRoom
            The disk is full.
        """
        if (
            len(data) != chunk_length(self.size_bytes, chunk)
            or blake3(data).digest()
            != (self._digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE])
        ):
            raise ChunkMismatch(f"chunk {chunk} of {self.digest.hex()} does not match its hash")
        if not self.is_missing(chunk):
            return False
        if self.chunk_count > 1:
            self._write_to_file(chunk * CHUNK_SIZE, data)
        return self._claim(chunk, data)

    def _write_to_file(self, offset: int, data: memoryview) -> None:
        with disk_errors(f"cannot write to {self.path.name}"):
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                write_fully(descriptor, offset, data)
            finally:
                os.close(descriptor)

    def _claim(self, chunk: int, data: memoryview) -> bool:
        with self._lock:
            if not self.is_missing(chunk):
                return False
            bitmap.set_bit(self._proved, chunk)
            self._missing -= 1
            last = self._missing == 0
        if self.chunk_count > 1 and not last:
            self._touched(self)
        if last:
            self._complete(self, data if self.chunk_count == 1 else None)
        return True

    # ---- taking up what an earlier process left

    def claim_all(self) -> None:
        """Note that the whole object is here and verified; no file is touched."""
        with self._lock:
            self._proved = bitmap.full(self.chunk_count)
            self._missing = 0

    def resume(self, trusted: bytes | None) -> int:
        """Claim the chunks that already lie in the file.

        Parameters
        ----------
        trusted : bytes or None
            Bitmap of chunks that need no second look; None to hash every chunk.

        Returns
        -------
        int
            How many bytes were claimed.
        """
        if self.chunk_count == 1:
            return 0
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        claimed = 0
        try:
            buffer = memoryview(bytearray(CHUNK_SIZE))
            for chunk in self._chunks_with_data(descriptor):
                length = chunk_length(self.size_bytes, chunk)
                is_trusted = trusted is not None and bitmap.is_set(trusted, chunk)
                if not is_trusted and not self._matches(descriptor, chunk, buffer[:length]):
                    continue
                self._claim(chunk, buffer[:0])
                claimed += length
        finally:
            os.close(descriptor)
        return claimed

    def _matches(self, descriptor: int, chunk: int, view: memoryview) -> bool:
        try:
            read_exactly(descriptor, chunk * CHUNK_SIZE, view)
        except OSError:
            return False
        wanted = self._digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE]
        return blake3(view).digest() == wanted

    def _chunks_with_data(self, descriptor: int) -> Iterator[int]:
        """Yield the chunks of which the sparse file holds all or some."""
        end = min(os.fstat(descriptor).st_size, self.size_bytes)
        position, following = 0, 0
        while position < end:
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
                position = os.lseek(descriptor, start, os.SEEK_HOLE)
            except OSError:  # ENXIO: no data after this; elsewhere holes are not told apart
                return
            for chunk in range(max(following, start // CHUNK_SIZE), chunk_count(position)):
                if chunk < self.chunk_count:
                    yield chunk
            following = chunk_count(position)


def hash_file(path: Path, size_bytes: int) -> bytes:
    """Return the BLAKE3 digest of a file's first `size_bytes` bytes, read in large pieces."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(COPY_BUFFER_SIZE, max(size_bytes, 1))))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset in range(0, size_bytes, len(buffer)):
            view = buffer[: min(len(buffer), size_bytes - offset)]
            read_exactly(descriptor, offset, view)
            hasher.update(view)
    finally:
        os.close(descriptor)
    return hasher.digest()
