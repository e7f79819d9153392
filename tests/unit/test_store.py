"""The store: what is visible, what survives, and what several users do to each other."""

from __future__ import annotations

import errno
import gc
import os
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST, chunk_list_of, digest_of
from tensorswarm.store.errors import BadInput, HashMismatch, LocalError, NoRoom, StoreDamaged
from tensorswarm.store.incoming import ChunkMismatch
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest, ManifestBuilder, ObjectRef
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.records import NewObject, head_of
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    MIB,
    assert_sound,
    begin,
    bytes_of,
    chunk_of,
    cut_the_power,
    edit_index,
    files_below,
    fill,
    random_bytes,
    random_model,
    receive_all,
    ref_of,
    rubbish,
    run_python,
    shuffled,
    small_disk,
    write_safetensors,
)

SMALL = random_bytes(100, 1)
MIDDLE = random_bytes(300_000, 2)
LARGE = random_bytes(3 * MIB + 17, 3)
EVERY_SIZE = [1, 100, INLINE_LIMIT, INLINE_LIMIT + 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17]


def model_of(*objects: bytes) -> Manifest:
    """Return a manifest of one verbatim file that is made of these objects."""
    builder = ManifestBuilder()
    builder.add_file("model.bin", "verbatim", [ref_of(data) for data in objects], [])
    return builder.build()


# ---- putting in and taking out


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_put_and_read(store_dir: Path, size: int) -> None:
    data = random_bytes(size)
    with Store(store_dir) as store:
        digest = store.put_blob(data)
        assert digest == digest_of(data)
        assert store.put_blob(data) == digest
        assert_sound(store)
    with Store(store_dir) as store:
        assert bytes_of(store, digest) == data
        assert store.get_blob(digest, size) == data
        assert store.get_blob(digest, size - 1) is None
        assert_sound(store)


@pytest.mark.parametrize("size", EVERY_SIZE)
def test_receive(store: Store, size: int) -> None:
    data = random_bytes(size)
    ref, incoming = ref_of(data), begin(store, data)
    assert not store.has(ref.digest)
    for index in shuffled(incoming.chunk_count, size):
        assert store.records([ref.digest]) == {}, "visible before it is whole"
        assert incoming.write_chunk(index, chunk_of(data, index))
    incoming.finished.result(DEADLINE_S)
    assert bytes_of(store, ref.digest) == data
    assert_sound(store)
    assert rubbish(store.root) == []


def test_every_store_has_the_empty_object(store: Store) -> None:
    assert store.has(EMPTY_DIGEST)
    assert store.put_blob(b"") == EMPTY_DIGEST
    assert store.get_blob(EMPTY_DIGEST, 0) == b""
    assert bytes_of(store, EMPTY_DIGEST) == b""
    assert store.holdings([EMPTY_DIGEST])[EMPTY_DIGEST].proved is None
    assert store.all_digests() == []
    with pytest.raises(BadInput):
        store.receive(ObjectRef(digest_of(b"x"), 0, b""), b"")


def test_read_outside_of_an_object(store: Store) -> None:
    for data in (SMALL, MIDDLE):
        reader = store.open_reader(store.put_blob(data))
        assert reader is not None
        assert reader.covers(0, len(data)) and reader.covers(len(data), 0)
        for offset, length in ((0, len(data) + 1), (len(data), 1), (-1, 1), (1, -1)):
            assert not reader.covers(offset, length)
        with pytest.raises(OSError):
            reader.read_into(len(data) - 1, memoryview(bytearray(2)))
        reader.close()
        reader.close()


def test_forget(store: Store) -> None:
    digests = [store.put_blob(data) for data in (SMALL, MIDDLE, LARGE)]
    reader = store.open_reader(digests[2])
    assert reader is not None
    before = store.change_count()
    store.forget(digests)
    assert store.change_count() != before
    assert not any(store.has(digest) for digest in digests)
    assert store.open_reader(digests[0]) is None
    assert files_below(store.root / "objects") == []
    copy = bytearray(len(LARGE))
    reader.read_into(0, memoryview(copy))  # who has it open may read it to the end
    assert copy == LARGE
    reader.close()
    assert store.put_blob(LARGE) == digests[2]
    assert_sound(store)


def test_change_count_sees_one_go_and_another_come(store: Store) -> None:
    """The number of objects, and the highest row, are the same before and after."""
    store.put_blob(SMALL)
    before = store.change_count()
    store.forget([digest_of(SMALL)])
    store.put_blob(SMALL[::-1])
    assert store.change_count() != before
    seen = store.change_count()
    begin(store, LARGE).write_chunk(0, chunk_of(LARGE, 0))
    store.put_blob(SMALL[::-1])
    assert store.change_count() == seen, "nothing came or went"
    store.put_manifest(model_of(SMALL), "model")
    assert store.change_count() != seen


# ---- what is here in part


def test_part_is_shown_and_served_as_far_as_it_is_proved(store: Store) -> None:
    digest, incoming = digest_of(LARGE), begin(store, LARGE)
    assert store.open_reader(digest) is None or not store.has(digest)
    incoming.write_chunk(1, chunk_of(LARGE, 1))
    holding = store.holdings([digest, digest_of(SMALL)])
    assert list(holding) == [digest]
    assert holding[digest] == (len(LARGE), b"\x02", ref_of(LARGE).chunk_list)
    reader = store.open_reader(digest)
    assert reader is not None
    assert reader.covers(MIB, MIB) and reader.covers(MIB + 5, 10)
    for offset, length in ((0, 1), (MIB - 1, 2), (2 * MIB - 1, 2), (MIB, MIB + 1)):
        assert not reader.covers(offset, length)
        with pytest.raises(OSError):
            reader.read_into(offset, memoryview(bytearray(length)))
    part = bytearray(MIB)
    reader.read_into(MIB, memoryview(part))
    assert part == chunk_of(LARGE, 1)
    reader.close()
    assert store.get_blob(digest, len(LARGE)) is None
    assert digest not in store.all_digests()


def test_part_is_taken_up_again(store_dir: Path) -> None:
    with Store(store_dir) as store:
        incoming = begin(store, LARGE)
        for index in (0, 3):
            incoming.write_chunk(index, chunk_of(LARGE, index))
    with Store(store_dir) as store:
        assert store.holdings([digest_of(LARGE)])[digest_of(LARGE)].proved == b"\x09"
        incoming = begin(store, LARGE)
        assert incoming.proved() == b"\x09"
        receive_all(store, LARGE)
        assert_sound(store)


def test_same_incoming_for_everybody_while_it_is_used(store: Store) -> None:
    first = begin(store, LARGE)
    assert begin(store, LARGE) is first
    reference = weakref.ref(first)
    del first
    gc.collect()
    assert reference() is None, "a fetch that was given up must not stay in memory"


def test_what_is_whole_is_received_at_once(store: Store) -> None:
    for data in (SMALL, MIDDLE, LARGE):
        store.put_blob(data)
        incoming = begin(store, data)
        assert incoming.missing_bytes() == 0
        assert incoming.finished.result(0) is None


# ---- false chunks, lists and manifests


def test_false_chunk(store: Store) -> None:
    incoming = begin(store, LARGE)
    with pytest.raises(ChunkMismatch):
        incoming.write_chunk(0, chunk_of(LARGE, 1))
    assert store.holdings([digest_of(LARGE)]).get(digest_of(LARGE), (0, b"\0"))[1] == b"\0"
    receive_all(store, LARGE)
    assert_sound(store)


def test_false_chunk_list_under_a_true_digest(store: Store) -> None:
    """A manifest names a tensor that others share, with the chunk list of other bytes."""
    false = random_bytes(len(LARGE), 66)
    digest, false_list = digest_of(LARGE), chunk_list_of(false)
    honest = begin(store, LARGE)
    honest.write_chunk(1, chunk_of(LARGE, 1))

    ref = ObjectRef(digest, len(LARGE), digest_of(false_list))
    poisoned = store.receive(ref, false_list)
    assert poisoned is not honest
    for index in range(4):
        poisoned.write_chunk(index, chunk_of(false, index))
    with pytest.raises(HashMismatch, match="manifest that names this list is false"):
        poisoned.finished.result(DEADLINE_S)
    assert not store.has(digest)
    assert bytes_of(store, digest) is None

    assert honest.proved() == b"\x02", "the honest download lost nothing"
    assert store.holdings([digest])[digest].proved == b"\x02"
    assert store.receive(ref, false_list).proved() == b"\x00", "nothing false was kept"
    receive_all(store, LARGE)
    assert bytes_of(store, digest) == LARGE
    assert_sound(store)


def test_true_bytes_under_a_false_digest(store: Store) -> None:
    ref = ObjectRef(digest_of(b"other"), len(LARGE), ref_of(LARGE).chunk_list)
    incoming = store.receive(ref, chunk_list_of(LARGE))
    for index in range(4):
        incoming.write_chunk(index, chunk_of(LARGE, index))
    with pytest.raises(HashMismatch):
        incoming.finished.result(DEADLINE_S)
    assert store.all_digests() == []


@pytest.mark.parametrize("data", [MIDDLE, LARGE], ids=["one chunk", "many"])
def test_false_size_under_a_true_digest(store: Store, data: bytes) -> None:
    """It cannot be completed, and must not stand in the way of who knows the true size."""
    ref = ref_of(data)
    false = store.receive(ref._replace(size_bytes=len(data) - 1), chunk_list_of(data))
    for index in range(false.chunk_count - 1):
        false.write_chunk(index, chunk_of(data, index))
    with pytest.raises(ChunkMismatch):
        false.write_chunk(false.chunk_count - 1, chunk_of(data, false.chunk_count - 1))
    receive_all(store, data)
    assert bytes_of(store, ref.digest) == data
    store._receiver.flush()  # which holds on to what is not in the index yet
    del false
    gc.collect()
    with pytest.raises(HashMismatch, match="false"):
        store.receive(ref._replace(size_bytes=len(data) - 1), chunk_list_of(data))
    # A model that claims so is never complete, though the digest is here.
    lying = ObjectRef(ref.digest, len(data) - 1, ref.chunk_list)
    builder = ManifestBuilder()
    builder.add_file("model.bin", "verbatim", [lying], [])
    assert store.missing_objects(builder.build(), [0]) == [0]


def test_chunk_list_that_is_not_the_one_named(store: Store) -> None:
    with pytest.raises(BadInput):
        store.receive(ref_of(LARGE), chunk_list_of(LARGE[::-1]))
    with pytest.raises(BadInput):
        store.receive(ref_of(LARGE), b"")
    with pytest.raises(BadInput):
        store.receive(ref_of(SMALL), chunk_list_of(LARGE))


def test_file_that_rots_while_it_is_received(store: Store) -> None:
    """Chunks that were good when they came are the disk's fault, not the manifest's.

    They come out of order, so that they are read back for the digest of the whole.
    """
    incoming = begin(store, LARGE)
    for index in range(1, 4):
        incoming.write_chunk(index, chunk_of(LARGE, index))
    with incoming.path.open("r+b") as file:
        file.seek(MIB + 9)
        file.write(b"rotten")
    incoming.write_chunk(0, chunk_of(LARGE, 0))
    with pytest.raises(StoreDamaged, match="1 chunks were changed on the disk"):
        incoming.finished.result(DEADLINE_S)
    assert not store.has(digest_of(LARGE))
    again = begin(store, LARGE)
    assert again.missing_bytes() == MIB, "only what rotted is fetched again"
    receive_all(store, LARGE)
    assert_sound(store)


def test_more_in_the_file_than_the_object_has(store: Store) -> None:
    """Whatever lay there before: the object's file is as long as the object."""
    path = begin(store, LARGE).path
    path.write_bytes(LARGE[:MIB] + bytes(9 * MIB))
    receive_all(store, LARGE)
    assert_sound(store)


def test_object_that_is_here_is_not_replaced(store: Store) -> None:
    """A second copy of a durable object must not make it less durable."""
    digest = store.put_blob(MIDDLE)
    store.sync()
    path = store.place.temporary()
    path.write_bytes(MIDDLE)
    before = store.place.object_path(digest).stat()
    new = NewObject(digest, len(MIDDLE), b"", head_of(digest, b""))
    store.keep_file(path, new).result(DEADLINE_S)
    assert store.place.object_path(digest).stat().st_ino == before.st_ino
    assert store.index.query("SELECT boot FROM objects") == [(None,)]
    assert rubbish(store.root) == []


def test_file_taken_away_between_two_tries(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that fails is tried again; a file moved by the first try may be gone by then."""
    digest = digest_of(MIDDLE)
    path = store.place.temporary()
    path.write_bytes(MIDDLE)
    held = threading.Event()
    waiting = store.index.submit(lambda db: held.wait(DEADLINE_S))
    new = NewObject(digest, len(MIDDLE), b"", head_of(digest, b""))
    kept = store.keep_file(path, new)

    def sweep(db: object) -> None:
        store.place.object_path(digest).unlink(missing_ok=True)
        raise ZeroDivisionError

    failing = store.index.submit(sweep)
    held.set()
    waiting.result(DEADLINE_S)
    with pytest.raises(LocalError, match="cannot keep"):
        kept.result(DEADLINE_S)
    assert isinstance(failing.exception(DEADLINE_S), ZeroDivisionError)
    assert not store.has(digest)


# ---- threads


def test_many_threads_receive_one_object(store: Store) -> None:
    data = random_bytes(20 * MIB + 1, 5)
    incoming = begin(store, data)
    order = shuffled(21, 1) + shuffled(21, 2) + shuffled(21, 3)
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda i: incoming.write_chunk(i, chunk_of(data, i)), order))
    assert kept.count(True) == 21
    incoming.finished.result(DEADLINE_S)
    assert_sound(store)
    assert not list((store.root / "partial").iterdir()), "a late writer made the file anew"


def test_threads_that_begin_at_once_get_the_same(store: Store) -> None:
    barrier = threading.Barrier(8)

    def start(_: int) -> object:
        barrier.wait(DEADLINE_S)
        return begin(store, LARGE)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(incoming) for incoming in list(pool.map(start, range(8)))}) == 1


def test_close_while_chunks_arrive(store_dir: Path) -> None:
    """Nothing hangs, nobody sees a foreign error, and the store is sound afterwards."""
    store = Store(store_dir)
    objects = [random_bytes(2 * MIB + 7, 10 + i) for i in range(6)] + [SMALL, MIDDLE]
    incomings = [begin(store, data) for data in objects]
    barrier = threading.Barrier(5)
    strange: list[BaseException] = []

    def work(seed: int) -> None:
        barrier.wait(DEADLINE_S)
        for which in shuffled(len(objects), seed):
            for index in range(incomings[which].chunk_count):
                try:
                    incomings[which].write_chunk(index, chunk_of(objects[which], index))
                except LocalError as error:
                    if "closed" not in str(error):
                        strange.append(error)
                except BaseException as error:
                    strange.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    barrier.wait(DEADLINE_S)
    store.close()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert not strange
    for incoming in incomings:
        assert incoming.finished.done() or incoming.missing_bytes() > 0
    with Store(store_dir) as again:
        assert_sound(again)
        for data in objects:
            receive_all(again, data)
        assert_sound(again)


def test_closed_store_says_so(store_dir: Path) -> None:
    store = Store(store_dir)
    large, small = begin(store, LARGE), begin(store, SMALL)
    for index in range(3):
        large.write_chunk(index, chunk_of(LARGE, index))
    store.close()
    store.close()
    with pytest.raises(LocalError, match="closed"):
        large.write_chunk(3, chunk_of(LARGE, 3))
    with pytest.raises(LocalError, match="closed"):
        small.write_chunk(0, memoryview(SMALL))
    for incoming in (large, small):
        with pytest.raises(LocalError, match="closed"):
            incoming.finished.result(0)
    for call in (store.all_digests, store.models, store.sync, store.change_count):
        with pytest.raises(LocalError, match="closed"):
            call()


# ---- two users of one store (two stores in one process behave as two processes do)


def test_two_stores_receive_one_object(store_dir: Path) -> None:
    """Both write into one file; who is second must not take the first's for damage."""
    with Store(store_dir) as one, Store(store_dir) as two:
        first, second = begin(one, LARGE), begin(two, LARGE)
        first.write_chunk(0, chunk_of(LARGE, 0))
        second.write_chunk(1, chunk_of(LARGE, 1))
        for index in range(4):
            first.write_chunk(index, chunk_of(LARGE, index))
        first.finished.result(DEADLINE_S)
        for index in range(4):
            second.write_chunk(index, chunk_of(LARGE, index))
        second.finished.result(DEADLINE_S)
        assert bytes_of(two, digest_of(LARGE)) == LARGE
        assert_sound(one)
        assert not list((store_dir / "partial").iterdir())
        assert two.holdings([digest_of(LARGE)])[digest_of(LARGE)].proved is None


def test_second_store_joins_in_late(store_dir: Path) -> None:
    """It takes up what the first proved; then the first takes the file away."""
    with Store(store_dir) as one, Store(store_dir) as two:
        first = begin(one, LARGE)
        for index in range(2):
            first.write_chunk(index, chunk_of(LARGE, index))
        second = begin(two, LARGE)
        assert not second.is_missing(0) and not second.is_missing(1)
        for index in (2, 3):
            first.write_chunk(index, chunk_of(LARGE, index))
        first.finished.result(DEADLINE_S)
        assert second.write_chunk(3, chunk_of(LARGE, 3)) is True
        second.finished.result(DEADLINE_S)
        assert second.write_chunk(2, chunk_of(LARGE, 2)) is True
        assert_sound(two)
        assert not list((store_dir / "partial").iterdir())


def test_second_store_sees_what_the_first_proves(store_dir: Path) -> None:
    with Store(store_dir) as one, Store(store_dir) as two:
        incoming = begin(one, LARGE)
        incoming.write_chunk(2, chunk_of(LARGE, 2))
        one._receiver.flush()
        assert two.holdings([digest_of(LARGE)])[digest_of(LARGE)].proved == b"\x04"
        reader = two.open_reader(digest_of(LARGE))
        assert reader is not None and reader.covers(2 * MIB, MIB) and not reader.covers(0, 1)
        reader.close()


def test_forgotten_while_another_receives_it(store_dir: Path) -> None:
    with Store(store_dir) as one, Store(store_dir) as two:
        incoming = begin(one, LARGE)
        incoming.write_chunk(0, chunk_of(LARGE, 0))
        two.put_blob(LARGE)
        two.forget([digest_of(LARGE)])
        for index in range(1, 4):
            incoming.write_chunk(index, chunk_of(LARGE, index))
        incoming.finished.result(DEADLINE_S)
        assert_sound(one)


def test_both_put_the_same(store_dir: Path) -> None:
    with Store(store_dir) as one, Store(store_dir) as two, ThreadPoolExecutor(4) as pool:
        blobs = [random_bytes(size, size) for size in (50, 70_000, MIB + 1)] * 4
        for store in (one, two):
            for data in blobs:
                pool.submit(store.put_blob, data)
        pool.shutdown(wait=True)
        assert len(one.all_digests()) == 4  # and the one chunk list
        assert_sound(one)
        assert_sound(two)


# ---- after a crash


def test_power_cut_drops_what_was_torn_and_keeps_the_rest(store_dir: Path) -> None:
    good, torn, short, lost = (random_bytes(200_000, 20 + i) for i in range(4))
    with Store(store_dir) as store:
        paths = [store.place.object_path(store.put_blob(d)) for d in (good, torn, short, lost)]
        store.put_blob(SMALL)
    cut_the_power(store_dir)
    with paths[1].open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    os.truncate(paths[2], 4096)
    paths[3].unlink()
    with Store(store_dir) as store:
        assert set(store.all_digests()) == {digest_of(good), digest_of(SMALL)}
        assert_sound(store)
        assert not paths[1].exists() and not paths[2].exists()
        receive_all(store, torn)
        assert_sound(store)
        assert store.sync() == 2


def test_power_cut_hashes_the_parts_again(store_dir: Path) -> None:
    with Store(store_dir) as store:
        incoming = begin(store, LARGE)
        for index in (0, 1, 2):
            incoming.write_chunk(index, chunk_of(LARGE, index))
        path = incoming.path
    cut_the_power(store_dir)
    with path.open("r+b") as file:
        file.seek(MIB + 100)
        file.write(b"torn")
    os.truncate(path, 2 * MIB + 5)
    with Store(store_dir) as store:
        assert store.holdings([digest_of(LARGE)]) == {}, "shown before it was hashed again"
        assert store.open_reader(digest_of(LARGE)) is None
        assert begin(store, LARGE).proved() == b"\x01"
        receive_all(store, LARGE)
        assert_sound(store)


def test_what_was_synced_is_believed(store_dir: Path) -> None:
    with Store(store_dir) as store:
        path = store.place.object_path(store.put_blob(MIDDLE))
        assert store.sync() == 1
        assert store.sync() == 0
    cut_the_power(store_dir)
    os.utime(path, (1, 1))
    assert edit_index(store_dir, "SELECT COUNT(*) FROM objects WHERE boot IS NOT NULL") == [(0,)]
    with Store(store_dir) as store:
        assert_sound(store)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_sync_reaches_the_disk_before_it_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, the folder it is in, the folder of that one; then the index's own log."""
    store.put_blob(SMALL)
    path = store.place.object_path(store.put_blob(MIDDLE))
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        durable = store.index.query("SELECT boot FROM objects WHERE place=1") == [(None,)]
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), durable))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.sync()
    log = f"{store.root}/index.db-wal"
    for name in (path, path.parent, path.parent.parent):
        assert (str(name), False) in synced
    assert (log, True) in synced
    synced.clear()
    store.put_blob(SMALL[::-1])
    assert store.sync() == 0, "small objects have no file to sync"
    assert (log, True) in synced, "but they are in the log"


def test_orphan_is_taken_up(store_dir: Path) -> None:
    """A kill between the move of a file and its row's commit."""
    with Store(store_dir) as store:
        for data in (MIDDLE, LARGE):
            store.put_blob(data)
    edit_index(store_dir, "DELETE FROM objects")
    with Store(store_dir) as store:
        assert store.all_digests() == []
        for data in (MIDDLE, LARGE):
            incoming = begin(store, data)
            assert incoming.missing_bytes() == 0
            incoming.finished.result(DEADLINE_S)
        assert_sound(store)


def test_false_orphan_is_not_taken_up(store_dir: Path) -> None:
    with Store(store_dir) as store:
        for data in (MIDDLE, LARGE):
            path = store.place.object_path(digest_of(data))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(len(data)))
            assert begin(store, data).missing_bytes() == len(data)
            receive_all(store, data)
            assert path.read_bytes() == data
        assert_sound(store)


def test_put_replaces_an_orphan(store: Store) -> None:
    path = store.place.object_path(digest_of(MIDDLE))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(len(MIDDLE)))
    store.put_blob(MIDDLE)
    assert_sound(store)


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_object_whose_file_is_not_what_it_was(store_dir: Path, damage: str) -> None:
    with Store(store_dir) as store:
        digest = store.put_blob(MIDDLE)
        store.sync()
        path = store.place.object_path(digest)
        if damage == "gone":
            path.unlink()
        elif damage == "short":
            os.truncate(path, 10)
        else:
            path.write_bytes(MIDDLE + b"more")
        assert store.open_reader(digest) is None
        assert not store.has(digest)
        assert store.put_blob(MIDDLE) == digest
        assert_sound(store)
        assert edit_index(store_dir, "SELECT boot IS NULL FROM objects") == [(0,)], (
            "the new file is not durable because the old one was"
        )


def test_no_file_to_spare_loses_no_object(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of descriptors, or a disk that fails for a moment, is not a lost file."""
    digest = store.put_blob(MIDDLE)
    path = store.place.object_path(digest)
    real = os.open

    for code in (errno.EMFILE, errno.EIO, errno.EACCES):

        def failing(name: object, *rest: object, code: int = code) -> int:
            if os.fspath(name) == str(path):  # type: ignore[arg-type]
                raise OSError(code, os.strerror(code), str(path))
            return real(name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", failing)
        with pytest.raises(LocalError, match="cannot open"):
            store.open_reader(digest)
        monkeypatch.undo()
        assert bytes_of(store, digest) == MIDDLE


def test_rubbish_of_the_dead_is_removed_and_of_the_living_is_not(store_dir: Path) -> None:
    with Store(store_dir) as living:
        mine = living.place.temporary()
        mine.write_bytes(b"being written")
        killed = run_python(
            "import os, sys; from pathlib import Path\n"
            "from tensorswarm.store.store import Store\n"
            "store = Store(Path(sys.argv[1])); path = store.place.temporary()\n"
            "path.write_bytes(b'unfinished'); print(path, flush=True); os._exit(0)",
            store_dir,
        ).strip()
        assert Path(killed).exists()
        (store_dir / "tmp" / "999999-of-an-older-version").write_bytes(b"")
        with Store(store_dir):
            assert mine.exists()
            assert not Path(killed).exists()
            assert len(files_below(store_dir / "tmp")) == 3, "two locks, one file"
    assert files_below(store_dir / "tmp") == [f"{mine.name}"]
    with Store(store_dir):
        assert not mine.exists()


def test_foreign_files_in_a_store_do_no_harm(store_dir: Path) -> None:
    with Store(store_dir) as store:
        store.put_blob(MIDDLE)
    for name in ("partial/.DS_Store", "partial/abcd-ef", "partial/no-hex", "tmp/x", "objects/y"):
        (store_dir / name).write_bytes(b"")
    (store_dir / "tmp" / "folder").mkdir()
    with Store(store_dir) as store:
        assert_sound(store)
        assert (store_dir / "partial" / ".DS_Store").exists()


def test_part_of_a_whole_object_is_removed(store_dir: Path) -> None:
    other_list = chunk_list_of(LARGE[::-1])
    with Store(store_dir) as store:
        begin(store, LARGE).write_chunk(0, chunk_of(LARGE, 0))
        ref = ObjectRef(digest_of(LARGE), len(LARGE), digest_of(other_list))
        store.receive(ref, other_list).write_chunk(0, chunk_of(LARGE[::-1], 0))
        begin(store, LARGE[1:]).write_chunk(0, chunk_of(LARGE[1:], 0))
        store.put_blob(LARGE)
        assert len(files_below(store_dir / "partial")) == 3
        assert store.holdings([digest_of(LARGE)])[digest_of(LARGE)].proved is None
    with Store(store_dir) as store:
        assert len(files_below(store_dir / "partial")) == 1
        store.forget([digest_of(LARGE)])
        assert store.holdings([digest_of(LARGE)]) == {}, "claimed though its file is gone"
        assert begin(store, LARGE[1:]).proved() == b"\x01"


def test_notes_on_a_part_go_when_it_is_whole(store: Store) -> None:
    def notes() -> list[tuple[object, ...]]:
        return store.index.query("SELECT digest FROM partials")

    incoming = begin(store, LARGE)
    incoming.write_chunk(0, chunk_of(LARGE, 0))
    store._receiver.flush()
    assert notes() == [(digest_of(LARGE),)]
    store.put_blob(LARGE)
    assert notes() == []
    incoming.write_chunk(1, chunk_of(LARGE, 1))
    store._receiver.flush()
    assert notes() == [], "noted in part what is here whole"


def test_partial_file_removed_by_hand(store_dir: Path) -> None:
    with Store(store_dir) as store:
        incoming = begin(store, LARGE)
        incoming.write_chunk(0, chunk_of(LARGE, 0))
        incoming.path.unlink()
        with pytest.raises(StoreDamaged, match="removed"):
            incoming.write_chunk(1, chunk_of(LARGE, 1))
        with pytest.raises(StoreDamaged):
            incoming.finished.result(0)
        receive_all(store, LARGE)
        assert_sound(store)
    with Store(store_dir) as store:
        begin(store, LARGE[1:]).write_chunk(0, chunk_of(LARGE[1:], 0))
    for path in (store_dir / "partial").iterdir():
        path.unlink()
    with Store(store_dir) as store:
        assert store.holdings([digest_of(LARGE[1:])]) == {}


# ---- full disks


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24 * MIB) as folder:
        yield folder


def test_full_disk_while_receiving(full_disk: Path) -> None:
    root = full_disk / "store"
    with Store(root) as store:
        store.put_blob(SMALL)
        incoming = begin(store, LARGE)
        incoming.write_chunk(0, chunk_of(LARGE, 0))
        filler = fill(full_disk)
        with pytest.raises(NoRoom):
            for index in range(1, 4):
                incoming.write_chunk(index, chunk_of(LARGE, index))
        with pytest.raises(NoRoom):
            receive_all(store, MIDDLE)
        with pytest.raises(NoRoom):
            for seed in range(200):
                receive_all(store, random_bytes(60_000, seed))
        assert_sound(store)
        assert not [name for name in rubbish(root) if name.startswith("tmp/")]
        filler.unlink()
        receive_all(store, MIDDLE)
        receive_all(store, LARGE)
        assert_sound(store)
    with Store(root) as store:
        assert store.has(digest_of(LARGE))
        assert_sound(store)


def test_full_disk_while_putting(full_disk: Path) -> None:
    root = full_disk / "store"
    with Store(root) as store:
        store.put_blob(SMALL)
        filler = fill(full_disk, leave_bytes=128 << 10)
        for data in (MIDDLE, LARGE):
            with pytest.raises(NoRoom):
                store.put_blob(data)
        with pytest.raises(NoRoom):
            for seed in range(200):
                store.put_blob(random_bytes(60_000, seed))
        assert_sound(store)
        assert rubbish(root) == []
    filler.unlink()
    with Store(root) as store:
        assert_sound(store)
        assert bytes_of(store, store.put_blob(LARGE)) == LARGE


def test_full_disk_while_opening(full_disk: Path) -> None:
    root = full_disk / "store"
    filler = fill(full_disk)
    with pytest.raises(NoRoom):
        Store(root)
    filler.unlink()
    with Store(root) as store:
        store.put_blob(MIDDLE)
    fill(full_disk)
    try:
        with Store(root) as store:
            assert_sound(store)  # what is there can be used, if SQLite finds room to look
    except NoRoom:
        pass
    filler.unlink()
    with Store(root) as store:
        assert_sound(store)


def test_limit_on_file_sizes_is_no_room(store_dir: Path) -> None:
    """A quota of another kind, without root: the system refuses to write past a limit."""
    printed = run_python(
        "import resource, sys; from pathlib import Path\n"
        "from tensorswarm.store.errors import NoRoom\n"
        "from tensorswarm.store.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.put_blob(b'x' * 100)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "for size in (300_000, 60_000, 60_001, 60_002, 60_003, 60_004):\n"
        "    try: store.put_blob(b'x' * size)\n"
        "    except NoRoom: print('no room')\n"
        "store.close()\n",
        store_dir,
    )
    assert "no room" in printed
    with Store(store_dir) as store:
        assert store.has(digest_of(b"x" * 100))
        assert_sound(store)
        store.put_blob(MIDDLE)


def test_failed_write_frees_its_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:

    def failing(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(NoRoom):
        store.put_blob(MIDDLE)
    with pytest.raises(NoRoom):
        receive_all(store, MIDDLE)
    with pytest.raises(NoRoom):
        receive_all(store, LARGE)
    assert not [name for name in rubbish(store.root) if name.startswith("tmp/")]
    monkeypatch.undo()
    assert begin(store, LARGE).missing_bytes() == 0, "what was received stays for the next try"
    assert not store.has(digest_of(MIDDLE))
    receive_all(store, MIDDLE)
    assert_sound(store)


# ---- models


def test_models(store: Store) -> None:
    first, second = model_of(SMALL), model_of(SMALL, MIDDLE)
    assert store.manifest(first.digest) is None
    store.put_manifest(first, "first")
    store.put_manifest(second, "")
    assert store.manifest(first.digest) == first
    store.put_manifest(first, "")
    assert {m.digest: m.name for m in store.models()} == {first.digest: "first", second.digest: ""}
    store.put_manifest(first, "renamed")
    assert {m.name for m in store.models()} == {"renamed", ""}
    assert store.missing_objects(second, range(2)) == [0, 1]
    store.put_blob(SMALL)
    assert store.missing_objects(first, range(1)) == []
    assert len(store.missing_objects(second, range(2))) == 1
    assert store.missing_objects(second, []) == []


def test_blob_that_is_no_manifest(store: Store) -> None:
    with pytest.raises(BadInput):
        store.manifest(store.put_blob(b"not a manifest"))


def test_forgotten_manifest_is_not_remembered(store: Store) -> None:
    manifest = model_of(SMALL)
    store.put_manifest(manifest, "model")
    assert store.manifest(manifest.digest) is not None
    store.forget([manifest.digest])
    assert store.manifest(manifest.digest) is None


def test_many_manifests_by_many_threads(store: Store) -> None:
    manifests = [model_of(random_bytes(10, i)) for i in range(40)]
    for manifest in manifests:
        store.put_manifest(manifest, "")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: store.manifest(manifests[i % 40].digest), range(800)))
    assert found == [manifests[i % 40] for i in range(800)]


def test_empty_tensors_are_never_missing(store: Store, tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "m.safetensors", {"a": ("F32", [0, 4], b""), "b": ("U8", [3], b"abc")}
    )
    manifest = add_paths(store, [path]).manifest
    assert EMPTY_DIGEST in {ref.digest for ref in manifest.objects}
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []


# ---- large numbers


def test_queries_do_not_read_the_bytes(store: Store, tmp_path: Path) -> None:
    """Records of small objects come without their data: a model has 100,000 of them."""
    sizes = [INLINE_LIMIT] * 400
    manifest = add_paths(store, [random_model(tmp_path / "m.safetensors", sizes)]).manifest
    digests = [ref.digest for ref in manifest.objects]
    tracemalloc.start()
    try:
        found = store.records(digests)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == len(digests)
    assert peak < 4 * MIB, "400 objects of 64 KiB are 25 MiB"


def test_opening_something_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(LocalError):
        Store(file)
    assert file.read_text() == "x"
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(0o500)
        with pytest.raises(LocalError):
            Store(locked / "store")


def test_failed_opening_gives_everything_back(store_dir: Path) -> None:
    with Store(store_dir):
        pass
    edit_index(store_dir, "PRAGMA user_version=99")
    opening: Callable[[Path], Store] = Store
    for _ in range(3):
        with pytest.raises(BadInput):
            opening(store_dir)
    assert files_below(store_dir / "tmp") == []
    assert not [t for t in threading.enumerate() if t.name == "store-writer" and t.is_alive()]
    edit_index(store_dir, "PRAGMA user_version=1")
    with Store(store_dir):
        pass


def test_chunk_size_is_what_these_tests_believe() -> None:
    assert CHUNK_SIZE == MIB
