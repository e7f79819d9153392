"""Receiving objects into a store: who is at work, what is proved, when one is done.

One `Incoming` stands for an object in this process, however many downloads want it;
it lives as long as somebody holds it. Bitmaps go to the index from time to time, so
that other processes see what is here in part, and a later one need not hash it again.

An object is known here by its digest, its chunk list and its size together: a false
manifest may name a true digest with another size or list, and must not be able to
stand in the way of a true one.

To others only one of them is shown at a time, told of and served alike, because a
reader is asked for by digest alone: the first to begin, for as long as it is received
in this process; where there is none, the first that the index has a bitmap of.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import compress
from typing import NamedTuple

from . import bitmap
from .digest import digest_of
from .errors import BadInput, HashMismatch, LocalError, StoreDamaged
from .hashing import hash_file
from .incoming import Incoming
from .manifest import ObjectRef
from .objects import INLINE_LIMIT, WholeObjects, many
from .place import disk_errors, partial_name, remove_file
from .reader import FileReader
from .records import NewObject, head_of, present, present_in
from .relatives import copy_from_relatives, find_relatives
from .wanted import Wanted

FLUSH_INTERVAL_S = 0.25
"""How far the index may be behind the bitmaps in memory."""

MAX_SMALL_BATCHES = 16
"""Batches of small objects that wait for the index: at most 1 MiB each."""

SMALL_WAIT_S = 60.0
"""Longest wait for one of them: the writer itself waits 30 s for another process."""

_Key = tuple[bytes, bytes, int]


MANY_OBJECTS = 64
"""Objects from which on the store's folders are listed: each has 256 at most."""


class _Found(NamedTuple):
    """What was there before, of objects about to be received.

    Attributes
    ----------
    here : set of bytes
        Those with a row in the index.
    noted : mapping of key to bytes
        Bitmaps that can be trusted.
    partial_files, whole_files : set of str or None
        Names of the files in progress, and of whole objects; None when nobody looked.
    """

    here: Set[bytes]
    noted: Mapping[_Key, bytes]
    partial_files: Set[str] | None
    whole_files: Set[str] | None


_NOTHING = _Found(frozenset(), {}, frozenset(), frozenset())


class Receiver:
    """The objects being received into one store. A `Keeper`.

    Parameters
    ----------
    objects : WholeObjects
        Where they go.
    """

    def __init__(self, objects: WholeObjects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._incoming: weakref.WeakValueDictionary[_Key, Incoming] = weakref.WeakValueDictionary()
        self._shown: weakref.WeakValueDictionary[bytes, Incoming] = weakref.WeakValueDictionary()
        self._downloads: weakref.WeakSet[Wanted] = weakref.WeakSet()
        self._dirty: set[Incoming] = set()
        self._flushed_at = time.monotonic()
        self._small_room = threading.BoundedSemaphore(MAX_SMALL_BATCHES)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="store-finisher")

    def close(self) -> None:
        """Finish what is proved, and note what is proved in part."""
        self._finisher.shutdown(wait=True)
        self.flush()

    # ---- what is here in part

    def current(self, digest: bytes) -> Incoming | None:
        """Return the larger object of this digest that is being received, and shown."""
        with self._lock:
            return self._shown.get(digest)

    def bitmaps(self, digests: list[bytes]) -> dict[bytes, tuple[int, bytes, bytes]]:
        """Return size, bitmap and chunk list's digest of what is shown of objects in part."""
        rows = self._objects.index.query_keys(
            "SELECT digest, size, bitmap, chunk_list, boot FROM partials "
            "WHERE digest IN ({keys}) ORDER BY rowid DESC",
            digests,
        )
        found = {row[0]: row[1:4] for row in rows if row[4] == self._objects.boot}
        for digest in digests:
            incoming = self.current(digest)
            if incoming is not None:
                proved = incoming.proved()
                found[digest] = (incoming.size_bytes, proved, incoming.chunk_list_digest)
        return found

    def open_partial(self, digest: bytes) -> FileReader | None:
        """Open an object in progress, of this process or another."""
        incoming = self.current(digest)
        if incoming is not None:
            path, size, proved = incoming.path, incoming.size_bytes, incoming.proved()
        else:
            rows = self._objects.index.query(
                "SELECT size, bitmap, chunk_list FROM partials WHERE digest=? AND boot=? "
                "ORDER BY rowid LIMIT 1",
                (digest, self._objects.boot),
            )
            if not rows:
                return None
            size, proved, chunk_list = rows[0]
            path = self._objects.place.partial_path(digest, chunk_list)
        try:
            return FileReader(path, 0, size, proved)
        except OSError:
            return None  # it became whole, or was removed, in between

    # ---- beginning

    def receive(self, ref: ObjectRef, chunk_list: bytes) -> Incoming:
        """See `Store.receive`."""
        return self._receive_many([(ref, chunk_list)])[0]

    def _receive_many(self, wanted: Sequence[tuple[ObjectRef, bytes]]) -> list[Incoming]:
        here = present_in(self._objects.index, [ref.digest for ref, _ in wanted])
        noted = self._noted([ref.digest for ref, chunk_list in wanted if chunk_list])
        # One look at each folder instead of one for each object, where there are many.
        is_many = len(wanted) > MANY_OBJECTS
        found = _Found(
            here,
            noted,
            self._objects.place.partial_names() if is_many else None,
            self._objects.place.object_names() if is_many else None,
        )
        return [self._receive(ref, chunk_list, found) for ref, chunk_list in wanted]

    def join(self, wanted: Wanted) -> None:
        """Remember what a download wants for as long as it lives: others may bring it."""
        with self._lock:
            self._downloads.add(wanted)

    def begun_digests(self) -> Iterator[bytes]:
        """Yield the digests of what lies on the disk in part, or as a file, or is coming."""
        place = self._objects.place
        for name in place.partial_names() | place.object_names():
            with contextlib.suppress(ValueError):  # not ours
                yield bytes.fromhex(name.partition("-")[0])
        with self._lock:
            coming = list(self._incoming)
        for digest, _, _ in coming:
            yield digest

    def take_up(
        self, wanted: Sequence[tuple[ObjectRef, bytes]], begun: Set[bytes]
    ) -> list[Incoming | None]:
        """Return the state of those objects of which there is something; None for the others.

        Parameters
        ----------
        wanted : sequence of (ObjectRef, bytes)
            Objects and their chunk lists, which are the ones that are named.
        begun : set of bytes
            Those that lay on the disk at first.
        """
        here = present_in(self._objects.index, [ref.digest for ref, _ in wanted])
        with self._lock:
            coming = set(self._incoming)
        is_there = [
            ref.digest in here
            or ref.digest in begun
            or (ref.digest, ref.chunk_list, ref.size_bytes) in coming
            for ref, _ in wanted
        ]
        found = iter(self._receive_many(list(compress(wanted, is_there))))
        return [next(found) if there else None for there in is_there]

    def begin(self, ref: ObjectRef, chunk_list: bytes) -> Incoming:
        """Return the state of an object of which nothing was there when it was looked for."""
        return self._receive(ref, chunk_list, _NOTHING)

    def relatives(self, heads: Iterable[int]) -> dict[int, list[bytes]]:
        """Return the whole objects that begin with a chunk; see `relatives`."""
        return find_relatives(self._objects, heads)

    def copy_from_relatives(self, incoming: Sequence[Incoming]) -> None:
        """Fill objects with what older forms of them have; see `relatives`."""
        copy_from_relatives(self._objects, incoming)

    def _noted(self, digests: Sequence[bytes]) -> dict[_Key, bytes]:
        """Return the bitmaps that can be trusted, of objects in part."""
        rows = self._objects.index.query_keys(
            "SELECT digest, chunk_list, size, bitmap, boot FROM partials WHERE digest IN ({keys})",
            digests,
        )
        return {row[:3]: row[3] for row in rows if row[4] == self._objects.boot}

    def _receive(self, ref: ObjectRef, chunk_list: bytes, found: _Found) -> Incoming:
        """Begin with one object, of which it is known what the index says."""
        if ref.chunk_list != (digest_of(chunk_list) if chunk_list else b""):
            raise BadInput(f"the chunk list of {ref.digest.hex()} is not the one that is named")
        key = (ref.digest, ref.chunk_list, ref.size_bytes)
        with self._lock:
            known = self._incoming.get(key)
        if known is not None:
            return known
        place = self._objects.place
        incoming = Incoming(ref.digest, ref.size_bytes, chunk_list, place.partial_path, self)
        if (ref.digest in found.here and self._is_here(incoming)) or (
            (found.whole_files is None or ref.digest.hex() in found.whole_files)
            and self._take_orphan(incoming)
        ):
            incoming.claim_all()
            return incoming
        if incoming.chunk_count > 1 and (
            found.partial_files is None
            or partial_name(ref.digest, ref.chunk_list) in found.partial_files
        ):
            with disk_errors(f"cannot read {incoming.path.name}"):
                incoming.resume(found.noted.get(key))
        with self._lock:
            known = self._incoming.get(key)
            if known is not None:
                return known  # another thread was as far first
            self._incoming[key] = incoming
            self._show_if_first(incoming)
        incoming.begin()
        return incoming

    def _show_if_first(self, incoming: Incoming) -> None:
        """Show a larger object unless another of its digest is. The lock is held."""
        if incoming.chunk_count > 1:
            shown = self._shown.setdefault(incoming.digest, incoming)
            incoming.is_shown = shown is incoming

    def _is_here(self, incoming: Incoming) -> bool:
        reader = self._objects.open_whole(incoming.digest)
        if reader is None:
            return False
        reader.close()
        if reader.size_bytes != incoming.size_bytes:
            raise HashMismatch(
                f"{incoming.digest.hex()} has {reader.size_bytes} bytes, not "
                f"{incoming.size_bytes}: the manifest that says so is false"
            )
        self._finish(incoming, None)
        return True

    def _take_orphan(self, incoming: Incoming) -> bool:
        """Take up a whole file that a crash left without its row in the index."""
        if incoming.size_bytes <= INLINE_LIMIT:
            return False
        path = self._objects.place.object_path(incoming.digest)
        try:
            if path.stat().st_size != incoming.size_bytes:
                return False
            if hash_file(path, incoming.size_bytes) != incoming.digest:
                return False
        except OSError:
            return False
        if incoming.chunk_list:
            self._objects.put_blob(incoming.chunk_list)
        self._finish_when_kept(incoming, self._objects.keep_found(_new_object(incoming)))
        return True

    # ---- noting what is proved

    def touched(self, incoming: Incoming) -> None:
        """Note that there is more of an object than the index says."""
        with self._lock:
            self._dirty.add(incoming)
            if self._incoming.get(_key_of(incoming)) is incoming:
                self._show_if_first(incoming)  # the one shown before may have ended since
            if time.monotonic() - self._flushed_at < FLUSH_INTERVAL_S:
                return
            self._flushed_at = time.monotonic()
            dirty, self._dirty = self._dirty, set()
        self._submit_bitmaps(dirty)

    def flush(self) -> None:
        """Bring the index up to date with every bitmap."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        if dirty:
            self._submit_bitmaps(dirty).result()

    def _submit_bitmaps(self, dirty: set[Incoming]) -> Future[None]:
        boot = self._objects.boot
        return self._objects.index.submit(lambda db: _merge_bitmaps(db, dirty, boot))

    # ---- ending

    def proved(self, incoming: Incoming, data: memoryview | None) -> None:
        """Take over an object whose last chunk was proved."""
        try:
            if data is None:
                self._hand_to_finisher(incoming)
            else:
                kept = self._objects.keep_bytes(_new_object(incoming), data)
                self._finish_when_kept(incoming, kept)
        except BaseException as error:
            self._finish(incoming, error)
            raise

    def keep_small(
        self,
        objects: Sequence[tuple[bytes, bytes]],
        owner: Wanted,
        settle: Callable[[BaseException | None], None],
    ) -> None:
        """Keep verified objects that live in the index: one statement for many.

        `settle` hears how it ended, once. Other downloads that want the same hear too.

        Raises
        ------
        LocalError
            The store is closed, or too slow.
        """
        if not self._small_room.acquire(timeout=SMALL_WAIT_S):
            raise LocalError("the store does not take small tensors as fast as they come")

        def end(future: Future[None]) -> None:
            self._small_room.release()
            error = future.exception()
            settle(error)
            with self._lock:
                others = [each for each in self._downloads if each is not owner]
            for other in others if error is None else ():
                other.note_whole([digest for digest, _ in objects])

        try:
            kept = self._objects.keep_small(objects)
        except BaseException as error:
            self._small_room.release()
            settle(error)
            raise
        kept.add_done_callback(end)

    def vanished(self, incoming: Incoming) -> None:
        """Settle what it means that the file in progress is gone."""
        # Asked in a transaction: whoever moved the file has noted the object by then.
        here = self._objects.index.write(lambda db: present(db, [incoming.digest]))
        if (here and self._is_here(incoming)) or self._take_orphan(incoming):
            self._release(incoming)
            return
        error = StoreDamaged(f"{incoming.path} was removed while it was being written")
        self._finish(incoming, error)
        raise error

    def _hand_to_finisher(self, incoming: Incoming) -> None:
        try:
            self._finisher.submit(self._finish_file, incoming)
        except RuntimeError as error:  # it was shut down
            raise LocalError("the store is closed") from error

    def _finish_file(self, incoming: Incoming) -> None:
        """Hash an object of which every chunk was proved, and keep it."""
        try:
            with contextlib.ExitStack() as stack:
                try:
                    descriptor = os.open(incoming.path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:  # another process was first
                    self.vanished(incoming)
                    return
                stack.callback(os.close, descriptor)
                if incoming.whole_digest(descriptor) != incoming.digest:
                    raise self._why_wrong(incoming, descriptor)
                os.ftruncate(descriptor, incoming.size_bytes)  # if more lay there before
                self._objects.put_blob(incoming.chunk_list)
                kept = self._objects.keep_file(
                    incoming.path, _new_object(incoming), descriptor=descriptor
                )
                held = stack.pop_all()
            kept.add_done_callback(lambda _: held.close())
            self._finish_when_kept(incoming, kept)
        except OSError as error:
            problem = LocalError(f"cannot read {incoming.path} back: {error.strerror or error}")
            problem.__cause__ = error
            self._finish(incoming, problem)
        except Exception as error:
            self._finish(incoming, error)

    def _why_wrong(self, incoming: Incoming, descriptor: int) -> StoreDamaged | HashMismatch:
        bad = incoming.recheck(descriptor)
        if not bad:
            remove_file(incoming.path)
        self._release(incoming)  # from here on nobody notes its bitmap again
        self._objects.index.write(
            many(
                "DELETE FROM partials WHERE digest=? AND chunk_list=?",
                [(incoming.digest, incoming.chunk_list_digest)],
            )
        )
        if bad:
            return StoreDamaged(
                f"{incoming.path}: {bad} chunks were changed on the disk after they were "
                "verified; fetch again to replace them"
            )
        return HashMismatch(
            f"{incoming.digest.hex()}: every chunk matched its list, but the whole does "
            "not match its digest: the manifest that names this list is false"
        )

    def _finish_when_kept(self, incoming: Incoming, kept: Future[None]) -> None:
        kept.add_done_callback(lambda future: self._finish(incoming, future.exception()))

    def _finish(self, incoming: Incoming, error: BaseException | None) -> None:
        self._release(incoming)
        incoming.finish(error)

    def _release(self, incoming: Incoming) -> None:
        """Let the next `receive` of this object begin anew."""
        key = _key_of(incoming)
        with self._lock:
            self._dirty.discard(incoming)
            if self._incoming.get(key) is incoming:
                del self._incoming[key]
            if self._shown.get(incoming.digest) is incoming:
                del self._shown[incoming.digest]
            incoming.is_shown = False


def _key_of(incoming: Incoming) -> _Key:
    return incoming.digest, incoming.chunk_list_digest, incoming.size_bytes


def _new_object(incoming: Incoming) -> NewObject:
    return NewObject(
        incoming.digest,
        incoming.size_bytes,
        incoming.chunk_list_digest,
        head_of(incoming.digest, incoming.chunk_list),
    )


def _merge_bitmaps(db: sqlite3.Connection, dirty: set[Incoming], boot: str) -> None:
    """Write bitmaps as they are now, together with what other processes proved."""
    whole = present(db, [incoming.digest for incoming in dirty])
    for incoming in sorted(dirty, key=lambda each: not each.is_shown):  # first here as well
        if incoming.digest in whole or incoming.finished.done():
            continue
        key = (incoming.digest, incoming.chunk_list_digest)
        proved = incoming.proved()
        old = db.execute(
            "SELECT bitmap FROM partials WHERE digest=? AND chunk_list=? AND size=? AND boot=?",
            (*key, incoming.size_bytes, boot),
        ).fetchone()
        db.execute(
            # Not REPLACE: a row that keeps its place keeps being the one that is shown.
            "INSERT INTO partials(digest, chunk_list, size, bitmap, boot) VALUES(?,?,?,?,?) "
            "ON CONFLICT(digest, chunk_list) DO UPDATE "
            "SET size=excluded.size, bitmap=excluded.bitmap, boot=excluded.boot",
            (*key, incoming.size_bytes, bitmap.union(old[0], proved) if old else proved, boot),
        )
