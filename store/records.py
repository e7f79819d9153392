"""Rows of the index as values: objects, and files of the user's that are adopted.

An adopted file is trusted while its size, modification time and inode are those
noted when its ranges were hashed. When they differ, nothing in it is trusted:
its rows go, and what is wanted again must be hashed or fetched again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from .index import Index


class ObjectPlace(IntEnum):
    """Where an object's bytes are."""

    INLINE = 0
    FILE = 1
    ADOPTED = 2


class ObjectRecord(NamedTuple):
    """One whole object.

    Attributes
    ----------
    digest : bytes
        Its digest, 32 bytes.
    size_bytes : int
        Its size.
    place : ObjectPlace
        Which of the following fields count.
    data : bytes
        The bytes, when inline.
    file_id : int
        The adopted file, when adopted.
    file_offset : int
        Offset of the first byte in the adopted file.
    chunk_list : bytes
        Digest of the chunk list, empty for an object of one chunk.
    """

    digest: bytes
    size_bytes: int
    place: ObjectPlace
    data: bytes
    file_id: int
    file_offset: int
    chunk_list: bytes


class AdoptedFile(NamedTuple):
    """A file of the user's, as it was when its ranges were hashed."""

    file_id: int
    path: Path
    size_bytes: int
    mtime_ns: int
    inode: int


def select_objects(index: Index, digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
    """Return the records of the whole objects among `digests`."""
    rows = index.query_keys(
        "SELECT digest, size, place, data, file_id, file_offset, chunk_list "
        "FROM objects WHERE digest IN ({keys})",
        digests,
    )
    return {
        row[0]: ObjectRecord(
            row[0], row[1], ObjectPlace(row[2]), row[3] or b"", row[4] or 0, row[5] or 0, row[6]
        )
        for row in rows
    }


def insert_object(db: sqlite3.Connection, record: ObjectRecord, boot: str | None) -> None:
    """Insert an object; one that is here already stays as it is."""
    inline = record.place is ObjectPlace.INLINE
    adopted = record.place is ObjectPlace.ADOPTED
    db.execute(
        "INSERT INTO objects(digest, size, place, data, file_id, file_offset, chunk_list, boot) "
        "VALUES(?,?,?,?,?,?,?,?) ON CONFLICT(digest) DO NOTHING",
        (
            record.digest,
            record.size_bytes,
            int(record.place),
            record.data if inline else None,
            record.file_id if adopted else None,
            record.file_offset if adopted else None,
            record.chunk_list,
            boot,
        ),
    )


class AdoptedFiles:
    """The table of adopted files."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def register(self, path: Path) -> AdoptedFile:
        """Note a file's present state; ranges of an earlier state are dropped.

        Raises
        ------
        OSError
            The file cannot be examined.
        """
        stat = path.stat()

        def operation(db: sqlite3.Connection) -> AdoptedFile:
            state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            row = db.execute(
                "SELECT id, size, mtime_ns, inode FROM adopted_files WHERE path=?", (str(path),)
            ).fetchone()
            if row and tuple(row[1:]) == state:
                return AdoptedFile(row[0], path, *state)
            if row:
                db.execute("DELETE FROM objects WHERE file_id=?", (row[0],))
                db.execute("DELETE FROM adopted_files WHERE id=?", (row[0],))
            cursor = db.execute(
                "INSERT INTO adopted_files(path, size, mtime_ns, inode) VALUES(?,?,?,?)",
                (str(path), *state),
            )
            return AdoptedFile(int(cursor.lastrowid or 0), path, *state)

        return self._index.write(operation)

    def path_if_unchanged(self, record: ObjectRecord) -> Path | None:
        """Return the file an object lies in, or None if it changed or vanished."""
        rows = self._index.query(
            "SELECT path, size, mtime_ns, inode FROM adopted_files WHERE id=?", (record.file_id,)
        )
        if not rows:
            return None
        path = Path(rows[0][0])
        try:
            stat = os.stat(path)
        except OSError:
            return None
        if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != tuple(rows[0][1:]):
            return None
        return path
