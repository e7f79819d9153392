"""One store, many users: threads of one process, and processes beside each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import LocalError, StoreDamaged
from tensorswarm.store.objects import WholeObjects
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    LARGE,
    MIB,
    MIDDLE,
    SMALL,
    assert_sound,
    begin,
    bytes_of,
    chunk_of,
    random_bytes,
    receive_all,
    shuffled,
)

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


def test_file_that_is_another_by_now(store_dir: Path) -> None:
    """Moved away and begun anew by somebody else: it lacks what we wrote into the old one."""
    with Store(store_dir) as one, Store(store_dir) as two:
        first = begin(one, LARGE)
        for index in range(3):
            first.write_chunk(index, chunk_of(LARGE, index))
        receive_all(two, LARGE)
        two.forget([digest_of(LARGE)])
        second = begin(two, LARGE)
        second.write_chunk(2, chunk_of(LARGE, 2))
        first.write_chunk(3, chunk_of(LARGE, 3))
        with pytest.raises(StoreDamaged, match="2 chunks"):
            first.finished.result(DEADLINE_S)
        assert not one.has(digest_of(LARGE))
        assert second.proved() == b"\x04"
        receive_all(two, LARGE)
        assert_sound(one)
        assert one.has(digest_of(LARGE))


def test_file_that_becomes_another_at_the_last_moment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the hash and the move."""
    real = WholeObjects.keep_file

    def keep_file(self: WholeObjects, path: Path, *rest: Any, **options: Any) -> Any:
        path.rename(path.with_name("moved"))
        path.write_bytes(bytes(len(LARGE)))
        return real(self, path, *rest, **options)

    monkeypatch.setattr(WholeObjects, "keep_file", keep_file)
    incoming = begin(store, LARGE)
    for index in range(4):
        incoming.write_chunk(index, chunk_of(LARGE, index))
    with pytest.raises(LocalError, match="cannot keep"):
        incoming.finished.result(DEADLINE_S)
    assert not store.has(digest_of(LARGE))
    monkeypatch.undo()
    receive_all(store, LARGE)
    assert_sound(store)


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
