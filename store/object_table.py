"""The objects of a model in columns, and the named tensors of a file as encoded bytes.

A model of 100,000 tensors takes half a kilobyte of Python objects for each of them if they
are all kept as tuples: 50 MB, most of which nobody looks at. Here an object takes 73 bytes,
and a tensor what its encoding takes; the tuples are made when somebody asks for one.

Both are sequences that equal a tuple of the same items. No I/O.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Generic, NamedTuple, TypeVar, overload

import msgpack

from .digest import DIGEST_SIZE

_T = TypeVar("_T")
_NO_LIST = bytes(DIGEST_SIZE)
_KEY_BYTES = 8
_BLOCK_ROWS = 1024


class ObjectRef(NamedTuple):
    """A tensor or blob.

    Attributes
    ----------
    digest : bytes
        BLAKE3-256 of the bytes.
    size_bytes : int
        Length in bytes.
    chunk_list : bytes
        Digest of the chunk list for an object of more than one chunk, else empty.
    """

    digest: bytes
    size_bytes: int
    chunk_list: bytes


class _CompactRows(Sequence[_T], Generic[_T]):
    """What both kinds of rows have of a tuple."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | _CompactRows):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class ObjectTable(_CompactRows[ObjectRef]):
    """Objects sorted by digest, each once.

    Parameters
    ----------
    refs : iterable of ObjectRef
        The objects, already in order: digests of 32 bytes, and a chunk list of 32 or none.
    """

    __slots__ = ("_digests", "_has_list", "_keys", "_lists", "sizes")

    def __init__(self, refs: Iterable[ObjectRef] = ()) -> None:
        self.sizes = array("q")
        """Sizes in bytes, by index."""
        self._digests = bytearray()
        self._lists = bytearray()
        self._has_list = bytearray()
        self._keys: array[int] | None = None
        self.extend(list(refs))

    def extend(self, refs: Sequence[ObjectRef]) -> None:
        """Add objects behind the others; only while the table is being made."""
        self._digests += b"".join([ref[0] for ref in refs])
        self.sizes.extend([ref[1] for ref in refs])
        self._lists += b"".join([ref[2] or _NO_LIST for ref in refs])
        self._has_list += bytes([bool(ref[2]) for ref in refs])

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, index: int) -> bytes:
        """Return an object's digest."""
        return bytes(self._digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE])

    def digests(self, start: int, stop: int) -> list[bytes]:
        """Return the digests of a run of objects."""
        together = bytes(self._digests[start * DIGEST_SIZE : stop * DIGEST_SIZE])
        return [together[at : at + DIGEST_SIZE] for at in range(0, len(together), DIGEST_SIZE)]

    def chunk_list(self, index: int) -> bytes:
        """Return the digest of an object's chunk list; empty for one chunk."""
        if not self._has_list[index]:
            return b""
        return bytes(self._lists[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE])

    @overload
    def __getitem__(self, index: int) -> ObjectRef: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ObjectRef, ...]: ...
    def __getitem__(self, index: int | slice) -> ObjectRef | tuple[ObjectRef, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return tuple([self[i] for i in range(start, stop, step)])
            return tuple(self._rows(start, stop))
        size_bytes = self.sizes[index]  # raises what a tuple does
        if index < 0:
            index += len(self)
        return ObjectRef(self.digest(index), size_bytes, self.chunk_list(index))

    def _rows(self, start: int, stop: int) -> Iterator[ObjectRef]:
        return map(ObjectRef._make, self.rows(start, stop))

    def rows(self, start: int, stop: int) -> Iterator[tuple[bytes, int, bytes]]:
        """Return a run of objects as plain tuples, for whoever only packs them."""
        lists = bytes(self._lists[start * DIGEST_SIZE : stop * DIGEST_SIZE])
        cuts = range(0, len(lists), DIGEST_SIZE)
        return zip(
            self.digests(start, stop),
            self.sizes[start:stop],
            [
                lists[cut : cut + DIGEST_SIZE] if has_list else b""
                for cut, has_list in zip(cuts, self._has_list[start:stop], strict=True)
            ]
            if any(self._has_list[start:stop])
            else repeat(b"", stop - start),
            strict=True,
        )

    def __iter__(self) -> Iterator[ObjectRef]:
        for start in range(0, len(self), _BLOCK_ROWS):
            yield from self._rows(start, min(start + _BLOCK_ROWS, len(self)))

    def find(self, digest: bytes) -> int:
        """Return the index of the object with a digest, -1 if there is none."""
        if self._keys is None:
            self._keys = _keys_of(self._digests)
        key = int.from_bytes(digest[:_KEY_BYTES], "big")
        index = bisect_left(self._keys, key)
        while index < len(self._keys) and self._keys[index] == key:
            if self.digest(index) == digest:
                return index
            index += 1  # two digests that begin alike: somebody took the trouble
        return -1


def _keys_of(digests: bytes | bytearray) -> array[int]:
    """Return the first eight bytes of each digest as a number that sorts alike."""
    step = DIGEST_SIZE * _BLOCK_ROWS
    keys = array("Q")
    for start in range(0, len(digests), step):
        part = digests[start : start + step]
        keys.frombytes(
            b"".join([part[i : i + _KEY_BYTES] for i in range(0, len(part), DIGEST_SIZE)])
        )
    if sys.byteorder == "little":
        keys.byteswap()
    return keys


class EncodedRows(_CompactRows[_T]):
    """Rows that stay encoded, one msgpack array after the other, until they are read.

    Reading all costs a microsecond each; reading a single one as much as all before it.

    Parameters
    ----------
    data : bytes
        What holds them.
    start, stop : int
        Where they lie in it.
    count : int
        How many there are.
    unpacker : callable
        Makes an unpacker that takes nothing larger than a row may be.
    make : callable
        Makes a row of what was unpacked, or raises what is wrong with it.
    """

    __slots__ = ("_count", "_data", "_start", "_stop", "_unpacker", "make")

    def __init__(
        self,
        data: bytes,
        start: int,
        stop: int,
        count: int,
        unpacker: Callable[[], msgpack.Unpacker],
        make: Callable[[Any], _T],
    ) -> None:
        self._data = data
        self._start = start
        self._stop = stop
        self._count = count
        self._unpacker = unpacker
        self.make = make

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_T]:
        return map(self.make, self.unpacked())

    def unpacked(self) -> Iterator[Any]:
        """Yield the rows as msgpack gives them, before anything is made of them."""
        unpacker = self._unpacker()
        unpacker.feed(memoryview(self._data)[self._start : self._stop])
        unpack = unpacker.unpack
        for _ in range(self._count):
            yield unpack()

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[_T, ...]: ...
    def __getitem__(self, index: int | slice) -> _T | tuple[_T, ...]:
        return tuple(self)[index]
