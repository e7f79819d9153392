"""The tensor store: what a node has on disk, by digest.

Whole objects are write-once: 64 KiB and less in the index, larger ones a file
each named by digest, or a byte range of a file that the user adopted. Objects in
progress are sparse files with a bitmap of proved chunks (`incoming`).

Rules
- Nothing is visible that was not verified: a digest enters the index only after
  its bytes were hashed.
- An object is usable as soon as it is verified and in the index, and *durable*
  once `sync` has put it onto stable storage. Until then its row carries the
  identity of the machine's start; after a power cut such objects are hashed again
  when the store opens, and dropped when they were torn. So a kill loses nothing,
  a power cut loses only what the disk had not taken, and no download waits for the
  disk's cache.
- Several processes may have the same store open.

Thread-safe. It does not know the network, nor file formats.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from . import bitmap
from .digest import chunk_list_of, digest_of
from .errors import HashMismatch
from .incoming import Incoming, hash_file
from .index import Index
from .manifest import MAX_MANIFEST_BYTES, Manifest, ObjectRef
from .place import Place, boot_identity, disk_errors, sync_directory, sync_file
from .reader import FileReader, InlineReader, ObjectReader, read_all
from .records import (
    AdoptedFile,
    AdoptedFiles,
    ObjectPlace,
    ObjectRecord,
    insert_object,
    select_objects,
)

INLINE_LIMIT = 64 << 10
"""Objects up to this many bytes live in the index: a file each would cost more than its bytes."""

FLUSH_INTERVAL_S = 0.25
"""How far the index may be behind the bitmaps in memory."""

SYNC_BATCH = 256
"""Files put onto stable storage between two commits that say so."""


class Holding(NamedTuple):
    """What the store has of one object; `proved` is None when it has all of it."""

    size_bytes: int
    proved: bytes | None


class ModelRecord(NamedTuple):
    """A manifest the store keeps."""

    digest: bytes
    name: str
    added_s: int


class Store:
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
        self.place = Place(Path(root))
        self.index = Index(self.place.index)
        self.adopted = AdoptedFiles(self.index)
        self._boot = boot_identity()
        self._lock = threading.Lock()
        self._incoming: dict[tuple[bytes, bytes], Incoming] = {}
        self._dirty: set[Incoming] = set()
        self._flushed_at = time.monotonic()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="store-finisher")
        self._manifests: dict[bytes, Manifest] = {}
        self._recover()

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self.place.root

    def close(self) -> None:
        """Finish what is under way and close the index. Nothing is lost without it."""
        self._finisher.shutdown(wait=True)
        with contextlib.suppress(Exception):
            # A full disk must not keep the store from closing: bitmaps can be found again.
            self._flush(wait=True)
        self.index.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- what is here

    def records(self, digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
        """Return the whole objects among `digests`."""
        return select_objects(self.index, digests)

    def all_digests(self) -> list[bytes]:
        """Return the digests of all whole objects."""
        return [row[0] for row in self.index.query("SELECT digest FROM objects ORDER BY digest")]

    def has(self, digest: bytes) -> bool:
        """Tell whether an object is here, whole."""
        return bool(self.records([digest]))

    def holdings(self, digests: Sequence[bytes]) -> dict[bytes, Holding]:
        """Return what the store has of each of `digests`, whole or in part."""
        found = {d: Holding(r.size_bytes, None) for d, r in self.records(digests).items()}
        rest = [digest for digest in digests if digest not in found]
        if not rest:
            return found
        rows = self.index.query_keys(
            "SELECT digest, size, bitmap, boot FROM partials WHERE digest IN ({keys})", rest
        )
        for digest, size, proved, boot in rows:
            if boot == self._boot:
                found[digest] = Holding(size, proved)
        for digest in rest:
            incoming = self._incoming_of(digest)
            if incoming is not None and incoming.chunk_count > 1:
                found[digest] = Holding(incoming.size_bytes, incoming.proved())
        return found

    def _incoming_of(self, digest: bytes) -> Incoming | None:
        with self._lock:
            for key, incoming in self._incoming.items():
                if key[0] == digest:
                    return incoming
        return None

    def open_reader(self, digest: bytes) -> ObjectReader | None:
        """Open an object, whole or in progress; None if nothing of it is here."""
        record = self.records([digest]).get(digest)
        if record is not None:
            return self._open_whole(record)
        incoming = self._incoming_of(digest)
        if incoming is not None and incoming.chunk_count > 1:
            path, size, proved = incoming.path, incoming.size_bytes, incoming.proved()
        else:
            rows = self.index.query(
                "SELECT size, bitmap, chunk_list FROM partials WHERE digest=? AND boot=?",
                (digest, self._boot),
            )
            if not rows:
                return None
            size, proved, chunk_list = rows[0]
            path = self.place.partial_path(digest, chunk_list)
        try:
            return FileReader(path, 0, size, proved)
        except OSError:
            return None  # it became whole, or was removed, in between

    def _open_whole(self, record: ObjectRecord) -> ObjectReader | None:
        if record.place is ObjectPlace.INLINE:
            return InlineReader(record.data)
        try:
            if record.place is ObjectPlace.FILE:
                return FileReader(self.place.object_path(record.digest), 0, record.size_bytes)
            path = self.adopted.path_if_unchanged(record)
            if path is not None:
                return FileReader(path, record.file_offset, record.size_bytes)
        except OSError:
            pass  # the file is gone: forget the object below
        self.forget([record.digest])
        return None

    def locate(self, digest: bytes) -> tuple[Path, int] | bytes | None:
        """Return a whole object's file and offset, or its bytes when it is inline."""
        record = self.records([digest]).get(digest)
        if record is None:
            return None
        if record.place is ObjectPlace.INLINE:
            return record.data
        if record.place is ObjectPlace.FILE:
            return self.place.object_path(digest), 0
        path = self.adopted.path_if_unchanged(record)
        if path is None:
            self.forget([digest])
            return None
        return path, record.file_offset

    def get_blob(self, digest: bytes, limit_bytes: int) -> bytes | None:
        """Return a whole object of at most `limit_bytes` bytes, or None."""
        reader = self.open_reader(digest)
        if reader is None:
            return None
        try:
            if reader.size_bytes > limit_bytes or not reader.covers(0, reader.size_bytes):
                return None
            return bytes(read_all(reader))
        except OSError:
            return None
        finally:
            reader.close()

    # ---- putting things in

    def put_blob(self, data: bytes) -> bytes:
        """Keep bytes as an object and return their digest."""
        digest = digest_of(data)
        if self.has(digest):
            return digest
        chunk_list = chunk_list_of(data)
        list_digest = self.put_blob(chunk_list) if chunk_list else b""
        if len(data) <= INLINE_LIMIT:
            self.keep_inline(digest, data, list_digest).result()
        else:
            path = self.place.temporary()
            with disk_errors("cannot write to the store"):
                path.write_bytes(data)
            self.keep_file(path, digest, len(data), list_digest).result()
        return digest

    def keep_inline(self, digest: bytes, data: bytes, chunk_list: bytes) -> Future[None]:
        """Put a verified small object into the index."""
        record = ObjectRecord(digest, len(data), ObjectPlace.INLINE, data, 0, 0, chunk_list)
        return self.index.submit(lambda db: insert_object(db, record, None))

    def keep_file(self, path: Path, digest: bytes, size: int, chunk_list: bytes) -> Future[None]:
        """Move a verified file to its place and put it into the index."""
        with disk_errors("cannot keep a tensor"):
            self.place.promote(path, digest)
        record = ObjectRecord(digest, size, ObjectPlace.FILE, b"", 0, 0, chunk_list)
        return self.index.submit(lambda db: insert_object(db, record, self._boot))

    def keep_range(
        self, file: AdoptedFile, offset: int, digest: bytes, size: int, chunk_list: bytes
    ) -> Future[None]:
        """Put a verified byte range of a user's own file into the index."""
        record = ObjectRecord(
            digest, size, ObjectPlace.ADOPTED, b"", file.file_id, offset, chunk_list
        )
        return self.index.submit(lambda db: insert_object(db, record, None))

    def receive(self, ref: ObjectRef, chunk_list: bytes) -> Incoming:
        """Begin, or take up again, an object that arrives in chunks.

        Parameters
        ----------
        ref : ObjectRef
            Digest and size (at least 1 byte).
        chunk_list : bytes
            Its chunk list, verified against what names it; empty for one chunk.

        Returns
        -------
        Incoming
            The same one for everybody in this process who receives this object.
        """
        key = (ref.digest, ref.chunk_list)
        with self._lock:
            incoming = self._incoming.get(key)
            if incoming is not None:
                return incoming
            incoming = Incoming(
                ref.digest,
                ref.size_bytes,
                chunk_list,
                self.place.partial_path(ref.digest, ref.chunk_list),
                self._complete,
                self._touch,
            )
            self._incoming[key] = incoming
        if ref.size_bytes > INLINE_LIMIT and self._take_orphan(incoming, ref):
            return incoming
        if incoming.chunk_count > 1 and incoming.path.exists():
            rows = self.index.query(
                "SELECT bitmap FROM partials WHERE digest=? AND chunk_list=? AND boot=?",
                (ref.digest, ref.chunk_list, self._boot),
            )
            incoming.resume(rows[0][0] if rows else None)
        return incoming

    def _take_orphan(self, incoming: Incoming, ref: ObjectRef) -> bool:
        """Take up a whole file that a crash left without its row in the index."""
        path = self.place.object_path(ref.digest)
        try:
            if path.stat().st_size != ref.size_bytes:
                return False
            if hash_file(path, ref.size_bytes) != ref.digest:
                return False
        except OSError:
            return False
        if incoming.chunk_list:
            self.put_blob(incoming.chunk_list)
        record = ObjectRecord(
            ref.digest, ref.size_bytes, ObjectPlace.FILE, b"", 0, 0, incoming.chunk_list_digest
        )
        incoming.claim_all()
        kept = self.index.submit(lambda db: insert_object(db, record, self._boot))
        self._when_indexed(incoming, kept)
        return True

    def _touch(self, incoming: Incoming) -> None:
        with self._lock:
            self._dirty.add(incoming)
            due = time.monotonic() - self._flushed_at >= FLUSH_INTERVAL_S
            if due:
                self._flushed_at = time.monotonic()
        if due:
            self._flush(wait=False)

    def _flush(self, *, wait: bool) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        if not dirty:
            return
        rows = [
            (i.digest, i.chunk_list_digest, i.size_bytes, i.proved(), self._boot) for i in dirty
        ]
        future = self.index.submit(lambda db: _merge_partials(db, rows))
        if wait:
            future.result()

    def _complete(self, incoming: Incoming, data: memoryview | None) -> None:
        """Take over an object whose last chunk was proved (called by `Incoming`)."""
        if data is None:
            self._finisher.submit(self._finish_file, incoming)
            return
        try:
            if len(data) <= INLINE_LIMIT:
                self._when_indexed(incoming, self.keep_inline(incoming.digest, bytes(data), b""))
                return
            path = self.place.temporary()
            with disk_errors("cannot write to the store"):
                path.write_bytes(data)
            kept = self.keep_file(path, incoming.digest, incoming.size_bytes, b"")
        except Exception as error:
            self._abandon(incoming, error)
            raise
        self._when_indexed(incoming, kept)

    def _finish_file(self, incoming: Incoming) -> None:
        try:
            with disk_errors("cannot read a tensor back"):
                whole = hash_file(incoming.path, incoming.size_bytes)
            if whole != incoming.digest:
                incoming.path.unlink(missing_ok=True)
                self._drop_partial(incoming)
                raise HashMismatch(
                    f"{incoming.digest.hex()}: every chunk matched its list, but the whole does "
                    "not match its digest: the manifest that names this list is false"
                )
            list_digest = self.put_blob(incoming.chunk_list)
            kept = self.keep_file(incoming.path, incoming.digest, incoming.size_bytes, list_digest)
            self._drop_partial(incoming)
        except Exception as error:
            self._abandon(incoming, error)
            return
        self._when_indexed(incoming, kept)

    def _drop_partial(self, incoming: Incoming) -> None:
        with self._lock:
            self._dirty.discard(incoming)
        self.index.submit(_many("DELETE FROM partials WHERE digest=?", [(incoming.digest,)]))

    def _abandon(self, incoming: Incoming, error: Exception) -> None:
        self._release(incoming)
        incoming.finished.set_exception(error)

    def _when_indexed(self, incoming: Incoming, kept: Future[None]) -> None:
        def indexed(future: Future[None]) -> None:
            self._release(incoming)
            error = future.exception()
            if error is not None:
                incoming.finished.set_exception(error)
            else:
                incoming.finished.set_result(None)

        kept.add_done_callback(indexed)

    def _release(self, incoming: Incoming) -> None:
        with self._lock:
            self._incoming.pop((incoming.digest, incoming.chunk_list_digest), None)

    # ---- models

    def put_manifest(self, manifest: Manifest, name: str) -> None:
        """Keep a model's manifest under its id; `name` is for people."""
        digest = self.put_blob(manifest.encode())
        now = int(time.time())
        self.index.write(
            _many(
                "INSERT INTO manifests(digest, name, added) VALUES(?,?,?) "
                "ON CONFLICT(digest) DO UPDATE SET name=excluded.name WHERE excluded.name<>''",
                [(digest, name, now)],
            )
        )

    def manifest(self, digest: bytes) -> Manifest | None:
        """Return the manifest with this digest, or None."""
        known = self._manifests.get(digest)
        if known is None:
            data = self.get_blob(digest, MAX_MANIFEST_BYTES)
            if data is None or digest_of(data) != digest:
                return None
            known = Manifest.decode(data)
            if len(self._manifests) >= 16:  # a node serves a handful of models at a time
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[digest] = known
        return known

    def models(self) -> list[ModelRecord]:
        """Return the models kept here, newest first."""
        rows = self.index.query(
            "SELECT digest, name, added FROM manifests ORDER BY added DESC, digest"
        )
        return [ModelRecord(*row) for row in rows]

    def change_count(self) -> tuple[int, int]:
        """Return numbers that change when any process adds or drops a model or an object."""
        rows = self.index.query(
            "SELECT (SELECT COUNT(*) FROM manifests), (SELECT COALESCE(MAX(rowid), 0) FROM objects)"
        )
        return rows[0][0], rows[0][1]

    def missing_objects(self, manifest: Manifest, indices: Iterable[int]) -> list[int]:
        """Return which of a manifest's objects are not here, whole."""
        wanted = sorted(indices)
        have = self.records([manifest.objects[i].digest for i in wanted])
        return [i for i in wanted if manifest.objects[i].digest not in have]

    # ---- durability

    def sync(self) -> int:
        """Put everything verified so far onto stable storage; return how many files."""
        synced = 0
        while True:
            rows = self.index.query(
                "SELECT digest FROM objects WHERE boot=? LIMIT ?", (self._boot, SYNC_BATCH)
            )
            if not rows:
                break
            digests = [row[0] for row in rows]
            with disk_errors("cannot sync the store"):
                for digest in digests:
                    sync_file(self.place.object_path(digest))
                for parent in {self.place.object_path(digest).parent for digest in digests}:
                    sync_directory(parent)
            self.index.write(
                _many("UPDATE objects SET boot=NULL WHERE digest=?", [(d,) for d in digests])
            )
            synced += len(digests)
        if synced:
            self.index.checkpoint()
        return synced

    def _recover(self) -> None:
        """Clear what a crash left: torn files are dropped, orphans removed."""
        rows = self.index.query(
            "SELECT digest, size FROM objects WHERE boot IS NOT NULL AND boot<>?", (self._boot,)
        )
        for digest, size in rows:
            try:
                good = hash_file(self.place.object_path(digest), size) == digest
            except OSError:
                good = False
            if good:
                self.index.write(
                    _many("UPDATE objects SET boot=? WHERE digest=?", [(self._boot, digest)])
                )
            else:
                self.forget([digest])
        self._remove_rubbish()

    def _remove_rubbish(self) -> None:
        for path in self.place.tmp.iterdir():
            pid = path.name.partition("-")[0]
            if not pid.isdigit() or not _is_alive(int(pid)):
                path.unlink(missing_ok=True)
        parts = {bytes.fromhex(p.name[:64]): p for p in self.place.partial.iterdir()}
        for digest in self.records(list(parts)):
            parts[digest].unlink(missing_ok=True)

    def forget(self, digests: Sequence[bytes]) -> None:
        """Drop objects from the index, and their own files from the disk."""
        self.index.write(_many("DELETE FROM objects WHERE digest=?", [(d,) for d in digests]))
        for digest in digests:
            self.place.object_path(digest).unlink(missing_ok=True)


def _many(sql: str, rows: Sequence[Sequence[object]]) -> Callable[[sqlite3.Connection], object]:
    """Return the operation that runs one statement for many rows."""
    return lambda db: db.executemany(sql, rows)


def _merge_partials(
    db: sqlite3.Connection, rows: Sequence[tuple[bytes, bytes, int, bytes, str]]
) -> None:
    for digest, chunk_list, size, proved, boot in rows:
        old = db.execute(
            "SELECT bitmap FROM partials WHERE digest=? AND chunk_list=? AND boot=?",
            (digest, chunk_list, boot),
        ).fetchone()
        merged = bitmap.union(old[0], proved) if old else proved
        db.execute(
            "INSERT OR REPLACE INTO partials(digest, chunk_list, size, bitmap, boot) "
            "VALUES(?,?,?,?,?)",
            (digest, chunk_list, size, merged, boot),
        )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
