"""The objects that one download brings into a store, with state made when it is needed.

A download may want 100,000 objects of a million chunks. What is known of all of them is the
manifest's own table, and a byte of state each. An `Incoming`, with its bitmap, its chunk list
and its file, is made when the first chunk of an object comes, and let go when the object is
in the index. A small object, one that lives in the index, never has one: it is verified
against its digest and kept together with those that came with it.

Rules
- Before an object of several chunks can be received it is *prepared*: its chunk list is
  given, and it is looked up what is here of it already. `unready` are those that were not.
- What another process or download has made whole meanwhile is found when it is prepared; of
  small objects, also when another download of this store keeps them.
- The first failure of our own side, or of an object as a whole, is what `wait_ended` raises.

Objects are named by their position among those wanted. Thread-safe.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from operator import eq
from typing import TYPE_CHECKING, NamedTuple, overload

from . import bitmap
from .digest import CHUNK_SIZE, DIGEST_SIZE, chunk_count, digest_of
from .errors import BadInput
from .incoming import ChunkMismatch, Finished, Incoming, Kept
from .object_table import ObjectRef, ObjectTable
from .objects import INLINE_LIMIT
from .records import head_of
from .runs import runs_in

if TYPE_CHECKING:
    from .receiving import Receiver

_IDLE, _READY, _OPEN, _KEEPING, _ENDED, _FAILED = range(6)


class Holding(NamedTuple):
    """What the store has of one object.

    Attributes
    ----------
    size_bytes : int
        The object's size.
    proved : bytes or None
        Bitmap of the proved chunks; None when it has all of it.
    chunk_list : bytes
        Digest of the chunk list that those chunks were proved against; empty when it
        has all of it.
    """

    size_bytes: int
    proved: bytes | None
    chunk_list: bytes


class Wanted:
    """Objects to be received. Made by `Store.want`.

    Parameters
    ----------
    receiver : Receiver
        Where they go.
    table : ObjectTable
        Objects, of which some are wanted.
    indices : sequence of int
        Which ones, in ascending order; none of them empty.

    Attributes
    ----------
    digests : sequence of bytes
        Their digests, made when they are looked at.
    table : ObjectTable
        The objects of which these are some.
    on_whole : callable or None
        Hears of each object that is whole, by its digest, in any thread.
    whole_listeners : list of callable
        Hear the same by position, of several at once: from now on `holding` tells of them.
    """

    def __init__(self, receiver: Receiver, table: ObjectTable, indices: Sequence[int]) -> None:
        self._receiver = receiver
        self.table = self._table = table
        self._indices = indices
        self.digests: Sequence[bytes] = _Digests(self)
        self.on_whole: Callable[[bytes], None] | None = None
        self.whole_listeners: list[Callable[[Sequence[int]], None]] = []
        self._states = bytearray([_READY if size <= CHUNK_SIZE else _IDLE for size in self.sizes()])
        self._begun: frozenset[bytes] = frozenset()
        self._lists: dict[int, bytes] = {}  # of those prepared and not begun
        self._open: dict[int, Incoming] = {}
        self._left = len(indices)
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.RLock())
        receiver.join(self)

    @classmethod
    def of(cls, receiver: Receiver, incoming: Sequence[Incoming]) -> Wanted:
        """Return the wanted objects of which these have begun already."""
        by_digest = sorted(incoming, key=lambda each: each.digest)
        refs = [ObjectRef(e.digest, e.size_bytes, e.chunk_list_digest) for e in by_digest]
        wanted = cls(receiver, ObjectTable(refs), range(len(refs)))
        for index, each in enumerate(by_digest):
            wanted._take_up(index, each)
        return wanted

    # ---- what is wanted

    def __len__(self) -> int:
        return len(self._indices)

    def digest(self, index: int) -> bytes:
        """Return an object's digest."""
        return self._table.digest(self._indices[index])

    def size_bytes(self, index: int) -> int:
        """Return an object's size."""
        return self._table.sizes[self._indices[index]]

    def chunk_list_digest(self, index: int) -> bytes:
        """Return the digest of an object's chunk list; empty for one chunk."""
        return self._table.chunk_list(self._indices[index])

    def many(self, indices: Sequence[int]) -> tuple[Sequence[bytes], Sequence[int]]:
        """Return digests and sizes of objects; those that lie side by side in one go."""
        places = [self._indices[index] for index in indices]
        digests: list[bytes] = []
        sizes: list[int] = []
        for start, stop in runs_in(places):
            first, end = places[start], places[stop - 1] + 1
            digests += self._table.digests(first, end)
            sizes += self._table.sizes[first:end]
        return digests, sizes

    def ref(self, index: int) -> ObjectRef:
        """Return an object's digest, size, and chunk list's digest."""
        return self._table[self._indices[index]]

    def refs(self, indices: Sequence[int]) -> list[ObjectRef]:
        """Return what `ref` does for many; those that lie side by side in one go."""
        places = [self._indices[index] for index in indices]
        found: list[ObjectRef] = []
        for start, stop in runs_in(places):
            found += self._table[places[start] : places[stop - 1] + 1]
        return found

    def sizes(self) -> array[int]:
        """Return all sizes in bytes."""
        sizes = self._table.sizes
        if len(self._indices) == len(sizes):
            return sizes[:]
        return array("q", [sizes[index] for index in self._indices])

    def find(self, digest: bytes) -> int:
        """Return the position of the object with this digest, -1 if it is not wanted."""
        place = self._table.find(digest)
        if place < 0:
            return -1
        position = bisect_left(self._indices, place)
        is_wanted = position < len(self._indices) and self._indices[position] == place
        return position if is_wanted else -1

    def place(self, index: int) -> int:
        """Return an object's index in the table."""
        return self._indices[index]

    def positions(self, start: int, stop: int) -> range:
        """Return the positions of those that are wanted among a run of the table's objects."""
        indices = self._indices
        return range(bisect_left(indices, start), bisect_left(indices, stop))

    def runs(self) -> list[tuple[int, int]]:
        """Return the runs of wanted objects in the table: the first, and the one after the last."""
        indices = self._indices
        return [(indices[start], indices[stop - 1] + 1) for start, stop in runs_in(indices)]

    # ---- before it comes

    def unready(self) -> list[int]:
        """Return the objects that have to be prepared."""
        return [index for index, state in enumerate(self._states) if state == _IDLE]

    def begun(self) -> list[int]:
        """Look which objects lie on the disk in part, or whole and unknown; return them."""
        found = {self.find(digest) for digest in self._receiver.begun_digests()} - {-1}
        self._begun = frozenset(map(self.digest, found))
        return sorted(found)

    def prepare(
        self, indices: Iterable[int], chunk_lists: Mapping[bytes, bytes]
    ) -> dict[int, bytes]:
        """Make objects ready to be received, with what is here of them already.

        Parameters
        ----------
        indices : iterable of int
            The objects; those that are ready are passed over.
        chunk_lists : mapping of bytes to bytes
            The chunk lists by their digests; at least those of the objects.

        Returns
        -------
        dict of int to bytes
            Bitmaps of what is proved already, where something is.

        Raises
        ------
        BadInput
            A chunk list is missing, or is not the one that is named.
        HashMismatch
            An object is here, and has another size.
        """
        todo = [index for index in indices if self._states[index] in (_IDLE, _READY)]
        refs = self.refs(todo)
        lists = [self._list_of(ref, chunk_lists) for ref in refs]
        begun = self._receiver.take_up(list(zip(refs, lists, strict=True)), self._begun)
        with self._changed:
            for index, incoming, chunk_list in zip(todo, begun, lists, strict=True):
                if incoming is None and self._states[index] in (_IDLE, _READY):
                    if chunk_list:
                        self._lists[index] = chunk_list
                    self._states[index] = _READY
        for index, incoming in zip(todo, begun, strict=True):
            if incoming is not None:
                self._take_up(index, incoming)
        self._copy_from_relatives(todo, refs, lists)
        proved = {index: self.proved(index) for index in todo if self._states[index] != _READY}
        return {index: bits for index, bits in proved.items() if any(bits)}

    def _list_of(self, ref: ObjectRef, chunk_lists: Mapping[bytes, bytes]) -> bytes:
        if not ref.chunk_list:
            return b""
        data = chunk_lists.get(ref.chunk_list, b"")
        if digest_of(data) != ref.chunk_list:
            raise BadInput(f"the chunk list of {ref.digest.hex()} is not the one that is named")
        if len(data) != DIGEST_SIZE * chunk_count(ref.size_bytes):
            raise BadInput(
                f"the chunk list of {ref.digest.hex()} has {len(data)} bytes, "
                f"{chunk_count(ref.size_bytes)} chunks need "
                f"{DIGEST_SIZE * chunk_count(ref.size_bytes)}"
            )
        return data

    def _copy_from_relatives(
        self, indices: Sequence[int], refs: Sequence[ObjectRef], lists: Sequence[bytes]
    ) -> None:
        """Fill objects with what older forms of them have, which begin with the same chunk."""
        heads = {
            index: head_of(ref.digest, chunk_list)
            for index, ref, chunk_list in zip(indices, refs, lists, strict=True)
            if chunk_list and (self._states[index] == _READY or self.missing_bytes(index))
        }
        relatives = self._receiver.relatives(set(heads.values()))
        found = [self._begin(index) for index, head in heads.items() if head in relatives]
        self._receiver.copy_from_relatives([each for each in found if each is not None])

    def _take_up(self, index: int, incoming: Incoming) -> None:
        with self._changed:
            self._open[index] = incoming
            self._states[index] = _OPEN
        incoming.finished.add_done_callback(lambda finished: self._incoming_ended(index, finished))

    def _begin(self, index: int) -> Incoming | None:
        """Return the state of an object that something comes of; None if it is not wanted."""
        with self._changed:
            if self._states[index] != _READY:
                return self._open.get(index)
            chunk_list = self._lists.pop(index, b"")
            incoming = self._receiver.begin(self.ref(index), chunk_list)
            self._take_up(index, incoming)
            return incoming

    # ---- how far it is

    def is_missing(self, index: int, chunk: int) -> bool:
        """Tell whether a chunk is still wanted, and could be verified if it came."""
        state = self._states[index]
        if state == _OPEN:
            incoming = self._open.get(index)
            return incoming is not None and incoming.is_missing(chunk)
        return state == _READY

    def are_missing(self, indices: Sequence[int]) -> list[bool]:
        """Tell of objects of one chunk each which are still wanted, as `is_missing` does."""
        states = self._states
        if not self._open:
            return [states[index] == _READY for index in indices]
        return [self.is_missing(index, 0) for index in indices]

    def missing_bytes(self, index: int) -> int:
        """Return how many bytes of an object are not proved yet."""
        incoming = self._open.get(index)
        if incoming is not None:
            return incoming.missing_bytes()
        return self.size_bytes(index) if self._states[index] in (_IDLE, _READY) else 0

    def all_missing_bytes(self) -> int:
        """Return how many bytes are not proved yet."""
        if not self._open and max(self._states, default=_IDLE) <= _READY:
            return sum(self.sizes())
        return sum(map(self.missing_bytes, range(len(self))))

    def proved(self, index: int) -> bytes:
        """Return the bitmap of an object's proved chunks."""
        incoming = self._open.get(index)
        if incoming is not None:
            return incoming.proved()
        count = chunk_count(self.size_bytes(index))
        is_idle = self._states[index] in (_IDLE, _READY)
        return bytes(bitmap.empty(count) if is_idle else bitmap.full(count))

    def begun_bitmaps(self) -> dict[int, bytes]:
        """Return the bitmaps of the objects of which something is proved."""
        begun = [index for index, state in enumerate(self._states) if state >= _OPEN]
        proved = {index: self.proved(index) for index in begun}
        return {index: bits for index, bits in proved.items() if any(bits)}

    def has_ended(self, index: int) -> bool:
        """Tell whether an object is whole and in the index, or never will be."""
        return self._states[index] >= _ENDED

    def holding(self, index: int) -> Holding | None:
        """Return what others may be told of an object; None for nothing."""
        if self._states[index] == _ENDED:
            return Holding(self.size_bytes(index), None, b"")
        incoming = self._open.get(index)
        if incoming is None or not incoming.is_shown:
            return None
        return Holding(incoming.size_bytes, incoming.proved(), incoming.chunk_list_digest)

    # ---- what comes

    def write_chunk(self, index: int, chunk: int, data: memoryview) -> Kept:
        """Verify one chunk and keep it.

        Raises
        ------
        NoRoom, LocalError
            Our disk does not take it.
        """
        if self.size_bytes(index) <= INLINE_LIMIT and index not in self._open:
            return self.write_small([(index, data)])[0]
        incoming = self._begin(index)
        if incoming is None:
            return Kept.KNOWN
        try:
            is_new = incoming.write_chunk(chunk, data)
        except ChunkMismatch:
            return Kept.WRONG
        return Kept.NEW if is_new else Kept.KNOWN

    def write_small(self, parts: Sequence[tuple[int, bytes | memoryview]]) -> list[Kept]:
        """Verify whole small objects, and keep those that are right, in one go.

        Parameters
        ----------
        parts : sequence of (int, bytes or memoryview)
            Objects of at most `INLINE_LIMIT` bytes, and what came for each.

        Raises
        ------
        NoRoom, LocalError
            Our disk does not take them.
        """
        if self._open:  # somebody may have received one by itself before us
            begun = {index for index, _ in parts if index in self._open}
            if begun:
                return [
                    self.write_chunk(index, 0, memoryview(view))
                    if index in begun
                    else self.write_small([(index, view)])[0]
                    for index, view in parts
                ]
        indices = [index for index, _ in parts]
        came = [bytes(view) for _, view in parts]
        digests, sizes = self.many(indices)
        found = list(zip(map(digest_of, came), map(len, came), strict=True))
        named = list(zip(digests, sizes, strict=True))
        are_right = [True] * len(parts) if found == named else list(map(eq, found, named))
        outcomes = self._claim(indices, are_right)
        if outcomes.count(Kept.NEW) == len(parts):
            kept, objects = indices, list(zip(digests, came, strict=True))
        else:
            new = [outcome is Kept.NEW for outcome in outcomes]
            kept = list(compress(indices, new))
            objects = list(compress(zip(digests, came, strict=True), new))
        if objects:
            self._receiver.keep_small(objects, self, lambda error: self._end(kept, error))
        return outcomes

    def _claim(self, indices: Sequence[int], are_right: Sequence[bool]) -> list[Kept]:
        """Note objects as being kept that are right, and not kept by somebody else."""
        states = self._states
        outcomes = []
        with self._changed:
            are_ready = {*map(states.__getitem__, indices)} == {_READY}
            if are_ready and all(are_right) and len(set(indices)) == len(indices):
                for index in indices:
                    states[index] = _KEEPING
                return [Kept.NEW] * len(indices)
            for index, is_right in zip(indices, are_right, strict=True):
                if not is_right:
                    outcomes.append(Kept.WRONG)
                elif states[index] != _READY:
                    outcomes.append(Kept.KNOWN)
                else:
                    states[index] = _KEEPING
                    outcomes.append(Kept.NEW)
        return outcomes

    # ---- the end

    def _incoming_ended(self, index: int, finished: Finished) -> None:
        self._end([index], finished.exception())

    def note_whole(self, digests: Iterable[bytes]) -> None:
        """Note objects that somebody else has brought into the store."""
        found = [index for index in map(self.find, digests) if index >= 0]
        with self._changed:
            self._end([index for index in found if self._states[index] in (_IDLE, _READY)], None)

    def _end(self, indices: Sequence[int], error: BaseException | None) -> None:
        with self._changed:
            state = _ENDED if error is None else _FAILED
            for index in indices:
                self._states[index] = state
            for index in indices if self._open or self._lists else ():
                self._open.pop(index, None)
                self._lists.pop(index, None)
            self._left -= len(indices)
            self._error = self._error or error
            if not self._left or self._error is not None:
                self._changed.notify_all()
        if error is not None:
            return
        for listener in self.whole_listeners:
            listener(indices)
        if self.on_whole is not None:
            for index in indices:
                self.on_whole(self.digest(index))

    def wait_ended(self) -> None:
        """Wait until every object is in the index; raise what went wrong with one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left or self._error is not None)
            if self._error is not None:
                raise self._error


class _Digests(Sequence[bytes]):
    """The digests of the objects that are wanted."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[bytes]:
        return map(self._wanted.digest, range(len(self._wanted)))

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self._wanted.digest(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._wanted.digest(index % len(self))
