"""Putting a store onto stable storage, and mending it after a crash.

An object is usable as soon as it is verified and in the index. Its bytes may then be
in the system's memory only, so its row carries the identity of the machine's start
until `sync_objects` has put them onto the disk. A killed process loses nothing: what it
wrote is the system's. After a power cut, rows of another start are suspect and their
bytes are hashed again before anyone sees them.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .hashing import hash_range
from .objects import WholeObjects, many
from .pack_care import recover_packs, sync_packs
from .place import disk_errors, remove_file, sync_directory, sync_file
from .records import AdoptedFile, FileState, drop_unused_files, wait_for_clock

SYNC_BATCH = 256
"""Files put onto stable storage between two commits that say so."""

_CANNOT_SYNC = frozenset({errno.EROFS, errno.EINVAL, errno.EACCES, errno.EPERM})
"""A file on a medium that is never written, or not ours to read, needs no sync."""


class _Suspect(NamedTuple):
    digest: bytes
    size_bytes: int
    file_id: int  # 0 for a file of its own
    file_offset: int


def sync_objects(objects: WholeObjects) -> int:
    """Put everything verified so far onto stable storage; return how many objects.

    Raises
    ------
    NoRoom, LocalError
        The disk does not take it.
    """
    synced = 0
    while True:
        rows = objects.index.query(
            "SELECT digest, file_id FROM objects WHERE boot=? LIMIT ?", (objects.boot, SYNC_BATCH)
        )
        if not rows:
            break
        with disk_errors("cannot sync the store"):
            paths = [objects.place.object_path(row[0]) for row in rows if row[1] is None]
            for path in paths:
                sync_file(path)
            for parent in {path.parent for path in paths}:
                sync_directory(parent)
            sync_directory(objects.place.objects)
            _sync_adopted(objects, {row[1] for row in rows if row[1] is not None})
        objects.index.write(
            many("UPDATE objects SET boot=NULL WHERE digest=?", [(row[0],) for row in rows])
        )
        synced += len(rows)
    sync_packs(objects)
    with disk_errors("cannot sync the store"):
        objects.index.sync()
    return synced


def _sync_adopted(objects: WholeObjects, file_ids: set[int]) -> None:
    """Sync the user's own files: they may have been written just before they were added."""
    for file_id in file_ids:
        file = objects.adopted.get(file_id)
        if file is None or not file.is_unchanged():
            continue
        try:
            sync_file(file.path)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise


def recover(objects: WholeObjects) -> None:
    """Clear what a crash left: torn objects are dropped, files of no use removed.

    Objects in adopted files that changed are hashed again; those that are not what they
    were are dropped.

    Raises
    ------
    NoRoom, LocalError
        The disk does not take it.
    """
    with disk_errors("cannot mend the store"):
        _check_suspects(objects)
        recover_packs(objects)
        for file in objects.adopted.all():
            _check_adopted(objects, file)
        objects.place.clear_tmp()
        clear_partials(objects)


def _check_suspects(objects: WholeObjects) -> None:
    """Hash the objects that were not durable when the machine stopped."""
    rows = objects.index.query(
        "SELECT boot, digest, size, COALESCE(file_id, 0), COALESCE(file_offset, 0) "
        "FROM objects WHERE boot IS NOT NULL AND boot<>?",
        (objects.boot,),
    )
    for boot, *fields in rows:
        suspect = _Suspect(*fields)
        path, offset = objects.place.object_path(suspect.digest), 0
        if suspect.file_id:
            file = objects.adopted.get(suspect.file_id)
            if file is None or not file.is_unchanged():
                continue  # nobody is given it; `_check_adopted` sees to it
            path, offset = file.path, suspect.file_offset
        is_good = _is_good(path, offset, suspect)
        objects.index.write(_judge(objects, suspect, boot, is_good))


def _is_good(path: Path, offset: int, suspect: _Suspect) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return hash_range(descriptor, offset, suspect.size_bytes) == suspect.digest
    except OSError:
        return False  # shorter than it was, or unreadable: torn either way
    finally:
        os.close(descriptor)


def _judge(
    objects: WholeObjects, suspect: _Suspect, boot: str, is_good: bool
) -> Callable[[sqlite3.Connection], None]:
    """Return the operation that keeps or drops a suspect, unless it was replaced meanwhile."""

    def operation(db: sqlite3.Connection) -> None:
        key = (suspect.digest, boot)
        if is_good:
            db.execute("UPDATE objects SET boot=? WHERE digest=? AND boot=?", (objects.boot, *key))
            return
        dropped = db.execute("DELETE FROM objects WHERE digest=? AND boot=?", key).rowcount
        if dropped and not suspect.file_id:
            remove_file(objects.place.object_path(suspect.digest))

    return operation


def _check_adopted(objects: WholeObjects, file: AdoptedFile) -> None:
    """Hash a file's ranges again if it is not as it was."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return  # gone, for now; its objects are not given out
    try:
        state = FileState.of(os.fstat(descriptor))
        if state == file.state:
            return
        wait_for_clock(state)
        rows = objects.index.query(
            "SELECT digest, size, file_offset FROM objects WHERE file_id=?", (file.file_id,)
        )
        bad = [digest for digest, *where in rows if not _lies_there(descriptor, digest, *where)]
        if FileState.of(os.fstat(descriptor)) != state:
            return  # it is being written; the next time, then
    finally:
        os.close(descriptor)
    objects.index.write(_note_again(file, state, bad, objects.boot))


def _lies_there(descriptor: int, digest: bytes, size_bytes: int, offset: int) -> bool:
    try:
        return hash_range(descriptor, offset, size_bytes) == digest
    except OSError:
        return False


def _note_again(
    file: AdoptedFile, state: FileState, bad: Sequence[bytes], boot: str
) -> Callable[[sqlite3.Connection], None]:
    def operation(db: sqlite3.Connection) -> None:
        noted = db.execute(
            "UPDATE adopted_files SET size=?, mtime_ns=?, ctime_ns=?, inode=? WHERE id=? "
            "AND size=? AND mtime_ns=? AND ctime_ns=? AND inode=?",
            (*state, file.file_id, *file.state),
        )
        if not noted.rowcount:
            return  # another process was first
        db.executemany(
            "DELETE FROM objects WHERE digest=? AND file_id=?",
            [(digest, file.file_id) for digest in bad],
        )
        db.execute("UPDATE objects SET boot=? WHERE file_id=?", (boot, file.file_id))
        drop_unused_files(db)

    return operation


def clear_partials(objects: WholeObjects) -> None:
    """Remove parts of objects that are whole by now, and notes on parts that are gone."""
    files = list(objects.place.partial_files())
    whole = objects.records([digest for _, digest in files])
    for path, digest in files:
        if digest in whole:
            remove_file(path)
    rows = objects.index.query("SELECT digest, chunk_list FROM partials")
    gone = [row for row in rows if not objects.place.partial_path(*row).exists()]
    if gone:
        objects.index.write(many("DELETE FROM partials WHERE digest=? AND chunk_list=?", gone))
