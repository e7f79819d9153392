"""Whole objects: what the store has by digest, and how more gets in.

An object is a row of the index together with its bytes: 64 KiB and less in the row or,
where many came together, in a pack (`packs`); larger ones in a write-once file named by the
digest, or in a byte range of a file that the user adopted. Who puts an object in has hashed
it before.

An object's file is moved to its place, and taken away, inside the transaction that
changes its row. So no process sees the one without the other, unless it was killed in
between: a file without a row is rubbish that `add` and `receive` replace or take up, a
row without its file is dropped by whoever notices.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from .digest import EMPTY_DIGEST, chunk_list_of, digest_of
from .errors import StoreDamaged
from .index import MAX_SQL_VARIABLES, Index, in_parts
from .lookups import rows_of
from .packs import MIN_PACKED, Packs
from .place import Place, boot_identity, disk_errors, remove_file, write_file
from .reader import FileReader, InlineReader, read_all
from .records import (
    EMPTY_RECORD,
    AdoptedFiles,
    FileState,
    NewObject,
    ObjectPlace,
    ObjectRecord,
    PackSpot,
    drop_unused_files,
    head_of,
    insert_object,
    insert_small,
    note_file,
    present,
    select_objects,
)

INLINE_LIMIT = 64 << 10
"""Objects up to this many bytes live in the index: a file each would cost more than its bytes."""

LISTS_BATCH = 256
"""Chunk lists kept in one operation: 16 MiB at most."""

PACK_TRIES = 5
"""Times an object is looked for again that was moved to another pack while it was read."""

_SMALL_COLUMNS = (
    # What follows `data` is not looked at where it is not needed.
    "SELECT digest, place, CASE place WHEN 0 THEN data END, CASE place WHEN 3 THEN pack END, "
    "CASE place WHEN 3 THEN file_offset END, size FROM objects "
)

_PACKED = int(ObjectPlace.PACKED)  # looked up once: it is asked for each of many rows

FEW_PART = 8
"""A store is read as a whole where it has at most this part of what is looked for."""

FORGET_BATCH = 256
"""Objects dropped in one transaction: their files are removed while it is open."""


class AdoptedRange(NamedTuple):
    """A verified object in an adopted file, where it begins there, and its chunk list.

    The list is left empty if it is in the store already.
    """

    new: NewObject
    file_offset: int
    chunk_list: bytes


class WholeObjects:
    """The whole objects of a store directory.

    Parameters
    ----------
    root : Path
        The directory; it is made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.place = Place(Path(root))
        try:
            self.index = Index(self.place.index)
        except BaseException:
            self.place.close()
            raise
        self.adopted = AdoptedFiles(self.index)
        self.boot = boot_identity()
        self.packs = Packs(self.place, self.index, self.boot)

    @property
    def root(self) -> Path:
        """The store's directory."""
        return self.place.root

    def close(self) -> None:
        """Close the index and end the session."""
        self.index.close()
        self.packs.close()
        self.place.close()

    # ---- what is here

    def records(self, digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
        """Return the whole objects among `digests`.

        Those in adopted files that changed or vanished are not among them.
        """
        found = select_objects(self.index, digests)
        adopted = [r for r in found.values() if r.place is ObjectPlace.ADOPTED]
        if adopted:
            good = self.adopted.unchanged(record.file_id for record in adopted)
            for record in adopted:
                if record.file_id not in good:
                    del found[record.digest]
        if EMPTY_DIGEST in digests:
            found[EMPTY_DIGEST] = EMPTY_RECORD
        return found

    def sizes(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the sizes of the whole objects among `digests`, as `records` finds them."""
        # What follows `data` in a row is not looked at where it need not be: SQLite
        # would read through all of the data for it.
        columns = "SELECT digest, size, CASE place WHEN 2 THEN file_id END FROM objects "
        rows = self._few(columns, digests)
        if rows is None:
            rows = rows_of(self.index, columns, digests)
            if len(rows) > len(digests):
                wanted = set(digests)
                rows = [row for row in rows if row[0] in wanted]
        adopted = {row[2] for row in rows} - {None}
        changed = adopted - self.adopted.unchanged(adopted)
        found = {digest: size for digest, size, file_id in rows if file_id not in changed}
        if EMPTY_DIGEST in digests:
            found[EMPTY_DIGEST] = 0
        return found

    def _few(self, columns: str, digests: Sequence[bytes]) -> list[tuple[Any, ...]] | None:
        """Return the rows of many digests from a store that has few; None if it has more.

        A nearly empty store, as that of a first fetch, is read faster than it is asked.
        """
        most = len(digests) // FEW_PART
        if most <= MAX_SQL_VARIABLES:
            return None
        rows = self.index.query(columns + "LIMIT ?", (most + 1,))
        if len(rows) > most:
            return None
        wanted = set(digests)
        return [row for row in rows if row[0] in wanted]

    def all_digests(self) -> list[bytes]:
        """Return the digests of all whole objects, sorted."""
        rows = self.index.query("SELECT digest, file_id FROM objects ORDER BY digest")
        good = self.adopted.unchanged(row[1] for row in rows if row[1] is not None)
        return [digest for digest, file_id in rows if file_id is None or file_id in good]

    def has(self, digest: bytes) -> bool:
        """Tell whether an object is here, whole."""
        return bool(self.records([digest]))

    def may_have(self, head: int) -> bool:
        """Tell whether any larger object begins with the chunk of which `head` was made."""
        return bool(
            self.index.query(
                "SELECT 1 FROM objects WHERE head=? AND place IN (1, 2) LIMIT 1", (head,)
            )
        )

    def open_whole(self, digest: bytes) -> InlineReader | FileReader | None:
        """Open a whole object, or return None if it is not here.

        Raises
        ------
        LocalError
            It is here but cannot be opened now.
        """
        record = self.records([digest]).get(digest)
        if record is None:
            return None
        if record.place is ObjectPlace.ADOPTED:
            return self.adopted.open(record)
        if record.place is ObjectPlace.FILE:
            return self._open_file(record)
        if digest == EMPTY_DIGEST:
            return InlineReader(b"")
        (data,) = self.read_small([(digest, record.size_bytes)])
        return None if data is None else InlineReader(data)

    def _open_file(self, record: ObjectRecord) -> FileReader | None:
        path = self.place.object_path(record.digest)
        with disk_errors(f"cannot open {path}"):
            if _file_size(path) == record.size_bytes:
                with contextlib.suppress(FileNotFoundError):  # dropped by another, just now
                    return FileReader(path, 0, record.size_bytes)
        self.index.write(lambda db: _drop_dangling(db, record, path))
        return None

    def get_blob(self, digest: bytes, limit_bytes: int) -> bytes | None:
        """Return a whole object of at most `limit_bytes` bytes, or None."""
        reader = self.open_whole(digest)
        if reader is None:
            return None
        try:
            if reader.size_bytes > limit_bytes:
                return None
            data = bytearray(reader.size_bytes)
            reader.read_into(0, memoryview(data))
            return bytes(data)
        except OSError:
            return None  # it changed under our hands: not here any more
        finally:
            reader.close()

    def read_small(self, wanted: Sequence[tuple[bytes, int]]) -> list[bytes | None]:
        """Return the bytes of many small whole objects at once.

        Parameters
        ----------
        wanted : sequence of (bytes, int)
            Digest and size of each; none is read that has another size.

        Returns
        -------
        list of bytes or None
            In the order of `wanted`; None for those that are not here, whole.

        Raises
        ------
        LocalError
            One is here and cannot be read now.
        """
        sizes = dict(wanted)
        found: dict[bytes, bytes] = {}
        packed: dict[bytes, PackSpot] = {}
        in_files: list[bytes] = []
        for row in rows_of(self.index, _SMALL_COLUMNS, list(sizes)):
            digest, place = row[:2]
            if sizes.get(digest) != row[5]:
                continue
            if place == _PACKED:
                packed[digest] = row[3:]
            elif place == ObjectPlace.INLINE:
                found[digest] = row[2]
            else:
                in_files.append(digest)
        if packed:
            found.update(self._read_packed(packed))
        for digest in in_files:
            if (data := self._read_whole(digest, sizes[digest])) is not None:
                found[digest] = data
        if len(sizes) == len(wanted):
            return [found.get(digest) for digest, _ in wanted]
        given = ((found.get(digest), size) for digest, size in wanted)  # one is there twice
        return [data if data is not None and len(data) == size else None for data, size in given]

    def _read_packed(self, spots: dict[bytes, PackSpot]) -> dict[bytes, bytes]:
        """Return the bytes of packed objects; those whose bytes are lost are dropped."""
        found: dict[bytes, bytes] = {}
        for _ in range(PACK_TRIES):
            pairs = list(zip(spots, self.packs.read(list(spots.values())), strict=True))
            found.update((digest, data) for digest, data in pairs if data is not None)
            if len(found) == len(pairs):
                break
            # Another process may have moved them since we looked where they are.
            lost = {digest: spots[digest] for digest, data in pairs if data is None}
            now = self._spots(list(lost))
            self.drop_lost([each for each in lost.items() if now.get(each[0]) == each[1]])
            spots = {digest: spot for digest, spot in now.items() if spot != lost[digest]}
            if not spots:
                break
        return found

    def _spots(self, digests: Sequence[bytes]) -> dict[bytes, PackSpot]:
        """Return where those of some objects lie that are in packs."""
        rows = self.index.query_keys(
            "SELECT digest, pack, file_offset, size FROM objects "
            "WHERE place=3 AND digest IN ({keys})",
            digests,
        )
        return {row[0]: row[1:] for row in rows}

    def drop_lost(self, lost: Sequence[tuple[bytes, PackSpot]]) -> None:
        """Drop objects that are not where their rows say, unless they were moved meanwhile."""
        rows = [(digest, pack_id, offset) for digest, (pack_id, offset, _) in lost]
        if rows:
            self.index.write(
                many("DELETE FROM objects WHERE digest=? AND pack=? AND file_offset=?", rows)
            )

    def _read_whole(self, digest: bytes, size_bytes: int) -> bytes | None:
        reader = self.open_whole(digest)
        if reader is None:
            return None
        with contextlib.closing(reader), disk_errors("cannot read an object"):
            return bytes(read_all(reader)) if reader.size_bytes == size_bytes else None

    def get_blobs(self, wanted: Sequence[tuple[bytes, int]]) -> dict[bytes, bytes]:
        """Return those of many blobs that are here, by digest, given digest and size of each.

        As `get_blob` for each, but the small ones are looked for together.
        """
        small = [each for each in wanted if each[1] <= INLINE_LIMIT]
        found = {
            digest: data
            for (digest, _), data in zip(small, self.read_small(small), strict=True)
            if data is not None
        }
        for digest, size_bytes in wanted:
            if size_bytes > INLINE_LIMIT:
                data = self.get_blob(digest, size_bytes)
                if data is not None:
                    found[digest] = data
        return found

    # ---- putting things in

    def put_blob(self, data: bytes, *, added_by: str | None = None) -> bytes:
        """Keep bytes as an object and return their digest."""
        digest = digest_of(data)
        reader = self.open_whole(digest)
        if reader is not None:
            reader.close()
            return digest
        chunk_list = chunk_list_of(data)
        list_digest = self.put_blob(chunk_list, added_by=added_by) if chunk_list else b""
        new = NewObject(digest, len(data), list_digest, head_of(digest, chunk_list), added_by)
        self.keep_bytes(new, data).result()
        return digest

    def note_chunk_lists(self, chunk_lists: Sequence[bytes]) -> None:
        """Have chunk lists kept, without a wait for the small ones.

        They are kept again with each object that becomes whole, and it is then that a
        full disk is heard of.
        """
        small: list[tuple[bytes, bytes]] = []
        for data in chunk_lists:
            if len(data) > INLINE_LIMIT:
                self.put_blob(data)
                continue
            small.append((digest_of(data), data))
        for start in range(0, len(small), LISTS_BATCH):
            # In rows: most are shorter than a page, and are read one by one.
            part = small[start : start + LISTS_BATCH]
            self.index.submit(functools.partial(insert_small, objects=part))

    def keep_bytes(
        self, new: NewObject, data: bytes | memoryview, chunk_list: bytes = b""
    ) -> Future[None]:
        """Put a verified object into the index, or into a file of its own."""
        if len(data) <= INLINE_LIMIT:
            small = bytes(data)
            return self.index.submit(
                lambda db: insert_object(db, new, ObjectPlace.INLINE, data=small)
            )
        path = self.place.temporary()
        write_file(path, data)
        return self.keep_temporary(path, new, chunk_list)

    def keep_small(self, objects: Sequence[tuple[bytes, bytes]]) -> Future[None]:
        """Keep verified objects of at most `INLINE_LIMIT` bytes, by digest.

        Many go into a pack, few into their rows.
        """
        if len(objects) >= MIN_PACKED:
            return self.index.submit(self.packs.keeping(objects))
        return self.index.submit(lambda db: insert_small(db, objects))

    def keep_temporary(self, path: Path, new: NewObject, chunk_list: bytes = b"") -> Future[None]:
        """Keep a verified temporary file as `keep_file` does; it is gone if that fails."""
        kept = self.keep_file(path, new, chunk_list)
        kept.add_done_callback(lambda _: remove_file(path))
        return kept

    def keep_file(
        self,
        path: Path,
        new: NewObject,
        chunk_list: bytes = b"",
        descriptor: int | None = None,
    ) -> Future[None]:
        """Move a verified file to its place and put it into the index.

        Parameters
        ----------
        path : Path
            The file.
        new : NewObject
            What it is.
        chunk_list : bytes
            Its chunk list; left empty if that is here already.
        descriptor : int, optional
            The file that was verified, open until the future is done: for a path that
            other processes know, where another file may lie by now.
        """
        chunk_list = self._small_list(new, chunk_list)
        target = self.place.object_path(new.digest)
        moved = False

        def operation(db: sqlite3.Connection) -> None:
            nonlocal moved
            with disk_errors("cannot keep a tensor"):
                if _has_file(db, new.digest) and _file_size(target) == new.size_bytes:
                    path.unlink(missing_ok=True)  # another thread or process was first
                    return
                if not moved:
                    if descriptor is not None and not _is_same(descriptor, path):
                        raise FileNotFoundError(f"{path} is another file by now")
                    self.place.promote(path, new.digest)
                    moved = True
                elif _file_size(target) != new.size_bytes:
                    raise FileNotFoundError(f"{target} was taken away")
            _insert_list(db, new, chunk_list)
            insert_object(db, new, ObjectPlace.FILE, boot=self.boot)

        return self.index.submit(operation)

    def _small_list(self, new: NewObject, chunk_list: bytes) -> bytes:
        """Return a chunk list that fits into the index; a larger one is put in by itself."""
        if len(chunk_list) <= INLINE_LIMIT:
            return chunk_list
        self.put_blob(chunk_list, added_by=new.added_by)
        return b""

    def keep_found(self, new: NewObject) -> Future[None]:
        """Put a verified file that lies at its place already into the index."""

        def operation(db: sqlite3.Connection) -> None:
            with disk_errors("cannot keep a tensor"):
                if _file_size(self.place.object_path(new.digest)) != new.size_bytes:
                    raise StoreDamaged(f"{new.digest.hex()}: its file was taken away again")
            insert_object(db, new, ObjectPlace.FILE, boot=self.boot)

        return self.index.submit(operation)

    def keep_ranges(
        self, path: Path, state: FileState, ranges: Sequence[AdoptedRange]
    ) -> Future[None]:
        """Put verified byte ranges of a user's own file into the index."""
        lists = [self._small_list(each.new, each.chunk_list) for each in ranges]

        def operation(db: sqlite3.Connection) -> None:
            file_id = note_file(db, path, state)
            for (new, file_offset, _), chunk_list in zip(ranges, lists, strict=True):
                _insert_list(db, new, chunk_list)
                insert_object(
                    db,
                    new,
                    ObjectPlace.ADOPTED,
                    file_id=file_id,
                    file_offset=file_offset,
                    boot=self.boot,
                )
            drop_unused_files(db)

        return self.index.submit(operation)

    # ---- taking things out

    def forget(self, digests: Sequence[bytes]) -> None:
        """Drop objects from the index, and their own files from the disk."""
        for start in range(0, len(digests), FORGET_BATCH):
            part = digests[start : start + FORGET_BATCH]
            self.index.write(functools.partial(self.drop, digests=part))

    def undo(self, added_by: str, attempted: Sequence[bytes]) -> None:
        """Drop what an `add` put in and nobody else has come to rely on.

        Parameters
        ----------
        added_by : str
            The name it put its objects in under.
        attempted : sequence of bytes
            The objects it put in or tried to: of those that did not get a row, a file may
            lie about.
        """

        def portion(db: sqlite3.Connection) -> int:
            rows = db.execute(
                # Objects first, then their chunk lists: no object is ever without.
                "SELECT digest FROM objects WHERE added_by=? ORDER BY LENGTH(chunk_list) DESC "
                "LIMIT ?",
                (added_by, FORGET_BATCH),
            ).fetchall()
            self.drop(db, [row[0] for row in rows])
            return len(rows)

        while self.index.write(portion):
            pass  # in portions, for on a full disk a large transaction finds no room
        for start in range(0, len(attempted), FORGET_BATCH):
            part = attempted[start : start + FORGET_BATCH]
            self.index.write(functools.partial(self._remove_orphans, digests=part))

    def drop(self, db: sqlite3.Connection, digests: Sequence[bytes]) -> None:
        """Drop objects and their own files, inside a transaction."""
        db.executemany("DELETE FROM objects WHERE digest=?", [(digest,) for digest in digests])
        drop_unused_files(db)
        for digest in digests:
            remove_file(self.place.object_path(digest))

    def _remove_orphans(self, db: sqlite3.Connection, digests: Sequence[bytes]) -> None:
        for digest in set(digests) - present(db, digests):
            remove_file(self.place.object_path(digest))


def many(sql: str, rows: Sequence[Sequence[object]]) -> Callable[[sqlite3.Connection], object]:
    """Return the operation that runs one statement for many rows."""
    return lambda db: db.executemany(sql, rows)


def settle(db: sqlite3.Connection, digests: Iterable[bytes]) -> None:
    """Note that a model relies on objects: no failing `add` takes them away any more."""
    if db.execute("SELECT 1 FROM objects WHERE added_by IS NOT NULL LIMIT 1").fetchone() is None:
        return  # no `add` is under way, as when a model is fetched
    for part, sql in in_parts(
        "UPDATE objects SET added_by=NULL WHERE added_by IS NOT NULL AND digest IN ({keys})",
        list(digests),
    ):
        db.execute(sql, part)


def _insert_list(db: sqlite3.Connection, new: NewObject, chunk_list: bytes) -> None:
    """Put an object's chunk list into the index, if it is given and not there."""
    if chunk_list:
        digest = new.chunk_list
        listed = NewObject(digest, len(chunk_list), b"", head_of(digest, b""), new.added_by)
        insert_object(db, listed, ObjectPlace.INLINE, data=chunk_list)


def _file_size(path: Path) -> int:
    """Return a file's size, or -1 if there is none.

    Any other failure is raised: a disk that fails for a moment has not lost the file.
    """
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _is_same(descriptor: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), path.stat())


def _has_file(db: sqlite3.Connection, digest: bytes) -> bool:
    row = db.execute("SELECT 1 FROM objects WHERE digest=? AND place=1", (digest,)).fetchone()
    return row is not None


def _drop_dangling(db: sqlite3.Connection, record: ObjectRecord, path: Path) -> None:
    """Drop an object whose file is lost or cut short, unless it came back meanwhile."""
    with disk_errors(f"cannot open {path}"):
        if _has_file(db, record.digest) and _file_size(path) != record.size_bytes:
            db.execute("DELETE FROM objects WHERE digest=?", (record.digest,))
            remove_file(path)
