"""Pack files: the bytes of many small objects, one after the other.

A row of the index with 4 KiB of data costs SQLite three times what the data costs: each page
is written to its log by itself, with a checksum. So small objects that come in company are
appended to a file, and their rows say where they lie. One that comes alone stays in its row.

Rules
- A pack is written by one session (see `place`), in its index's writer thread, at the end.
  What lies in a pack is never changed: a reader may keep the file open for as long as it
  likes, whatever becomes of the pack meanwhile.
- Bytes are written first, and rows that name them are committed after. A process that is
  killed in between leaves bytes that no row names, which cost only room.
- A transaction that fails does not take its bytes back, for it may be tried again. No place
  is given out twice, unless the bytes could not be written there at all.
- Ids of packs are never used again, nor are their names.

The columns: `size_bytes` is the end of what rows may name, `durable_bytes` of what is on
stable storage, `boot` the machine's start the rest was written under. `is_open` tells that the
session, while it lives, may append more.

Not here: what is left of packs after a crash, syncing them, giving back the room of what was
dropped (`pack_care`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .index import Index, Operation
from .place import WRITE_SLICE, Place, disk_errors
from .records import PackSpot, insert_packed

PACK_BYTES = 64 << 20
"""Size from which on a pack takes no more. Few enough files for a store of any size, and small
enough to be written anew when most of one is dead."""

MIN_PACKED = 16
"""Least objects that go into a pack together: a command that keeps a manifest and two headers
need not leave a file of its own behind."""

READ_RUN_BYTES = 1 << 20
"""Bytes of neighbouring objects from which on no more are read in one go."""

MAX_PARTS = 1024
"""Buffers in one write, as POSIX allows them on every system of today."""


_Piece = tuple[int, int, int]  # position among those asked for, offset, length


class Written(NamedTuple):
    """Where bytes were appended.

    Attributes
    ----------
    name : str
        The pack's.
    start, end : int
        The first byte there, and the one after the last.
    is_full : bool
        Whether nothing more will be appended.
    """

    name: str
    start: int
    end: int
    is_full: bool


class Packs:
    """The packs of a store, and the one that this session appends to.

    Parameters
    ----------
    place : Place
        The store's files.
    index : Index
        The store's index.
    boot : str
        The machine's start.
    """

    def __init__(self, place: Place, index: Index, boot: str) -> None:
        self._place = place
        self._index = index
        self._boot = boot
        self._descriptor = -1
        self._name = ""
        self._end = 0
        self._names: dict[int, str] = {}  # by id

    def close(self) -> None:
        """Close the file that is appended to, after the writer thread has ended."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def path(self, name: str) -> Path:
        """Return where a pack lies."""
        return self._place.packs / name

    # ---- writing, in the index's writer thread

    def keeping(
        self, objects: Sequence[tuple[bytes, bytes]], added_by: str | None = None
    ) -> Operation[None]:
        """Return the operation that appends verified objects, by digest, and notes them."""
        written: Written | None = None

        def operation(db: sqlite3.Connection) -> None:
            nonlocal written
            if written is None:  # else the transaction failed, and is tried again
                written = self.append([data for _, data in objects])
            self.insert(db, written, [(digest, len(data)) for digest, data in objects], added_by)

        return operation

    def insert(
        self,
        db: sqlite3.Connection,
        written: Written,
        objects: Sequence[tuple[bytes, int]],
        added_by: str | None,
    ) -> None:
        """Note what was appended, objects by digest and size, inside a transaction."""
        insert_packed(db, self.note(db, written), written.start, objects, added_by)

    def append(self, parts: Sequence[bytes]) -> Written:
        """Append bytes to the open pack; only in an operation.

        Raises
        ------
        NoRoom, LocalError
            The disk does not take them.
        """
        with disk_errors("cannot write to a pack of small tensors"):
            if self._descriptor < 0:
                self._open_next()
            try:
                end = _write_all(self._descriptor, self._end, parts)
            except OSError:
                with contextlib.suppress(OSError):  # the room it took may be needed
                    os.ftruncate(self._descriptor, self._end)
                raise
        written = Written(self._name, self._end, end, end >= PACK_BYTES)
        self._end = end
        if written.is_full:
            self.close()
        return written

    def _open_next(self) -> None:
        name = self._place.unique_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self.path(name), flags, 0o644)
        self._name, self._end = name, 0

    def note(self, db: sqlite3.Connection, written: Written) -> int:
        """Note what was appended, inside a transaction; return the pack's id."""
        # Asked for each time: an id of a transaction that failed may be another pack's now.
        db.execute(
            "INSERT INTO packs(name, size_bytes, durable_bytes, boot, is_open) VALUES(?,?,0,?,?) "
            "ON CONFLICT(name) DO UPDATE SET size_bytes=MAX(size_bytes, excluded.size_bytes), "
            "boot=excluded.boot, is_open=MIN(is_open, excluded.is_open)",
            (written.name, written.end, self._boot, int(not written.is_full)),
        )
        ((pack_id,),) = db.execute("SELECT id FROM packs WHERE name=?", (written.name,)).fetchall()
        return int(pack_id)

    # ---- reading

    def read(self, spots: Sequence[PackSpot]) -> list[bytes | None]:
        """Return the bytes at many places, in the order asked for; neighbours in one go.

        Returns
        -------
        list of bytes or None
            None where the pack is gone, or ends too early.

        Raises
        ------
        LocalError
            A pack is there and cannot be read.
        """
        found: list[bytes | None] = [None] * len(spots)
        with disk_errors("cannot read a pack of small tensors"), contextlib.ExitStack() as stack:
            opened, descriptor = -1, -1
            for pack_id, start, stop, run in _runs(spots):
                if pack_id != opened:
                    stack.close()
                    opened, descriptor = pack_id, self._open(pack_id)
                    if descriptor >= 0:
                        stack.callback(os.close, descriptor)
                if descriptor < 0:
                    continue
                data = _read_upto(descriptor, start, stop - start)
                for position, offset, length in run:
                    if offset + length <= start + len(data):
                        found[position] = data[offset - start : offset - start + length]
        return found

    def _open(self, pack_id: int) -> int:
        """Open a pack; -1 if it is gone."""
        name = self._names.get(pack_id)
        if name is None:
            rows = self._index.query("SELECT name FROM packs WHERE id=?", (pack_id,))
            if not rows:
                return -1
            self._names[pack_id] = name = rows[0][0]
        try:
            return os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            del self._names[pack_id]
            return -1


def _runs(spots: Sequence[PackSpot]) -> Iterator[tuple[int, int, int, list[_Piece]]]:
    """Yield what is read in one go: pack, first byte, the one after the last, and pieces."""
    order = sorted(range(len(spots)), key=spots.__getitem__)
    pack_id, start, stop = -1, 0, 0
    run: list[_Piece] = []
    for position in order:
        of, offset, length = spots[position]
        if of != pack_id or offset != stop or stop - start >= READ_RUN_BYTES:
            if run:
                yield pack_id, start, stop, run
            pack_id, start, stop, run = of, offset, offset, []
        run.append((position, offset, length))
        stop += length
    if run:
        yield pack_id, start, stop, run


def _read_upto(descriptor: int, offset: int, length: int) -> bytes:
    """Return the bytes at a place of a file; fewer where it ends."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _write_all(descriptor: int, offset: int, parts: Sequence[bytes]) -> int:
    """Write buffers one after the other, some `WRITE_SLICE` at a time; return where they end."""
    start = 0
    while start < len(parts):
        stop, length = start, 0
        while stop < len(parts) and stop - start < MAX_PARTS and length < WRITE_SLICE:
            length += len(parts[stop])
            stop += 1
        count = os.pwritev(descriptor, parts[start:stop], offset)
        if count < length:  # the disk is nearly full, or a signal came: the rest by itself
            rest = memoryview(b"".join(parts[start:stop]))
            while count < length:
                count += os.pwrite(descriptor, rest[count:], offset + count)
        offset += length
        start = stop
    return offset
