"""What packs need besides writing and reading: mending, syncing, giving room back.

Rules
- After a power cut what was not on stable storage is hashed again, and rows of what is torn
  are dropped, as for objects in files (see `durability`).
- A pack that nobody may append to any more loses its file when no row names it, and is
  written anew when more than half of it is dead. So packs take at most twice the room of
  what they hold, and one pack's more for each open store, once `tidy` has run.
- Nothing is moved that does not match its digest: that is for `verify` to find.
- Work is done in portions of bounded memory, and a kill between any two of them leaves a
  store that is right.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .digest import digest_of
from .errors import NoRoom
from .objects import WholeObjects, many
from .place import disk_errors, remove_file, session_of, sync_directory, sync_file
from .records import PackSpot

PORTION = 256
"""Objects looked at in one go: 16 MiB at most."""


class _Pack(NamedTuple):
    pack_id: int
    name: str
    size_bytes: int
    durable_bytes: int
    boot: str
    is_open: int


def _all(objects: WholeObjects) -> list[_Pack]:
    rows = objects.index.query(
        "SELECT id, name, size_bytes, durable_bytes, boot, is_open FROM packs ORDER BY id"
    )
    return list(map(_Pack._make, rows))


def _contents(objects: WholeObjects, pack_id: int) -> Iterator[dict[bytes, PackSpot]]:
    """Yield what lies in a pack by digest, in portions."""
    last = b""
    while True:
        rows = objects.index.query(
            "SELECT digest, file_offset, size FROM objects "
            "WHERE digest>? AND place=3 AND pack=? ORDER BY digest LIMIT ?",
            (last, pack_id, PORTION),
        )
        if not rows:
            return
        last = rows[-1][0]
        yield {digest: (pack_id, offset, size_bytes) for digest, offset, size_bytes in rows}


# ---- syncing


def sync_packs(objects: WholeObjects) -> None:
    """Put what was appended so far onto stable storage, and note it."""
    behind = [pack for pack in _all(objects) if pack.durable_bytes < pack.size_bytes]
    if not behind:
        return
    with disk_errors("cannot sync the store"):
        for pack in behind:
            sync_file(objects.packs.path(pack.name))
        sync_directory(objects.place.packs)
    objects.index.write(
        many(
            "UPDATE packs SET durable_bytes=MAX(durable_bytes, ?) WHERE id=?",
            [(pack.size_bytes, pack.pack_id) for pack in behind],
        )
    )


# ---- mending


def recover_packs(objects: WholeObjects) -> None:
    """Drop rows of what a crash has torn, and files that no row names.

    Raises
    ------
    OSError, NoRoom, LocalError
        The disk does not take it.
    """
    # In this order: whoever has ended by the second line has committed all before the third.
    names = set(os.listdir(objects.place.packs))
    living = objects.place.living_sessions()
    packs = _all(objects)
    for name in names - {pack.name for pack in packs}:
        if session_of(name) not in living:
            remove_file(objects.packs.path(name))
    for pack in packs:
        _check(objects, pack)


def _check(objects: WholeObjects, pack: _Pack) -> None:
    """Hash again what may be torn of a pack, or cut off."""
    there_bytes = _size_bytes(objects, pack)
    good_bytes = pack.size_bytes if pack.boot == objects.boot else pack.durable_bytes
    good_bytes = min(good_bytes, there_bytes)
    if good_bytes == pack.size_bytes:
        return
    for portion in _contents(objects, pack.pack_id):
        suspects = {
            digest: (pack_id, offset, size_bytes)
            for digest, (pack_id, offset, size_bytes) in portion.items()
            if offset + size_bytes > good_bytes
        }
        data = objects.packs.read(list(suspects.values()))
        torn = [
            (digest, spot)
            for (digest, spot), each in zip(suspects.items(), data, strict=True)
            if each is None or digest_of(each) != digest
        ]
        objects.drop_lost(torn)
    objects.index.write(
        many(
            "UPDATE packs SET boot=?, size_bytes=MIN(size_bytes, ?) WHERE id=? AND boot=?",
            [(objects.boot, there_bytes, pack.pack_id, pack.boot)],
        )
    )


# ---- giving room back


def tidy(objects: WholeObjects) -> None:
    """Give back the room of packs of which nothing is left, or less than half.

    On a full disk those of which something is left stay as they are, until the next time.

    Raises
    ------
    LocalError
        The disk does not do it.
    """
    living = objects.place.living_sessions()
    used: dict[int, int] = dict(
        objects.index.query("SELECT pack, SUM(size) FROM objects WHERE place=3 GROUP BY pack")
    )
    # Of a pack that nobody appends to any more the rows can only become fewer.
    packs = [p for p in _all(objects) if not (p.is_open and session_of(p.name) in living)]
    with disk_errors("cannot tidy the store"):
        for pack in packs:
            if pack.pack_id not in used:
                _remove(objects, pack)
        try:
            for pack in packs:
                used_bytes = used.get(pack.pack_id, 0)
                is_mostly_dead = 2 * used_bytes < _size_bytes(objects, pack)
                if used_bytes and is_mostly_dead and _move_all(objects, pack):
                    _remove(objects, pack)
        except NoRoom:
            return


def _remove(objects: WholeObjects, pack: _Pack) -> None:
    objects.index.write(many("DELETE FROM packs WHERE id=?", [(pack.pack_id,)]))
    remove_file(objects.packs.path(pack.name))


def _size_bytes(objects: WholeObjects, pack: _Pack) -> int:
    """Return a pack's size; 0 if it is gone, which is for those to notice who read it."""
    try:
        return objects.packs.path(pack.name).stat().st_size
    except FileNotFoundError:
        return 0


def _move_all(objects: WholeObjects, pack: _Pack) -> bool:
    """Append everything in a pack to the open one; False if some of it cannot be read."""
    for portion in _contents(objects, pack.pack_id):
        found = objects.packs.read(list(portion.values()))
        data = [each for each in found if each is not None]
        if len(data) < len(found) or list(map(digest_of, data)) != list(portion):
            return False
        objects.index.write(_moving(objects, list(portion.items()), data))
    return True


def _moving(
    objects: WholeObjects, portion: Sequence[tuple[bytes, PackSpot]], data: Sequence[bytes]
) -> Callable[[sqlite3.Connection], None]:
    """Return the operation that appends objects again, and names their new places."""
    written = None

    def operation(db: sqlite3.Connection) -> None:
        nonlocal written
        if written is None:
            written = objects.packs.append(data)
        pack_id, offset = objects.packs.note(db, written), written.start
        rows = []
        for digest, (old_id, old_offset, size_bytes) in portion:
            rows.append((pack_id, offset, digest, old_id, old_offset))
            offset += size_bytes
        db.executemany(
            "UPDATE objects SET pack=?, file_offset=? "
            "WHERE digest=? AND pack=? AND file_offset=? AND place=3",
            rows,
        )

    return operation
