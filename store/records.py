"""Rows of the index as values: objects, and files of the user's that are adopted.

An adopted file is trusted while its size, modification time, change time and inode
are those noted when its ranges were hashed. When they differ, nothing in it is given
out: its objects count as absent until they are hashed again, which happens when the
store is opened next or the file is added again. A file that vanished may come back (a
disk that is mounted later), so its rows stay.

The change time is there because it cannot be set back: a program that writes a file
and then restores its modification time would go unnoticed otherwise.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

from .digest import EMPTY_DIGEST
from .index import MAX_SQL_VARIABLES, Index, in_parts
from .reader import FileReader

CLOCK_TICK_S = 0.02
"""How coarse a file system's clock may be: 10 ms at 100 Hz, with room."""

COARSE_CLOCK_TICK_S = 2.0
"""The same where file times are whole seconds (FAT has two)."""


_SMALL_ROWS = MAX_SQL_VARIABLES // 4
_PACKED_ROWS = 128  # of three variables each: what comes in one answer takes two statements


class ObjectPlace(IntEnum):
    """Where an object's bytes are: in its row, a file of its own, one of the user's, a pack."""

    INLINE = 0
    FILE = 1
    ADOPTED = 2
    PACKED = 3


class ObjectRecord(NamedTuple):
    """One whole object.

    Attributes
    ----------
    digest : bytes
        Its digest, 32 bytes.
    size_bytes : int
        Its size.
    place : ObjectPlace
        Where its bytes are; only for ADOPTED the next two count.
    file_id : int
        The adopted file.
    file_offset : int
        Offset of the first byte in the adopted file.
    chunk_list : bytes
        Digest of the chunk list, empty for an object of one chunk.
    """

    digest: bytes
    size_bytes: int
    place: ObjectPlace
    file_id: int
    file_offset: int
    chunk_list: bytes


EMPTY_RECORD = ObjectRecord(EMPTY_DIGEST, 0, ObjectPlace.INLINE, 0, 0, b"")
"""The object of no bytes, which every store has."""


PackSpot = tuple[int, int, int]
"""Where a small object lies: in which pack, from which byte on, and how long it is."""


class NewObject(NamedTuple):
    """A verified object on its way into the index.

    Attributes
    ----------
    digest, size_bytes, chunk_list
        As in `ObjectRecord`.
    head : int
        See `head_of`.
    added_by : str or None
        Name of the `add` that takes the object away again if it fails.
    """

    digest: bytes
    size_bytes: int
    chunk_list: bytes
    head: int
    added_by: str | None = None


class FileState(NamedTuple):
    """What tells whether a file is still the one that was hashed."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileState:
        """Return the state in a file's status."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class AdoptedFile(NamedTuple):
    """A file of the user's, as it was when its ranges were hashed."""

    file_id: int
    path: Path
    state: FileState

    def is_unchanged(self) -> bool:
        """Tell whether the file is there and in the noted state."""
        try:
            return FileState.of(os.stat(self.path)) == self.state
        except OSError:
            return False


def head_of(digest: bytes, chunk_list: bytes) -> int:
    """Return a number made from an object's first chunk.

    If no object in the store has it, a file's range that begins with this chunk is
    surely new, which is known before the rest of it was read.
    """
    return int.from_bytes((chunk_list or digest)[:8], "little", signed=True)


def select_objects(index: Index, digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
    """Return the rows of the whole objects among `digests`, stale ones included."""
    rows = index.query_keys(
        # A small object has one chunk. What follows `data` in its row is not looked at:
        # SQLite would read through all of the data for it.
        "SELECT digest, size, place, CASE WHEN place IN (1, 2) THEN file_id END, "
        "CASE place WHEN 2 THEN file_offset END, "
        "CASE WHEN place IN (1, 2) THEN chunk_list ELSE x'' END "
        "FROM objects WHERE digest IN ({keys})",
        digests,
    )
    return {
        row[0]: ObjectRecord(row[0], row[1], ObjectPlace(row[2]), row[3] or 0, row[4] or 0, row[5])
        for row in rows
    }


def insert_object(
    db: sqlite3.Connection,
    new: NewObject,
    place: ObjectPlace,
    *,
    data: bytes | None = None,
    file_id: int | None = None,
    file_offset: int | None = None,
    boot: str | None = None,
) -> None:
    """Insert a verified object, and drop the notes on what was proved of it in part.

    One that is in the index or has a file of its own stays as it is; one in an adopted
    file is replaced, since that file may have changed. A file that takes the place of
    a lost one is not durable yet.
    """
    db.execute(
        "INSERT INTO objects(digest, size, place, data, file_id, file_offset, chunk_list, "
        "head, boot, added_by) VALUES(?,?,?,?,?,?,?,?,?,?) ON CONFLICT(digest) DO UPDATE SET "
        "size=excluded.size, place=excluded.place, data=excluded.data, "
        "file_id=excluded.file_id, file_offset=excluded.file_offset, "
        "chunk_list=excluded.chunk_list, boot=excluded.boot, added_by=excluded.added_by "
        "WHERE objects.place=2 OR (objects.place=1 AND excluded.place=1)",
        (
            new.digest,
            new.size_bytes,
            int(place),
            data,
            file_id,
            file_offset,
            new.chunk_list,
            new.head,
            boot,
            new.added_by,
        ),
    )
    db.execute("DELETE FROM partials WHERE digest=?", (new.digest,))


def insert_small(db: sqlite3.Connection, objects: Sequence[tuple[bytes, bytes]]) -> None:
    """Insert verified objects that live in the index, by digest; as `insert_object` for each.

    Many rows in one statement: a statement each would take the interpreter's lock twice
    a row, and wait for it each time while other threads work.
    """
    heads = array("q", b"".join([digest[:8] for digest, _ in objects]))  # as `head_of`
    if sys.byteorder == "big":
        heads.byteswap()
    sizes = map(len, [data for _, data in objects])
    rows = [
        (digest, size, data, head)
        for (digest, data), size, head in zip(objects, sizes, heads, strict=True)
    ]
    for start in range(0, len(objects), _SMALL_ROWS):
        part = rows[start : start + _SMALL_ROWS]
        db.execute(
            "INSERT INTO objects(digest, size, place, data, chunk_list, head) VALUES "
            + ",".join(["(?,?,0,?,x'',?)"] * len(part))
            + " ON CONFLICT(digest) DO UPDATE SET size=excluded.size, place=excluded.place, "
            "data=excluded.data, file_id=excluded.file_id, file_offset=excluded.file_offset, "
            "chunk_list=excluded.chunk_list, boot=excluded.boot, added_by=excluded.added_by "
            "WHERE objects.place=2",
            list(chain.from_iterable(part)),
        )
    _drop_parts(db, [digest for digest, _ in objects])


def insert_packed(
    db: sqlite3.Connection,
    pack_id: int,
    start: int,
    objects: Sequence[tuple[bytes, int]],
    added_by: str | None,
) -> None:
    """Insert objects, by digest and size, that lie side by side in a pack from `start` on.

    As `insert_object` for each; of one that is here already, the bytes in the pack are dead.
    """
    ends = accumulate([size_bytes for _, size_bytes in objects], initial=start)
    rows = [(*each, offset) for each, offset in zip(objects, ends, strict=False)]
    for first in range(0, len(rows), _PACKED_ROWS):
        part = rows[first : first + _PACKED_ROWS]
        db.execute(
            "INSERT INTO objects(pack, added_by, digest, size, file_offset, place, chunk_list, "
            "head) VALUES "
            + ",".join(["(?1,?2,?,?,?,3,x'',0)"] * len(part))
            + " ON CONFLICT(digest) DO UPDATE SET size=excluded.size, place=excluded.place, "
            "data=NULL, file_id=NULL, file_offset=excluded.file_offset, pack=excluded.pack, "
            "chunk_list=excluded.chunk_list, boot=NULL, added_by=excluded.added_by "
            "WHERE objects.place=2",
            [pack_id, added_by, *chain.from_iterable(part)],
        )
    db.execute("UPDATE changes SET objects = objects + ?", (len(rows),))
    _drop_parts(db, [digest for digest, _ in objects])


def _drop_parts(db: sqlite3.Connection, digests: Sequence[bytes]) -> None:
    """Drop the notes on what was proved in part of objects that are whole now."""
    if db.execute("SELECT 1 FROM partials LIMIT 1").fetchone() is None:
        return
    for keys, sql in in_parts("DELETE FROM partials WHERE digest IN ({keys})", digests):
        db.execute(sql, keys)


def present(db: sqlite3.Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Return which of `digests` have a row, inside a transaction."""
    found: set[bytes] = set()
    for part, sql in in_parts("SELECT digest FROM objects WHERE digest IN ({keys})", digests):
        found.update(row[0] for row in db.execute(sql, part))
    return found


def present_in(index: Index, digests: Sequence[bytes]) -> set[bytes]:
    """Return which of `digests` have a row."""
    rows = index.query_keys("SELECT digest FROM objects WHERE digest IN ({keys})", digests)
    return {row[0] for row in rows}


class AdoptedFiles:
    """The table of adopted files."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def all(self) -> list[AdoptedFile]:
        """Return every adopted file."""
        rows = self._index.query(
            "SELECT id, path, size, mtime_ns, ctime_ns, inode FROM adopted_files"
        )
        return [_adopted_file(row) for row in rows]

    def get(self, file_id: int) -> AdoptedFile | None:
        """Return one adopted file."""
        rows = self._index.query(
            "SELECT id, path, size, mtime_ns, ctime_ns, inode FROM adopted_files WHERE id=?",
            (file_id,),
        )
        return _adopted_file(rows[0]) if rows else None

    def unchanged(self, file_ids: Iterable[int]) -> set[int]:
        """Return which files are as they were when they were hashed; one look at each."""
        files = (self.get(file_id) for file_id in set(file_ids))
        return {file.file_id for file in files if file is not None and file.is_unchanged()}

    def open(self, record: ObjectRecord) -> FileReader | None:
        """Open an object in an adopted file, or return None if the file is not as it was."""
        file = self.get(record.file_id)
        if file is None:
            return None
        state = file.state
        try:
            return FileReader(
                file.path,
                record.file_offset,
                record.size_bytes,
                is_unchanged=lambda stat: FileState.of(stat) == state,
            )
        except OSError:
            return None  # changed, gone, or no longer ours to read


def _adopted_file(row: tuple[int, bytes, int, int, int, int]) -> AdoptedFile:
    return AdoptedFile(row[0], Path(os.fsdecode(row[1])), FileState(*row[2:]))


def note_file(db: sqlite3.Connection, path: Path, state: FileState) -> int:
    """Note an adopted file's state; ranges noted for an earlier state are dropped.

    Returns
    -------
    int
        Its id.
    """
    name = os.fsencode(path)
    row = db.execute(
        "SELECT id, path, size, mtime_ns, ctime_ns, inode FROM adopted_files WHERE path=?", (name,)
    ).fetchone()
    if row and _adopted_file(row).state == state:
        return int(row[0])
    if row:
        db.execute("DELETE FROM objects WHERE file_id=?", (row[0],))
        db.execute("DELETE FROM adopted_files WHERE id=?", (row[0],))
    cursor = db.execute(
        "INSERT INTO adopted_files(path, size, mtime_ns, ctime_ns, inode) VALUES(?,?,?,?,?)",
        (name, *state),
    )
    return int(cursor.lastrowid or 0)


def drop_unused_files(db: sqlite3.Connection) -> None:
    """Forget adopted files of which no range is left."""
    db.execute(
        "DELETE FROM adopted_files WHERE NOT EXISTS "
        "(SELECT 1 FROM objects WHERE objects.file_id = adopted_files.id)"
    )


def wait_for_clock(state: FileState) -> None:
    """Return once the file system's clock has moved on since a file's last change.

    A file may be changed twice within one tick, and show the same times for both. After
    the wait every change shows.
    """
    coarse = state.ctime_ns % 1_000_000_000 == 0
    tick_s = COARSE_CLOCK_TICK_S if coarse else CLOCK_TICK_S
    age_s = (time.time_ns() - state.ctime_ns) / 1e9
    if 0 <= age_s < tick_s:
        time.sleep(tick_s - age_s)
