"""The tensor store: what a node has on disk, by digest.

Whole objects are write-once: 64 KiB and less in the index, larger ones a file
each named by digest, or a byte range of a file that the user adopted (`objects`).
Objects in progress are sparse files with a bitmap of proved chunks (`incoming`).

Rules
- Nothing is visible that was not verified: a digest enters the index only after
  its bytes were hashed.
- An object is usable as soon as it is verified and in the index, and *durable*
  once `sync` has put it onto stable storage (`durability`). So a kill loses nothing,
  a power cut loses only what the disk had not taken, and no download waits for the
  disk's cache.
- Several processes may have the same store open.

Thread-safe. It does not know the network, nor file formats.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from .digest import digest_of
from .durability import recover, sync_objects
from .errors import LocalError, TensorswarmError
from .incoming import Incoming
from .manifest import MAX_MANIFEST_BYTES, Manifest, ObjectRef
from .object_table import ObjectTable
from .objects import INLINE_LIMIT, WholeObjects, settle
from .reader import ObjectReader
from .receiving import Receiver
from .records import ObjectRecord, present
from .wanted import Holding, Wanted

__all__ = ["INLINE_LIMIT", "Holding", "ModelRecord", "Store"]

MAX_KNOWN_MANIFESTS = 16
"""Decoded manifests kept in memory: a node serves a handful of models at a time."""


class ModelRecord(NamedTuple):
    """A manifest the store keeps."""

    digest: bytes
    name: str
    added_s: int


class Store(WholeObjects):
    """A store directory, open.

    Parameters
    ----------
    root : Path
        The directory; it is made when missing.

    Raises
    ------
    BadInput
        The directory holds something else, or a newer store.
    NoRoom, LocalError
        The disk does not take it.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        try:
            recover(self)
        except BaseException:
            super().close()
            raise
        self._receiver = Receiver(self)
        self._manifests: dict[bytes, Manifest] = {}
        self._manifests_lock = threading.Lock()

    def close(self) -> None:
        """Finish what is under way and close the index. Nothing is lost without it."""
        # A full disk must not keep the store from closing: bitmaps can be found again.
        with contextlib.suppress(TensorswarmError):
            self._receiver.close()
        super().close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- whole objects, and those in progress

    def holdings(self, digests: Sequence[bytes]) -> dict[bytes, Holding]:
        """Return what the store has of each of `digests`, whole or in part.

        What is told of a part is what `open_reader` opens, also when the object is being
        received by several chunk lists at once.
        """
        found = {d: Holding(size, None, b"") for d, size in self.sizes(digests).items()}
        rest = [digest for digest in digests if digest not in found]
        if rest:
            for digest, part in self._receiver.bitmaps(rest).items():
                found[digest] = Holding(*part)
        return found

    def are_whole(self, digests: Sequence[bytes], sizes_bytes: Sequence[int]) -> bool:
        """Tell whether all of some objects are here, whole, and of these sizes."""
        found = self.sizes(digests)
        return list(map(found.get, digests)) == list(sizes_bytes)

    def open_reader(self, digest: bytes) -> ObjectReader | None:
        """Open an object, whole or in progress; None if nothing of it is here.

        Raises
        ------
        LocalError
            It is here but cannot be opened now.
        """
        return self.open_whole(digest) or self._receiver.open_partial(digest)

    def receive(self, ref: ObjectRef, chunk_list: bytes) -> Incoming:
        """Begin, or take up again, an object that arrives in chunks.

        Parameters
        ----------
        ref : ObjectRef
            Digest and size (at least 1 byte).
        chunk_list : bytes
            Its chunk list, the one that `ref` names; empty for one chunk.

        Returns
        -------
        Incoming
            The same one for everybody in this process who receives this object. If the
            object is here already, it is finished.

        Raises
        ------
        BadInput
            The chunk list is not the one named, or does not fit the size.
        HashMismatch
            The object is here, and has another size.
        """
        return self._receiver.receive(ref, chunk_list)

    def want(self, table: ObjectTable, indices: Sequence[int]) -> Wanted:
        """Begin with many objects, whose state is made when something comes of them.

        Parameters
        ----------
        table : ObjectTable
            Objects, of which some are wanted.
        indices : sequence of int
            Which ones, in ascending order; none of them empty.
        """
        return Wanted(self._receiver, table, indices)

    def wanted_of(self, incoming: Sequence[Incoming]) -> Wanted:
        """Return what `want` does, for objects that have begun."""
        return Wanted.of(self._receiver, incoming)

    def is_receiving(self, digest: bytes) -> bool:
        """Tell whether a larger object is being received in this process."""
        return self._receiver.current(digest) is not None

    def forget(self, digests: Sequence[bytes]) -> None:
        """Drop objects from the index, and their own files from the disk."""
        with self._manifests_lock:
            for digest in digests:
                self._manifests.pop(digest, None)
        super().forget(digests)

    # ---- models

    def put_manifest(self, manifest: Manifest, name: str) -> None:
        """Keep a model's manifest under its id; `name` is for people."""
        digest = self.put_blob(manifest.encode())
        self.index.write(lambda db: _insert_model(db, manifest, digest, name))
        self._know(digest, manifest)

    def put_complete(
        self,
        manifest: Manifest,
        name: str,
        added_by: str,
        first: Callable[[sqlite3.Connection], None],
    ) -> bool:
        """Keep the manifest of a model if every object of it is here, whole.

        From then on the objects are the model's: no `undo` takes them away.

        Parameters
        ----------
        manifest, name
            As for `put_manifest`.
        added_by : str
            Who puts it in, see `undo`.
        first : callable
            An operation that puts in objects the model needs, in the same transaction.

        Returns
        -------
        bool
            False if an object is missing; then nothing is changed.
        """
        digest = self.put_blob(manifest.encode(), added_by=added_by)
        needed = {ref.digest for ref in manifest.objects if ref.size_bytes}
        needed |= {ref.chunk_list for ref in manifest.objects if ref.chunk_list}

        def operation(db: sqlite3.Connection) -> None:
            first(db)
            if len(present(db, list(needed))) < len(needed):
                raise _Incomplete
            _insert_model(db, manifest, digest, name)

        try:
            self.index.write(operation)
        except _Incomplete:
            return False
        return True

    def manifest(self, digest: bytes) -> Manifest | None:
        """Return the manifest with this digest, or None.

        Raises
        ------
        BadInput
            The object of this digest is here, and is no manifest.
        """
        with self._manifests_lock:
            known = self._manifests.get(digest)
        if known is not None:
            return known
        data = self.get_blob(digest, MAX_MANIFEST_BYTES)
        if data is None or digest_of(data) != digest:
            return None
        known = Manifest.decode(data)
        self._know(digest, known)
        return known

    def _know(self, digest: bytes, manifest: Manifest) -> None:
        with self._manifests_lock:
            if digest not in self._manifests and len(self._manifests) >= MAX_KNOWN_MANIFESTS:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[digest] = manifest

    def models(self) -> list[ModelRecord]:
        """Return the models kept here, newest first."""
        rows = self.index.query(
            "SELECT digest, name, added FROM manifests ORDER BY added DESC, digest"
        )
        return [ModelRecord(*row) for row in rows]

    def change_count(self) -> tuple[int, int]:
        """Return numbers that change when any process adds or drops a model or an object."""
        ((models, objects),) = self.index.query("SELECT models, objects FROM changes")
        return models, objects

    def missing_objects(self, manifest: Manifest, indices: Iterable[int]) -> list[int]:
        """Return which of a manifest's objects are not here, whole."""
        wanted = sorted(indices)
        have = self.records([manifest.objects[i].digest for i in wanted])
        return [i for i in wanted if not _is_among(manifest.objects[i], have)]

    # ---- durability

    def sync(self) -> int:
        """Put everything verified so far onto stable storage; return how many objects.

        Raises
        ------
        NoRoom, LocalError
            The disk does not take it.
        """
        return sync_objects(self)


class _Incomplete(LocalError):
    """Ends the transaction of `put_complete`; it goes no further."""


def _is_among(ref: ObjectRef, have: dict[bytes, ObjectRecord]) -> bool:
    record = have.get(ref.digest)
    return record is not None and record.size_bytes == ref.size_bytes


def _insert_model(db: sqlite3.Connection, manifest: Manifest, digest: bytes, name: str) -> None:
    """Note a model and that it relies on its objects; a name is not replaced by none."""
    db.execute(
        "INSERT INTO manifests(digest, name, added) VALUES(?,?,?) "
        "ON CONFLICT(digest) DO UPDATE SET name=excluded.name WHERE excluded.name<>''",
        (digest, name, int(time.time())),
    )
    settle(db, _relied_on(manifest, digest))


def _relied_on(manifest: Manifest, digest: bytes) -> Iterator[bytes]:
    """Yield what a model needs: its manifest, its objects, and their chunk lists."""
    yield digest
    for ref in manifest.objects:
        yield ref.digest
        if ref.chunk_list:
            yield ref.chunk_list
