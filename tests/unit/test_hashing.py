"""Hashing and copying ranges of files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorswarm.store.digest import CHUNK_SIZE, digest_of
from tensorswarm.store.errors import NoRoom
from tensorswarm.store.hashing import RangeHasher
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.place import COPY_BUFFER_SIZE
from tests.support.store_world import (
    MIB,
    random_bytes,
    ref_of,
)

SIZES = [0, 1, 100, INLINE_LIMIT, INLINE_LIMIT + 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * MIB + 5]
LARGE_SIZES = [COPY_BUFFER_SIZE, COPY_BUFFER_SIZE + 1, 2 * COPY_BUFFER_SIZE + 4099]


@pytest.fixture
def hasher() -> Iterator[RangeHasher]:
    opened = RangeHasher()
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [*SIZES, *LARGE_SIZES, COPY_BUFFER_SIZE * 3])
def test_scan_of_a_range(hasher: RangeHasher, tmp_path: Path, size: int) -> None:
    data = random_bytes(size, 5)
    (tmp_path / "f").write_bytes(b"before" + data + b"after")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    try:
        digest, chunk_list = hasher.scan(descriptor, 6, size, target)
        assert (digest, size, digest_of(chunk_list) if chunk_list else b"") == ref_of(data)
        assert hasher.scan(descriptor, 6, size) == (digest, chunk_list)
        assert (tmp_path / "copy").read_bytes() == data
        with pytest.raises(OSError):
            hasher.scan(descriptor, 6, size + 100)
    finally:
        os.close(descriptor)
        os.close(target)


def test_scan_describes_what_was_written(
    hasher: RangeHasher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is of the copy's bytes, even if the source has others by then."""
    (tmp_path / "f").write_bytes(random_bytes(3 * COPY_BUFFER_SIZE, 5))
    descriptor = os.open(tmp_path / "f", os.O_RDWR)
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    real = os.pwrite

    def meddling(fd: int, data: memoryview, offset: int) -> int:
        real(descriptor, random_bytes(1000, offset), (offset + 12345) % (3 * COPY_BUFFER_SIZE))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", meddling)
    try:
        digest, chunk_list = hasher.scan(descriptor, 0, 3 * COPY_BUFFER_SIZE, target)
        written = (tmp_path / "copy").read_bytes()
        assert (digest, len(written), digest_of(chunk_list)) == ref_of(written)
    finally:
        os.close(descriptor)
        os.close(target)


def test_scan_that_cannot_write(
    hasher: RangeHasher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(bytes(3 * COPY_BUFFER_SIZE))
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    try:
        with pytest.raises(NoRoom):
            hasher.scan(descriptor, 0, 3 * COPY_BUFFER_SIZE, descriptor)
    finally:
        os.close(descriptor)


RANGES = [(6, 3 * MIB + 5), (6 + 3 * MIB + 5, 100), (7, MIB), (0, 2 * COPY_BUFFER_SIZE + 1)]


def test_ranges_hashed_ahead_are_as_those_hashed_when_asked(
    hasher: RangeHasher, tmp_path: Path
) -> None:
    data = random_bytes(3 * COPY_BUFFER_SIZE, 6)
    (tmp_path / "f").write_bytes(data)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        with hasher.ahead(descriptor, RANGES):
            found = [hasher.scan(descriptor, *each) for each in RANGES]
        for (offset, size), (digest, chunk_list) in zip(RANGES, found, strict=True):
            ref = ref_of(data[offset : offset + size])
            assert (digest, digest_of(chunk_list) if chunk_list else b"") == (ref[0], ref[2])
    finally:
        os.close(descriptor)


def test_ranges_hashed_ahead_in_vain_do_no_harm(hasher: RangeHasher, tmp_path: Path) -> None:
    """Not asked for, asked for in another order, cut short by an error, beyond the end."""
    data = random_bytes(4 * MIB, 7)
    (tmp_path / "f").write_bytes(data)
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    many = [(offset, MIB + 1) for offset in range(0, 3 * MIB, 1000)]
    try:
        with pytest.raises(KeyError), hasher.ahead(descriptor, many):
            hasher.scan(descriptor, *many[-1])
            raise KeyError
        with hasher.ahead(descriptor, [(0, 4 * MIB), (3 * MIB, 2 * MIB)]), pytest.raises(OSError):
            hasher.scan(descriptor, 3 * MIB, 2 * MIB)
        assert hasher.scan(descriptor, 0, 4 * MIB)[0] == digest_of(data)
    finally:
        os.close(descriptor)
