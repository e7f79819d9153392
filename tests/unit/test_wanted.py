"""The objects of a download: state is made when something comes, and let go when it is whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tensorswarm.store.digest import CHUNK_SIZE, chunk_list_of, digest_of
from tensorswarm.store.errors import BadInput
from tensorswarm.store.incoming import Kept
from tensorswarm.store.manifest import ObjectRef
from tensorswarm.store.object_table import ObjectTable
from tensorswarm.store.store import Store
from tensorswarm.store.wanted import Wanted
from tests.support.store_world import DEADLINE_S, MIB, bytes_of, chunk_of, random_bytes

LARGE = random_bytes(2 * MIB + 5, 1)
MIDDLE = random_bytes(100_000, 2)
SMALL = [random_bytes(1000, 3 + i) for i in range(5)]


def ref_of(data: bytes) -> ObjectRef:
    chunk_list = chunk_list_of(data)
    return ObjectRef(digest_of(data), len(data), digest_of(chunk_list) if chunk_list else b"")


def want(store: Store, *data: bytes) -> tuple[Wanted, dict[bytes, int]]:
    """Return wanted objects, and the position of each."""
    table = ObjectTable(sorted(map(ref_of, data)))
    wanted = store.want(table, range(len(table)))
    return wanted, {each: wanted.find(digest_of(each)) for each in data}


def lists_of(*data: bytes) -> dict[bytes, bytes]:
    return {digest_of(chunk_list_of(each)): chunk_list_of(each) for each in data}


def write_all(wanted: Wanted, index: int, data: bytes) -> None:
    for chunk in range(-(-len(data) // CHUNK_SIZE)):
        assert wanted.write_chunk(index, chunk, chunk_of(data, chunk)) is Kept.NEW


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_objects_of_all_sizes_become_whole(store: Store) -> None:
    with store:
        everything = (LARGE, MIDDLE, *SMALL)
        wanted, at = want(store, *everything)
        assert wanted.unready() == [at[LARGE]]
        assert wanted.prepare([at[LARGE]], lists_of(LARGE)) == {}
        heard: list[bytes] = []
        wanted.on_whole = heard.append
        write_all(wanted, at[LARGE], LARGE)
        write_all(wanted, at[MIDDLE], MIDDLE)
        outcomes = wanted.write_small([(at[data], memoryview(data)) for data in SMALL])
        assert outcomes == [Kept.NEW] * len(SMALL)
        wanted.wait_ended()
        assert sorted(heard) == sorted(map(digest_of, everything))
        assert all(bytes_of(store, digest_of(data)) == data for data in everything)
        assert wanted.all_missing_bytes() == 0
        assert not wanted.is_missing(at[LARGE], 0)


def test_what_is_not_prepared_is_not_taken(store: Store) -> None:
    with store:
        wanted, at = want(store, LARGE)
        assert not wanted.is_missing(at[LARGE], 0)
        assert wanted.write_chunk(at[LARGE], 0, chunk_of(LARGE, 0)) is Kept.KNOWN
        assert wanted.missing_bytes(at[LARGE]) == len(LARGE)
        with pytest.raises(BadInput, match="not the one that is named"):
            wanted.prepare([at[LARGE]], lists_of(LARGE[::-1]))


def test_false_bytes_cost_only_themselves(store: Store) -> None:
    with store:
        wanted, at = want(store, LARGE, *SMALL)
        wanted.prepare([at[LARGE]], lists_of(LARGE))
        assert wanted.write_chunk(at[LARGE], 0, chunk_of(LARGE[::-1], 0)) is Kept.WRONG
        parts = [(at[data], memoryview(data)) for data in SMALL]
        parts[2] = (parts[2][0], memoryview(bytes(1000)))
        assert wanted.write_small(parts).count(Kept.WRONG) == 1
        assert wanted.is_missing(parts[2][0], 0)
        assert wanted.write_small(parts).count(Kept.KNOWN) == len(SMALL) - 1
        assert wanted.write_chunk(parts[2][0], 0, memoryview(SMALL[2])) is Kept.NEW


def test_two_downloads_share_what_comes(store: Store) -> None:
    with store:
        first, at = want(store, LARGE, *SMALL)
        second, _ = want(store, LARGE, *SMALL)
        first.prepare([at[LARGE]], lists_of(LARGE))
        assert first.write_chunk(at[LARGE], 1, chunk_of(LARGE, 1)) is Kept.NEW
        assert second.prepare([at[LARGE]], lists_of(LARGE)) == {at[LARGE]: b"\x02"}
        first.write_small([(at[data], memoryview(data)) for data in SMALL])
        write_rest = [0, 2]
        for chunk in write_rest:
            second.write_chunk(at[LARGE], chunk, chunk_of(LARGE, chunk))
        first.wait_ended()
        second.wait_ended()


def test_a_later_process_goes_on_where_one_was_ended(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        wanted, at = want(store, LARGE, *SMALL)
        wanted.prepare([at[LARGE]], lists_of(LARGE))
        wanted.write_chunk(at[LARGE], 0, chunk_of(LARGE, 0))
        assert wanted.begun() == [at[LARGE]]
    with Store(tmp_path / "store") as store:
        wanted, at = want(store, LARGE, *SMALL)
        assert wanted.begun() == [at[LARGE]]
        assert wanted.prepare(wanted.begun(), lists_of(LARGE)) == {at[LARGE]: b"\x01"}
        assert wanted.begun_bitmaps() == {at[LARGE]: b"\x01"}


def test_what_became_whole_elsewhere_is_found_when_it_is_prepared(store: Store) -> None:
    with store:
        wanted, at = want(store, LARGE)
        incoming = store.receive(ref_of(LARGE), chunk_list_of(LARGE))
        for chunk in range(3):
            incoming.write_chunk(chunk, chunk_of(LARGE, chunk))
        incoming.finished.result(DEADLINE_S)
        assert wanted.prepare([at[LARGE]], lists_of(LARGE)) == {at[LARGE]: b"\x07"}
        wanted.wait_ended()


def test_a_tensor_of_which_nothing_came_takes_few_bytes(store: Store) -> None:
    count = 20_000
    table = ObjectTable(
        ObjectRef(digest, 10 * MIB, digest_of(digest))
        for digest in sorted(digest_of(b"%d" % i) for i in range(count))
    )
    with store:
        tracemalloc.start()
        try:
            wanted = store.want(table, range(count))
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(wanted) == count
        assert kept < 4 * count
