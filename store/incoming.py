"""Objects on their way in: each chunk is verified before it is written.

`Incoming` takes the chunks of one object in any order from any thread. An object
of one chunk goes straight to its place. A larger one is a sparse file and a
bitmap of proved chunks; every chunk is hashed a second time, in order, into the
digest of the whole, which must be the object's own: the chunk list came from whoever
wrote the manifest, and a false list must never put false bytes under a digest that
other models share.

The bitmap reaches the index now and then. After a crash it does not matter if it
is behind: chunks that lie in the file unclaimed are hashed and claimed.

Several processes may receive one object into one file at once. They write the same
bytes at the same places, so nobody waits for anybody; the first to have it all moves
the file away, and the others notice when they write next. That is why only the first
write makes the file.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from . import bitmap
from .digest import CHUNK_SIZE, DIGEST_SIZE, chunk_count, chunk_length, digest_of
from .errors import BadInput, HashMismatch
from .place import disk_errors, read_exactly, write_fully


class ChunkMismatch(HashMismatch):
    """A chunk's bytes are not those its digest names; nothing was kept."""


class Keeper(Protocol):
    """What becomes of an object being received. Called from the threads that write."""

    def proved(self, incoming: Incoming, data: memoryview | None) -> None:
        """Take over an object whose last chunk was proved.

        Called once, with the bytes when they are a single chunk. It sets `finished`.
        """
        ...

    def touched(self, incoming: Incoming) -> None:
        """Hear that a chunk of a larger object was proved, and more are missing."""
        ...

    def vanished(self, incoming: Incoming) -> None:
        """Settle what it means that the file in progress is gone.

        Returns if the object is in the store, whole: then it sets `finished`. Chunks that
        come later are verified and counted, and not written any more.

        Raises
        ------
        TensorswarmError
            It is not, and cannot be received any more.
        """
        ...


class Kept(Enum):
    """What became of bytes that were to be an object."""

    NEW = "kept"
    KNOWN = "was here already"
    WRONG = "does not match its digest"


class Finished:
    """Whether an object came to its end, and how. Thread-safe.

    Has the part of `concurrent.futures.Future` that is needed, at a twentieth of its
    memory: there may be 100,000 of them.
    """

    __slots__ = ("_callbacks", "_error", "_is_done")

    _changed = threading.Condition()  # shared by all: hardly anybody ever waits

    def __init__(self) -> None:
        self._is_done = False
        self._error: BaseException | None = None
        self._callbacks: tuple[Callable[[Finished], object], ...] = ()

    def done(self) -> bool:
        """Tell whether it came to its end."""
        return self._is_done

    def set(self, error: BaseException | None) -> None:
        """Note the end, once, and tell those who wanted to hear of it."""
        with self._changed:
            self._error = error
            self._is_done = True
            callbacks, self._callbacks = self._callbacks, ()
            self._changed.notify_all()
        for callback in callbacks:
            callback(self)

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the end; return what went wrong, or None.

        Raises
        ------
        TimeoutError
            It did not come in time.
        """
        if not self._is_done:
            with self._changed:
                if not self._changed.wait_for(self.done, timeout_s):
                    raise TimeoutError("the object is not finished")
        return self._error

    def result(self, timeout_s: float | None = None) -> None:
        """Wait for the end; raise what went wrong."""
        error = self.exception(timeout_s)
        if error is not None:
            raise error

    def add_done_callback(self, callback: Callable[[Finished], object]) -> None:
        """Have `callback` called at the end, in the thread that sets it; at once if it came."""
        with self._changed:
            if not self._is_done:
                self._callbacks += (callback,)
                return
        callback(self)


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
    path : Path or callable
        The file in progress, or what makes its path of the object's digest and the chunk
        list's; not used for an object of one chunk.
    keeper : Keeper
        Takes it over when it is proved.

    Attributes
    ----------
    finished : Finished
        Done when the whole is verified and in the index; its exception says why not.
    is_shown : bool
        Whether the store tells of this part and serves it. It shows one of a digest at a
        time, and none of a single chunk.

    Raises
    ------
    BadInput
        The chunk list's length does not fit the size.
    """

    __slots__ = (
        "__weakref__", "_digests", "_has_file", "_is_over", "_keeper", "_lock", "_missing",
        "_path", "_proved", "_shows_holes", "_whole", "_whole_chunks", "_whole_lock",
        "chunk_count", "chunk_list", "chunk_list_digest", "digest", "finished", "is_shown",
        "size_bytes",
    )  # fmt: skip

    def __init__(
        self,
        digest: bytes,
        size_bytes: int,
        chunk_list: bytes,
        path: Path | Callable[[bytes, bytes], Path],
        keeper: Keeper,
    ) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.chunk_count = chunk_count(size_bytes)
        if self.chunk_count == 1:
            chunk_list = digest
        if self.chunk_count == 0 or len(chunk_list) != DIGEST_SIZE * self.chunk_count:
            raise BadInput(
                f"the chunk list of {digest.hex()} has {len(chunk_list)} bytes, "
                f"{self.chunk_count} chunks need {DIGEST_SIZE * self.chunk_count}"
            )
        self.chunk_list = chunk_list if self.chunk_count > 1 else b""
        self.chunk_list_digest = digest_of(self.chunk_list) if self.chunk_list else b""
        self._digests = chunk_list
        self._path = path
        self._keeper = keeper
        self._lock = threading.Lock()
        self._proved = bitmap.empty(self.chunk_count)
        self._missing = self.chunk_count
        self._has_file = False
        self._shows_holes = False
        self._is_over = False
        self._whole: blake3 | None = None  # 2 kB: only while it is of use
        self._whole_chunks = 0
        self._whole_lock = threading.Lock()
        self.finished = Finished()
        self.is_shown = False

    @property
    def path(self) -> Path:
        """The file in progress."""
        if not isinstance(self._path, Path):
            self._path = self._path(self.digest, self.chunk_list_digest)
        return self._path

    def is_missing(self, chunk: int) -> bool:
        """Tell whether a chunk is not proved yet."""
        return not bitmap.is_set(self._proved, chunk)

    @property
    def has_proved(self) -> bool:
        """Whether any chunk is proved."""
        return self._missing < self.chunk_count

    def missing_bytes(self) -> int:
        """Return how many bytes are not proved yet."""
        if self._missing == self.chunk_count:
            return self.size_bytes
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
        LocalError
            The store is closed, or its file was taken away.
        """
        if len(data) != chunk_length(self.size_bytes, chunk) or not self._matches(chunk, data):
            raise ChunkMismatch(f"chunk {chunk} of {self.digest.hex()} does not match its hash")
        if not self.is_missing(chunk):
            return False
        if self._is_over:
            self.finished.result()  # raises what went wrong; else the object is here already
        elif self.chunk_count > 1 and not self._write_to_file(chunk * CHUNK_SIZE, data):
            if not self.is_missing(chunk):
                return False
            self._keeper.vanished(self)
        self._hash_in_order(chunk, data)
        return self._claim(chunk, data)

    def _hash_in_order(self, chunk: int, data: memoryview) -> None:
        """Take a chunk into the digest of the whole, if it is the next one in order.

        Here the bytes are still in the processor's cache: hashing them now saves reading
        them back. Chunks that come out of order are read back by `whole_digest`.
        """
        if self.chunk_count > 1 and self._whole_lock.acquire(blocking=False):
            try:
                if chunk == self._whole_chunks:
                    if self._whole is None:
                        self._whole = blake3()
                    self._whole.update(data)
                    self._whole_chunks += 1
            finally:
                self._whole_lock.release()

    def whole_digest(self, descriptor: int) -> bytes:
        """Return the digest of the whole, once every chunk is proved.

        Parameters
        ----------
        descriptor : int
            The open file in progress.

        Raises
        ------
        OSError
            The file cannot be read, or ends too early.
        """
        with self._whole_lock:
            whole = self._whole
            self._whole = None
            if whole is None or not self._is_solid(descriptor):
                whole, self._whole_chunks = blake3(), 0
            start = self._whole_chunks * CHUNK_SIZE
            buffer = memoryview(bytearray(CHUNK_SIZE))
            for offset in range(start, self.size_bytes, CHUNK_SIZE):
                view = buffer[: min(CHUNK_SIZE, self.size_bytes - offset)]
                read_exactly(descriptor, offset, view)
                whole.update(view)
                self._whole_chunks += 1
            self._whole_chunks = 0
            return whole.digest()

    def _is_solid(self, descriptor: int) -> bool:
        """Tell whether something was written to every place of the file.

        Another process may have moved our file away and begun a new one in its place. All
        that is ever written there was verified, but what we wrote into the old one would
        be holes in the new one; then nothing counts but what can be read.
        """
        if not self._shows_holes or os.fstat(descriptor).st_size < self.size_bytes:
            return False
        return os.lseek(descriptor, 0, os.SEEK_HOLE) >= self.size_bytes

    def _matches(self, chunk: int, data: memoryview) -> bool:
        return digest_of(data) == self._digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE]

    def _write_to_file(self, offset: int, data: memoryview) -> bool:
        """Write to the file in progress; False if it is not there any more."""
        with disk_errors(f"cannot write to {self.path.name}"):
            self._make_file()
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                write_fully(descriptor, offset, data)
            finally:
                os.close(descriptor)
        return True

    def _make_file(self) -> None:
        """Make the file, all hole, unless it is there; see whether holes can be told."""
        with self._lock:
            if self._has_file:
                return
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(self.path, flags, 0o644)
                try:
                    os.ftruncate(descriptor, self.size_bytes)
                    self._shows_holes = os.lseek(descriptor, 0, os.SEEK_HOLE) == 0
                finally:
                    os.close(descriptor)
            self._has_file = True

    def _claim(self, chunk: int, data: memoryview) -> bool:
        with self._lock:
            if not self.is_missing(chunk):
                return False
            bitmap.set_bit(self._proved, chunk)
            self._missing -= 1
            last = self._missing == 0
        if self._is_over:
            return True
        if last:
            self._keeper.proved(self, data if self.chunk_count == 1 else None)
        elif self.chunk_count > 1:
            self._keeper.touched(self)
        return True

    # ---- taking up what an earlier process left

    def claim_all(self) -> None:
        """Note that the whole object is here and verified; no file is touched."""
        with self._lock:
            self._proved = bitmap.full(self.chunk_count)
            self._missing = 0

    def resume(self, trusted: bytes | None) -> None:
        """Claim the chunks that already lie in the file.

        Nobody is told when that completes the object: it is for `begin`.

        Parameters
        ----------
        trusted : bytes or None
            Bitmap of chunks that need no second look; None to hash every chunk.
        """
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._resume_from(descriptor, trusted)
            finally:
                os.close(descriptor)

    def _resume_from(self, descriptor: int, trusted: bytes | None) -> None:
        buffer = memoryview(bytearray(CHUNK_SIZE))
        for chunk in self._chunks_with_data(descriptor):
            is_trusted = trusted is not None and bitmap.is_set(trusted, chunk)
            if is_trusted or self._lies_in(descriptor, chunk, buffer):
                with self._lock:
                    bitmap.set_bit(self._proved, chunk)
                    self._missing -= 1
                    self._has_file = True

    def begin(self) -> None:
        """Hand the object over if `resume` found all of it."""
        if self.chunk_count > 1 and self._missing == 0:
            self._keeper.proved(self, None)

    def recheck(self, descriptor: int) -> int:
        """Hash the open file's chunks again and give up those that do not match.

        Returns
        -------
        int
            How many chunks were given up.
        """
        buffer = memoryview(bytearray(CHUNK_SIZE))
        chunks = range(self.chunk_count)
        bad = [chunk for chunk in chunks if not self._lies_in(descriptor, chunk, buffer)]
        with self._lock:
            for chunk in bad:
                bitmap.clear_bit(self._proved, chunk)
            self._missing = self.chunk_count - bitmap.count_set(self._proved)
        return len(bad)

    def _lies_in(self, descriptor: int, chunk: int, buffer: memoryview) -> bool:
        view = buffer[: chunk_length(self.size_bytes, chunk)]
        try:
            read_exactly(descriptor, chunk * CHUNK_SIZE, view)
        except OSError:
            return False
        return self._matches(chunk, view)

    def _chunks_with_data(self, descriptor: int) -> Iterator[int]:
        """Yield the chunks of which the sparse file holds all or some."""
        end = min(os.fstat(descriptor).st_size, self.size_bytes)
        position, following = 0, 0
        while position < end:
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
                position = os.lseek(descriptor, start, os.SEEK_HOLE)
            except OSError:  # ENXIO: no data after this
                return
            upto = min(chunk_count(position), self.chunk_count)
            yield from range(max(following, start // CHUNK_SIZE), upto)
            following = upto

    # ---- the end

    def finish(self, error: BaseException | None) -> None:
        """Set `finished`: to None when the object is in the index, else to what went wrong.

        The first call counts.
        """
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self.finished.set(error)
