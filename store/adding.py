"""Putting one model's pieces into the store, and taking them out again on failure.

`Adding` is one call of `add_paths`. Its objects are in the index, and usable, as soon as
they are verified, under the adding's own name: when it fails, what still bears that name
goes again. A model that is completed meanwhile takes the objects it needs out of our
hands, whoever put them there.

What is read is hashed once. A large range is copied while it is hashed if its first
chunk tells that it is new; otherwise it is hashed first, and mostly turns out to be known.
Small objects gather in a file, and go into the index together with the model, in one
transaction. That is fast, and on a full disk it fails without a trace: rows that are
committed already might find no room to be taken out again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

from .digest import CHUNK_SIZE, digest_of
from .errors import TensorswarmError
from .hashing import RangeHasher, chunk_digests
from .manifest import Manifest, ObjectRef
from .objects import INLINE_LIMIT, AdoptedRange
from .packs import MIN_PACKED, Written
from .place import COPY_BUFFER_SIZE, WRITE_SLICE, disk_errors, remove_file
from .records import FileState, NewObject, ObjectPlace, head_of, insert_object
from .store import Store

MAX_STAGED_BYTES = 256 << 20
"""Bytes of small objects that go into the index in one transaction, at most: other
processes wait for it, about a second."""

MAX_STAGED_OBJECTS = 1 << 16
"""Small objects that go into the index in one transaction, at most, for the same reason."""

PACKED_AT_ONCE = 256
"""Small objects appended to a pack in one go: 16 MiB at most."""

MAX_PENDING = 64
"""Operations that may wait for their commit."""

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


class Adding:
    """Objects of one model on their way from files into a store.

    Parameters
    ----------
    store : Store
        Where they go.
    copy : bool
        False to register large ranges where they lie.
    progress : callable
        Hears of bytes read.

    Attributes
    ----------
    name : str
        The name the objects are put in under.
    """

    def __init__(self, store: Store, copy: bool, progress: Progress) -> None:
        self.name = store.place.unique_name()
        self._new: dict[bytes, int] = {}
        self._store = store
        self._copy = copy
        self._progress = progress
        self._hasher = RangeHasher()
        self._refs: dict[bytes, ObjectRef] = {}
        self._heads: set[int] = set()
        self._attempted: list[bytes] = []
        self._stage = _Stage(store)
        self._ranges: list[AdoptedRange] = []
        self._pending: deque[Future[None]] = deque()

    @property
    def new_bytes(self) -> int:
        """Bytes of the objects that were new to the store, chunk lists left out."""
        return sum(self._new.values())

    def close(self) -> None:
        """End the thread that hashes, and let go of what is staged."""
        self._hasher.close()
        self._stage.close()

    def undo(self) -> None:
        """Take away what was put in, as far as nobody else relies on it by now."""
        for future in self._pending:
            future.exception()
        self._stage.close()  # the room it takes may be the room that undoing needs
        # What cannot be taken away stays under a name that means nothing, and does no harm;
        # the error that brought us here says more than a second one.
        with contextlib.suppress(TensorswarmError):
            self._store.undo(self.name, self._attempted)

    def begin_anew(self) -> None:
        """Look at the store again for everything: another `add` took back what we relied on."""
        self._refs.clear()
        self._stage.close()

    def finish_file(self, path: Path, state: FileState) -> None:
        """Put the ranges of a file in that was not copied, in the state it was hashed in.

        Raises
        ------
        NoRoom, LocalError
            The index does not take them.
        """
        if self._ranges:
            self._await(self._store.keep_ranges(path, state, self._ranges))
            self._ranges = []

    def complete(self, manifest: Manifest, name: str) -> bool:
        """Put the model in, together with the small objects that still wait.

        Returns
        -------
        bool
            False if an object is missing that was here: somebody took it away.

        Raises
        ------
        NoRoom, LocalError
            Something could not be put in.
        """
        while self._pending:
            self._pending.popleft().result()
        operation = self._staged_operation(added_by=None)
        return self._store.put_complete(manifest, name, self.name, operation)

    @contextlib.contextmanager
    def ahead(self, descriptor: int, ranges: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Work ahead on the ranges of a file that will be taken while the block lasts."""
        large = [] if self._copy else [each for each in ranges if each[1] > INLINE_LIMIT]
        with self._hasher.ahead(descriptor, large):
            yield

    def take(
        self, descriptor: int, offset: int, size_bytes: int, *, own: bool = False
    ) -> ObjectRef:
        """Put a range of an open file into the store, unless it is there.

        Parameters
        ----------
        descriptor : int
            The file.
        offset, size_bytes : int
            The range.
        own : bool
            Whether the file is a temporary one of ours, which is copied in any case.

        Raises
        ------
        OSError
            The file cannot be read.
        NoRoom, LocalError
            The store does not take it.
        """
        copy = self._copy or own
        if size_bytes <= (COPY_BUFFER_SIZE if copy else INLINE_LIMIT):
            view = self._hasher.read_small(descriptor, offset, size_bytes)
            digest = digest_of(view)
            ref = self._refs.get(digest) or self._take_small(view, digest, offset, copy)
        else:
            ref = self._take_large(descriptor, offset, size_bytes, copy)
        self._refs[ref.digest] = ref
        self._progress(size_bytes)
        return ref

    def _take_small(self, view: memoryview, digest: bytes, offset: int, copy: bool) -> ObjectRef:
        chunk_list = chunk_digests(view) if len(view) > CHUNK_SIZE else b""
        new = self._new_object(digest, len(view), chunk_list)
        if len(view) <= INLINE_LIMIT:
            self._put_later(new, view)
        elif not self._is_here(new, chunk_list):
            self._new[digest] = len(view)
            if copy:
                self._attempted.append(digest)
                self._await(self._store.keep_bytes(new, view, chunk_list))
            else:
                self._ranges.append(AdoptedRange(new, offset, chunk_list))
        return ObjectRef(digest, len(view), new.chunk_list)

    def _take_large(self, descriptor: int, offset: int, size_bytes: int, copy: bool) -> ObjectRef:
        if not copy or self._may_be_known(descriptor, offset):
            digest, chunk_list = self._hasher.scan(descriptor, offset, size_bytes)
            new = self._new_object(digest, size_bytes, chunk_list)
            ref = ObjectRef(digest, size_bytes, new.chunk_list)
            if self._is_here(new, chunk_list):
                return ref
            if not copy:
                self._new[digest] = size_bytes
                self._ranges.append(AdoptedRange(new, offset, chunk_list))
                return ref
        return self._copy_range(descriptor, offset, size_bytes)

    def _may_be_known(self, descriptor: int, offset: int) -> bool:
        """Tell by its first chunk whether a range may be in the store already."""
        head = head_of(digest_of(self._hasher.read_small(descriptor, offset, CHUNK_SIZE)), b"")
        may_be_known = head in self._heads or self._store.may_have(head)
        self._heads.add(head)
        return may_be_known

    def _copy_range(self, descriptor: int, offset: int, size_bytes: int) -> ObjectRef:
        """Copy a range; the object is what was written, even if the file changes."""
        path = self._store.place.temporary()
        try:
            with disk_errors("cannot write to the store"):
                target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                digest, chunk_list = self._hasher.scan(descriptor, offset, size_bytes, target)
            finally:
                os.close(target)
            new = self._new_object(digest, size_bytes, chunk_list)
            if self._is_here(new, chunk_list):
                remove_file(path)
            else:
                self._new[digest] = size_bytes
                self._attempted.append(digest)
                self._await(self._store.keep_temporary(path, new, chunk_list))
        except BaseException:
            remove_file(path)
            raise
        return ObjectRef(digest, size_bytes, new.chunk_list)

    def _new_object(self, digest: bytes, size_bytes: int, chunk_list: bytes) -> NewObject:
        list_digest = digest_of(chunk_list) if chunk_list else b""
        return NewObject(digest, size_bytes, list_digest, head_of(digest, chunk_list), self.name)

    def _is_here(self, new: NewObject, chunk_list: bytes) -> bool:
        """Tell whether an object is in the store or on its way, with its chunk list."""
        if new.digest in self._refs:
            return True
        reader = self._store.open_whole(new.digest)
        if reader is None:
            return False
        reader.close()
        if chunk_list:
            self._store.put_blob(chunk_list, added_by=self.name)  # in case it was lost
        return True

    def _put_later(self, new: NewObject, data: memoryview) -> None:
        self._stage.add(new, data)
        if self._stage.is_full():
            self._store.index.write(self._staged_operation(added_by=self.name))
            self._stage.close()

    def _staged_operation(self, added_by: str | None) -> Callable[[sqlite3.Connection], None]:
        """Return the operation that puts in what is staged and not known yet."""
        known = self._store.records([new.digest for new in self._stage.objects()])
        fresh = {n.digest: n.size_bytes for n in self._stage.objects() if n.digest not in known}
        self._new |= fresh
        return self._stage.inserting(frozenset(fresh), added_by)

    def _await(self, future: Future[None]) -> None:
        """Let an operation go on; wait for the oldest when there are too many."""
        self._pending.append(future)
        if len(self._pending) > MAX_PENDING:
            self._pending.popleft().result()


class _Stage:
    """Small objects that wait in a temporary file to go into the index together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.place.temporary()
        self._file: BinaryIO | None = None
        self._entries: list[tuple[NewObject, int]] = []
        self._size_bytes = 0

    def close(self) -> None:
        """Drop what is staged."""
        self._entries = []
        self._size_bytes = 0
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it had not written yet finds no room
                self._file.close()
            self._file = None
        remove_file(self._path)

    def objects(self) -> Iterator[NewObject]:
        """Yield what is staged."""
        return (new for new, _ in self._entries)

    def is_full(self) -> bool:
        """Tell whether it is time to put what is staged into the index."""
        return self._size_bytes >= MAX_STAGED_BYTES or len(self._entries) >= MAX_STAGED_OBJECTS

    def add(self, new: NewObject, data: memoryview) -> None:
        """Stage an object."""
        with disk_errors("cannot write to the store"):
            if self._file is None:
                self._file = self._path.open("w+b", buffering=WRITE_SLICE)
            self._file.write(data)
        self._entries.append((new, self._size_bytes))
        self._size_bytes += len(data)

    def inserting(
        self, chosen: frozenset[bytes], added_by: str | None
    ) -> Callable[[sqlite3.Connection], None]:
        """Return the operation that puts the chosen objects into the index."""
        file = self._file
        entries = [each for each in self._entries if each[0].digest in chosen]
        entries.sort()  # by digest: so they are asked for, and what lies together is read at once
        if file is not None:
            with disk_errors("cannot write to the store"):
                file.flush()
        packs = self._store.packs
        written: list[Written] = []  # what an attempt that failed has appended already

        def read(new: NewObject, offset: int) -> bytes:
            assert file is not None
            return os.pread(file.fileno(), new.size_bytes, offset)

        def operation(db: sqlite3.Connection) -> None:
            if len(entries) < MIN_PACKED:
                for new, offset in entries:
                    new = new._replace(added_by=added_by)
                    insert_object(db, new, ObjectPlace.INLINE, data=read(new, offset))
                return
            for number, start in enumerate(range(0, len(entries), PACKED_AT_ONCE)):
                part = entries[start : start + PACKED_AT_ONCE]
                if number == len(written):
                    written.append(packs.append([read(*each) for each in part]))
                rows = [(new.digest, new.size_bytes) for new, _ in part]
                packs.insert(db, written[number], rows, added_by)

        return operation
