"""One object on its way in: chunks in any order, from anywhere, true or false."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tensorswarm.store import bitmap
from tensorswarm.store.digest import CHUNK_SIZE, chunk_list_of, digest_of
from tensorswarm.store.errors import BadInput, LocalError, NoRoom, StoreDamaged
from tensorswarm.store.incoming import ChunkMismatch, Incoming
from tests.support.store_world import chunk_of, random_bytes, shuffled

DATA = random_bytes(3 * CHUNK_SIZE + 5)
COUNT = 4


class Desk:
    """A keeper that notes what it was told."""

    def __init__(self) -> None:
        self.proved_calls: list[bytes | None] = []
        self.touched_count = 0
        self.whole_elsewhere = False

    def proved(self, incoming: Incoming, data: memoryview | None) -> None:
        self.proved_calls.append(None if data is None else bytes(data))

    def touched(self, incoming: Incoming) -> None:
        self.touched_count += 1

    def vanished(self, incoming: Incoming) -> None:
        error = None if self.whole_elsewhere else StoreDamaged("gone")
        incoming.finish(error)
        if error is not None:
            raise error


@pytest.fixture
def desk() -> Desk:
    return Desk()


def incoming_of(data: bytes, path: Path, desk: Desk) -> Incoming:
    return Incoming(digest_of(data), len(data), chunk_list_of(data), path, desk)


@pytest.fixture
def incoming(tmp_path: Path, desk: Desk) -> Incoming:
    return incoming_of(DATA, tmp_path / "file", desk)


@pytest.mark.parametrize("seed", range(3))
def test_any_order(incoming: Incoming, desk: Desk, seed: int) -> None:
    for done, index in enumerate(shuffled(COUNT, seed), 1):
        assert incoming.is_missing(index)
        assert incoming.write_chunk(index, chunk_of(DATA, index)) is True
        assert not incoming.is_missing(index)
        assert bitmap.count_set(incoming.proved()) == done
        assert desk.proved_calls == ([None] if done == COUNT else [])
    assert incoming.path.read_bytes() == DATA
    assert desk.touched_count == COUNT - 1
    assert not incoming.finished.done(), "only the keeper says that it is finished"


def test_a_chunk_that_is_here_changes_nothing(incoming: Incoming, desk: Desk) -> None:
    assert incoming.write_chunk(1, chunk_of(DATA, 1)) is True
    assert incoming.write_chunk(1, chunk_of(DATA, 1)) is False
    assert desk.touched_count == 1


@pytest.mark.parametrize(
    ("index", "data"),
    [
        (0, chunk_of(DATA, 1)),
        (0, bytes(CHUNK_SIZE)),
        (0, chunk_of(DATA, 0)[:-1]),
        (0, memoryview(DATA)[: CHUNK_SIZE + 1]),
        (0, b""),
        (3, chunk_of(DATA, 3)[:4]),
        (3, chunk_of(DATA, 0)),
        (4, b""),
        (4, chunk_of(DATA, 0)),
        (-1, chunk_of(DATA, 3)),
        (1 << 60, b""),
    ],
)
def test_false_chunk_leaves_no_trace(
    incoming: Incoming, desk: Desk, index: int, data: bytes | memoryview
) -> None:
    with pytest.raises(ChunkMismatch):
        incoming.write_chunk(index, memoryview(data))
    assert not incoming.path.exists()
    assert not any(incoming.proved())
    assert desk.touched_count == 0


def test_end_that_fits_chunks_exactly(tmp_path: Path, desk: Desk) -> None:
    """An empty chunk after the end would have the right length, and must not be taken."""
    data = random_bytes(2 * CHUNK_SIZE)
    incoming = incoming_of(data, tmp_path / "file", desk)
    with pytest.raises(ChunkMismatch):
        incoming.write_chunk(2, memoryview(b""))


def test_missing_bytes(incoming: Incoming) -> None:
    assert incoming.missing_bytes() == len(DATA)
    incoming.write_chunk(3, chunk_of(DATA, 3))
    assert incoming.missing_bytes() == 3 * CHUNK_SIZE
    incoming.write_chunk(0, chunk_of(DATA, 0))
    assert incoming.missing_bytes() == 2 * CHUNK_SIZE
    incoming.claim_all()
    assert incoming.missing_bytes() == 0


@pytest.mark.parametrize("size", [1, 40, CHUNK_SIZE])
def test_single_chunk_makes_no_file(tmp_path: Path, desk: Desk, size: int) -> None:
    data = random_bytes(size)
    incoming = incoming_of(data, tmp_path / "file", desk)
    assert incoming.missing_bytes() == size
    with pytest.raises(ChunkMismatch):
        incoming.write_chunk(0, memoryview(bytes(size)))
    assert incoming.write_chunk(0, memoryview(data)) is True
    assert desk.proved_calls == [data]
    assert not incoming.path.exists()


@pytest.mark.parametrize(
    ("size", "chunk_list"),
    [
        (0, b""),
        (CHUNK_SIZE + 1, b""),
        (CHUNK_SIZE + 1, bytes(32)),
        (CHUNK_SIZE + 1, bytes(63)),
        (CHUNK_SIZE + 1, bytes(96)),
        (-1, b""),
    ],
)
def test_chunk_list_that_does_not_fit(
    tmp_path: Path, desk: Desk, size: int, chunk_list: bytes
) -> None:
    with pytest.raises(BadInput):
        Incoming(bytes(32), size, chunk_list, tmp_path / "file", desk)


def test_many_threads_with_the_same_chunks(tmp_path: Path, desk: Desk) -> None:
    """Each chunk is proved once, the object once, whoever wins."""
    data = random_bytes(24 * CHUNK_SIZE + 1)
    incoming = incoming_of(data, tmp_path / "file", desk)
    order = shuffled(25, 1) + shuffled(25, 2) + shuffled(25, 3)
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda i: incoming.write_chunk(i, chunk_of(data, i)), order))
    assert kept.count(True) == 25
    assert desk.proved_calls == [None]
    assert incoming.path.read_bytes() == data


def test_disk_full_claims_nothing(incoming: Incoming, monkeypatch: pytest.MonkeyPatch) -> None:
    incoming.write_chunk(0, chunk_of(DATA, 0))
    real = os.pwrite

    def half(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= 2 * CHUNK_SIZE + 1000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(NoRoom):
        incoming.write_chunk(2, chunk_of(DATA, 2))
    assert incoming.is_missing(2)
    monkeypatch.undo()
    for index in (1, 2, 3):
        assert incoming.write_chunk(index, chunk_of(DATA, index))
    assert incoming.path.read_bytes() == DATA


def test_other_disk_error_is_a_local_error(tmp_path: Path, desk: Desk) -> None:
    incoming = incoming_of(DATA, tmp_path / "missing" / "file", desk)
    with pytest.raises(LocalError, match="cannot write"):
        incoming.write_chunk(0, chunk_of(DATA, 0))


def test_file_moved_by_another_process(incoming: Incoming, desk: Desk) -> None:
    """The file is not made a second time, with a hole in place of what was there before."""
    desk.whole_elsewhere = True
    incoming.write_chunk(0, chunk_of(DATA, 0))
    incoming.path.rename(incoming.path.with_name("whole"))
    assert incoming.write_chunk(1, chunk_of(DATA, 1)) is True
    assert incoming.finished.done()
    with pytest.raises(ChunkMismatch):
        incoming.write_chunk(2, chunk_of(DATA, 1))
    assert incoming.write_chunk(2, chunk_of(DATA, 2)) is True, "the planner waits for each"
    assert incoming.write_chunk(3, chunk_of(DATA, 3)) is True
    assert not incoming.path.exists()
    assert desk.proved_calls == []


def test_file_taken_away(incoming: Incoming, desk: Desk) -> None:
    incoming.write_chunk(0, chunk_of(DATA, 0))
    incoming.path.unlink()
    for index in (1, 2):
        with pytest.raises(StoreDamaged):
            incoming.write_chunk(index, chunk_of(DATA, index))
    assert not incoming.path.exists()


def test_finish_counts_once(incoming: Incoming) -> None:
    threads = [threading.Thread(target=incoming.finish, args=(None,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    incoming.finish(LocalError("too late"))
    assert incoming.finished.result(0) is None


# ---- resuming


def lay(path: Path, *chunks: int) -> None:
    """Write some chunks of DATA to a sparse file, as an earlier process did."""
    with path.open("wb") as file:
        for index in chunks:
            file.seek(index * CHUNK_SIZE)
            file.write(chunk_of(DATA, index))


def missing(incoming: Incoming) -> list[int]:
    return list(bitmap.clear_indices(incoming.proved(), incoming.chunk_count))


def test_resume_without_a_file(incoming: Incoming) -> None:
    incoming.resume(b"\x0f")
    assert missing(incoming) == [0, 1, 2, 3], "a bitmap without a file proves nothing"


def test_resume_finds_chunks_nobody_claimed(incoming: Incoming, desk: Desk) -> None:
    lay(incoming.path, 1, 3)
    incoming.resume(None)
    assert missing(incoming) == [0, 2]
    incoming.begin()
    assert desk.proved_calls == []


def test_resume_believes_no_bytes(incoming: Incoming) -> None:
    lay(incoming.path, 0, 1, 2, 3)
    with incoming.path.open("r+b") as file:
        file.seek(CHUNK_SIZE + 7)
        file.write(b"torn")
        file.truncate(3 * CHUNK_SIZE + 4)
    incoming.resume(None)
    assert missing(incoming) == [1, 3]


def test_resume_trusts_a_bitmap_only_where_there_is_data(incoming: Incoming) -> None:
    lay(incoming.path, 2)
    incoming.resume(b"\x0e")
    assert 2 not in missing(incoming)
    assert {0, 1, 3} <= set(missing(incoming)), "a hole holds no chunk, whatever a bitmap says"


def test_resume_of_more_than_the_object(incoming: Incoming) -> None:
    incoming.path.write_bytes(DATA + bytes(5 * CHUNK_SIZE))
    incoming.resume(None)
    assert missing(incoming) == []


def test_begin_hands_over_what_was_complete(incoming: Incoming, desk: Desk) -> None:
    lay(incoming.path, 0, 1, 2, 3)
    incoming.resume(None)
    assert desk.proved_calls == []
    incoming.begin()
    assert desk.proved_calls == [None]


# ---- the digest of the whole


@pytest.fixture
def whole(incoming: Incoming) -> Iterator[int]:
    """Return the open file of an object of which chunks 0 to 2 were written in order."""
    for index in range(3):
        incoming.write_chunk(index, chunk_of(DATA, index))
    descriptor = os.open(incoming.path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def test_recheck_gives_up_what_changed(incoming: Incoming, whole: int) -> None:
    incoming.write_chunk(3, chunk_of(DATA, 3))
    assert incoming.recheck(whole) == 0
    os.pwrite(whole, b"rotten", 2 * CHUNK_SIZE)
    assert incoming.recheck(whole) == 1
    assert missing(incoming) == [2]
    assert incoming.missing_bytes() == CHUNK_SIZE


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 3, 2], [1, 0, 2, 3]])
def test_whole_digest(incoming: Incoming, order: list[int]) -> None:
    for index in order:
        incoming.write_chunk(index, chunk_of(DATA, index))
    with incoming.path.open("rb") as file:
        assert incoming.whole_digest(file.fileno()) == digest_of(DATA)
        assert incoming.whole_digest(file.fileno()) == digest_of(DATA)


def test_whole_digest_reads_only_what_came_out_of_order(
    incoming: Incoming, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    incoming.write_chunk(3, chunk_of(DATA, 3))
    assert incoming.whole_digest(whole) == digest_of(DATA)
    assert read == []


def test_whole_digest_of_another_file(incoming: Incoming, whole: int, tmp_path: Path) -> None:
    """What was hashed on its way into the file counts only if it is in the file."""
    incoming.write_chunk(3, chunk_of(DATA, 3))
    other = tmp_path / "other"
    lay(other, 1, 2, 3)
    with other.open("rb") as file:
        assert incoming.whole_digest(file.fileno()) != digest_of(DATA)
    lay(other, 0, 1)
    with other.open("rb") as file, pytest.raises(OSError):
        incoming.whole_digest(file.fileno())
    assert incoming.whole_digest(whole) == digest_of(DATA)


def test_whole_digest_of_a_file_somebody_else_made(tmp_path: Path, desk: Desk) -> None:
    """Whether its holes can be told is not known, so everything is read."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    incoming = incoming_of(DATA, path, desk)
    for index in range(COUNT):
        incoming.write_chunk(index, chunk_of(DATA, index))
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"rotten", 0)
        assert incoming.whole_digest(file.fileno()) != digest_of(DATA)


# ---- bitmaps


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 65])
def test_bitmaps(count: int) -> None:
    every = bitmap.full(count)
    assert bitmap.count_set(every) == count
    assert len(every) == len(bitmap.empty(count))
    assert list(bitmap.clear_indices(bitmap.empty(count), count)) == list(range(count))
    assert list(bitmap.clear_indices(every, count)) == []
    some = bitmap.empty(count)
    for index in range(0, count, 3):
        bitmap.set_bit(some, index)
    assert [i for i in range(count) if bitmap.is_set(some, i)] == list(range(0, count, 3))
    assert bitmap.union(some, every) == bytes(every)
    assert bitmap.union(some, bitmap.empty(count)) == bytes(some)
    for index in range(0, count, 3):
        bitmap.clear_bit(some, index)
    assert not any(some)
