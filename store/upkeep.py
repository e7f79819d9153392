"""Taking models out of a store, keeping some for good, and collecting what nobody needs.

A model in the list (`Store.models`) keeps its manifest, its objects and their chunk
lists. A pin keeps a model in the list, or a bare object in the store. Everything else
is garbage: what removed models alone had, bare tensors once fetched, parts of
downloads that were given up.

Rules
- Objects that another model shares stay. Files of the user's are never touched: of an
  object registered where it lies, only the row goes.
- What a living process is adding stays, whatever the list says. A fetch puts its manifest
  into the list before it looks what is here, so what it counts on stays as well.
- What to drop is decided by the list as it was read; if the list grows meanwhile, in any
  process, nothing is dropped by the old decision.

Not here: who asks, and what is told to peers (a node notices by `Store.change_count`).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .cid import MODEL_CODEC, parse_reference
from .durability import clear_partials
from .errors import BadInput, LocalError, NotFound
from .manifest import Manifest
from .objects import FORGET_BATCH
from .pack_care import tidy
from .place import disk_errors, remove_file
from .records import ObjectPlace
from .store import Store

PARTIAL_AGE_S = 3600.0
"""Age of the last write after which a part of a download counts as given up: longer than
any pause of a fetch that runs, and resuming one later than that is rare."""

EXPORTS = "exports"
"""Folder in the store where the library writes a model's files when no other is named."""

_MAX_TRIES = 10
"""Times the list may change under a collection before it gives up until later."""


class Freed(NamedTuple):
    """What a collection dropped.

    Attributes
    ----------
    objects : int
        Whole objects.
    partials : int
        Parts of downloads.
    size_bytes : int
        Room they took in the store; nothing is counted for what lies in the user's files.
    """

    objects: int
    partials: int
    size_bytes: int


def pins(store: Store) -> set[bytes]:
    """Return the digests of the models and objects that are pinned."""
    return {row[0] for row in store.index.query("SELECT digest FROM pins")}


def pin(store: Store, digest: bytes) -> None:
    """Keep a model, or a bare object, until it is unpinned.

    Raises
    ------
    NotFound
        It is not here.
    """
    if not store.has(digest):
        raise NotFound("only what is in the store can be pinned: `tensorswarm fetch` it first")
    store.index.write(
        lambda db: db.execute("INSERT OR IGNORE INTO pins(digest) VALUES(?)", (digest,))
    )


def unpin(store: Store, digest: bytes) -> bool:
    """Keep it no longer than the list does; False if it was not pinned."""
    return store.index.write(
        lambda db: db.execute("DELETE FROM pins WHERE digest=?", (digest,)).rowcount > 0
    )


def remove_models(store: Store, digests: Sequence[bytes]) -> Freed:
    """Take models out of the list, and collect what they alone needed.

    Raises
    ------
    NotFound
        One of them is not in the list; nothing is removed.
    BadInput
        One of them is pinned; nothing is removed.
    """
    known = {record.digest: record for record in store.models()}
    kept = pins(store)
    for digest in digests:
        if digest not in known:
            raise NotFound(f"no model {digest.hex()} in the store: see `tensorswarm ls`")
        if digest in kept:
            name = known[digest].name or digest.hex()
            raise BadInput(f"model {name} is pinned: `tensorswarm unpin` it first")
    candidates: set[bytes] = set()
    for digest in digests:
        candidates |= _needs(store, digest)
    store.index.write(
        lambda db: db.executemany("DELETE FROM manifests WHERE digest=?", [(d,) for d in digests])
    )
    for digest in digests:
        with disk_errors("cannot remove an export"):
            for folder in _exports_of(store, digest):
                shutil.rmtree(folder)
    return _collect(store, candidates, partial_age_s=0.0)


def collect(store: Store, *, dry_run: bool = False, partial_age_s: float = PARTIAL_AGE_S) -> Freed:
    """Drop everything that no model in the list and no pin needs.

    Parameters
    ----------
    store : Store
        The store.
    dry_run : bool, optional
        Only say what would be dropped.
    partial_age_s : float, optional
        Seconds since the last write after which a part of a download is given up.

    Raises
    ------
    LocalError
        Other processes changed the list too often meanwhile; nothing is wrong.
    """
    return _collect(store, None, dry_run=dry_run, partial_age_s=partial_age_s)


def _collect(
    store: Store,
    candidates: set[bytes] | None,
    *,
    dry_run: bool = False,
    partial_age_s: float,
) -> Freed:
    """Drop garbage, of all objects or of some candidates."""
    objects = size_bytes = 0
    for _ in range(_MAX_TRIES):
        models = store.change_count()[0]
        needed = _all_needed(store)
        garbage = {
            digest: size
            for digest, size in _droppable(store).items()
            if digest not in needed and (candidates is None or digest in candidates)
        }
        if dry_run:
            objects, size_bytes = len(garbage), sum(garbage.values())
            break
        dropped = _drop_all(store, list(garbage), models)
        objects += len(dropped)
        size_bytes += sum(garbage[digest] for digest in dropped)
        if len(dropped) == len(garbage):
            break
    else:
        raise LocalError("the store's list of models keeps changing: try again later")
    if not dry_run:
        tidy(store)
    partials, room = _drop_partials(store, needed, candidates, partial_age_s, dry_run=dry_run)
    return Freed(objects, partials, size_bytes + room)


def _needs(store: Store, digest: bytes) -> set[bytes]:
    """Return everything a model consists of, itself and chunk lists included."""
    manifest = _manifest(store, digest)
    if manifest is None:
        return {digest}
    lists = {ref.chunk_list for ref in manifest.objects if ref.chunk_list}
    return {digest, *(ref.digest for ref in manifest.objects)} | lists


def _manifest(store: Store, digest: bytes) -> Manifest | None:
    try:
        return store.manifest(digest)
    except BadInput:
        return None  # a pinned object that is no manifest


def _all_needed(store: Store) -> set[bytes]:
    """Return what the list and the pins keep."""
    needed: set[bytes] = set()
    kept = pins(store)
    for record in store.models():
        needed |= _needs(store, record.digest)
    for digest in kept - needed:
        needed |= _needs(store, digest)
    # The objects of a pinned model are in by now; a bare object has a list of its own.
    rows = store.index.query_keys(
        "SELECT chunk_list FROM objects WHERE chunk_list<>x'' AND digest IN ({keys})", list(kept)
    )
    return needed | {row[0] for row in rows}


def _droppable(store: Store) -> dict[bytes, int]:
    """Return all objects that nobody is adding just now, and the room each takes here."""
    living = store.place.living_sessions()
    rows = store.index.query("SELECT digest, size, place, added_by FROM objects")
    return {
        digest: 0 if place == ObjectPlace.ADOPTED else size
        for digest, size, place, added_by in rows
        if added_by is None or added_by.partition(".")[0] not in living
    }


def _drop_all(store: Store, digests: list[bytes], models: int) -> list[bytes]:
    """Drop objects, as long as no model is added meanwhile; return those dropped."""
    dropped: list[bytes] = []
    for start in range(0, len(digests), FORGET_BATCH):
        part = digests[start : start + FORGET_BATCH]
        if not store.index.write(_drop_unless_changed(store, part, models)):
            break
        dropped += part
    return dropped


def _drop_unless_changed(
    store: Store, digests: Sequence[bytes], models: int
) -> Callable[[sqlite3.Connection], bool]:
    def operation(db: sqlite3.Connection) -> bool:
        ((now,),) = db.execute("SELECT models FROM changes").fetchall()
        if now != models:
            return False
        store.drop(db, digests)
        return True

    return operation


def _drop_partials(
    store: Store,
    needed: set[bytes],
    candidates: set[bytes] | None,
    age_s: float,
    *,
    dry_run: bool,
) -> tuple[int, int]:
    """Remove parts of downloads that were given up; return how many, and their room."""
    count = room = 0
    for path, digest in store.place.partial_files():
        if digest in needed or (candidates is not None and digest not in candidates):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # became whole just now
        if time.time() - status.st_mtime < age_s or store.is_receiving(digest):
            continue
        count += 1
        room += status.st_blocks * 512
        if not dry_run:
            remove_file(path)
    if count and not dry_run:
        clear_partials(store)
    return count, room


def _exports_of(store: Store, digest: bytes) -> list[Path]:
    """Return the folders in the store that hold exports of a model."""
    folder = store.root / EXPORTS
    found = []
    for name in os.listdir(folder) if folder.is_dir() else ():
        try:
            reference = parse_reference(name)
        except BadInput:
            continue
        if reference.codec == MODEL_CODEC and reference.digest == digest:
            found.append(folder / name)
    return found
