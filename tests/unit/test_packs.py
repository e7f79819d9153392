"""Packs of small objects: what is in them after kills, power cuts and collections."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tensorswarm.store import index as index_module
from tensorswarm.store import packs as packs_module
from tensorswarm.store import upkeep
from tensorswarm.store.checking import check_object
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import NoRoom, StoreDamaged
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.object_table import ObjectRef, ObjectTable
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    SMALL,
    assert_sound,
    bytes_of,
    cut_the_power,
    edit_index,
    files_below,
    fill,
    random_bytes,
    random_model,
    run_python,
    small_disk,
    start_python,
)

COUNT = 300
SIZE = 1000


def small_objects(count: int = COUNT, seed: int = 7) -> list[bytes]:
    data = random_bytes(count * SIZE, seed)
    # Of sizes that differ, and with two that are as long as they may be.
    cut = [data[i * SIZE : (i + 1) * SIZE - i % 7] for i in range(count - 2)]
    return [*cut, random_bytes(64 << 10, seed + 1), random_bytes(64 << 10, seed + 2)]


def keep(store: Store, objects: Sequence[bytes]) -> None:
    store.keep_small([(digest_of(each), each) for each in objects]).result(DEADLINE_S)


def packs_of(store: Store) -> list[Path]:
    return sorted(path for path in store.place.packs.iterdir())


def rows_in_packs(root: Path) -> int:
    ((count,),) = edit_index(root, "SELECT COUNT(*) FROM objects WHERE place=3")
    assert isinstance(count, int)
    return count


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(store_dir: Path) -> Iterator[Store]:
    with Store(store_dir) as opened:
        yield opened


# ---- what is kept where


def test_many_lie_in_a_pack_and_few_in_their_rows(store: Store, store_dir: Path) -> None:
    objects = small_objects()
    keep(store, objects)
    keep(store, [SMALL])
    assert rows_in_packs(store_dir) == COUNT
    (pack,) = packs_of(store)
    assert pack.stat().st_size == sum(map(len, objects))
    assert store.index.query("SELECT COUNT(*) FROM objects WHERE place=0") == [(1,)]
    assert_sound(store)
    wanted = [(digest_of(each), len(each)) for each in [*reversed(objects), SMALL]]
    assert store.read_small(wanted) == [*reversed(objects), SMALL]
    assert store.read_small([(wanted[0][0], 5), wanted[1]]) == [None, objects[-2]]
    assert store.read_small([(wanted[0][0], 5), wanted[0]]) == [None, objects[-1]]
    assert store.sizes([each[0] for each in wanted]) == dict(wanted)
    assert store.change_count()[1] == COUNT + 1


def test_what_is_there_already_is_not_kept_twice(store: Store, store_dir: Path) -> None:
    objects = small_objects()
    keep(store, objects)
    keep(store, [*objects[:100], *small_objects(50, 20)])
    assert rows_in_packs(store_dir) == COUNT + 50
    assert_sound(store)


def test_a_full_pack_is_followed_by_another(
    store: Store, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs_module, "PACK_BYTES", 100_000)
    objects = small_objects()
    for start in range(0, COUNT, 60):
        keep(store, objects[start : start + 60])
    assert len(packs_of(store)) == 3
    assert store.index.query("SELECT is_open FROM packs ORDER BY id") == [(0,), (0,), (0,)]
    assert store.read_small([(digest_of(each), len(each)) for each in objects]) == objects
    assert_sound(store)


def test_an_added_model_lies_in_packs(store: Store, store_dir: Path, tmp_path: Path) -> None:
    random_model(tmp_path / "model" / "m.safetensors", [500] * 600)
    added = add_paths(store, [tmp_path / "model"])
    assert rows_in_packs(store_dir) == 601
    assert store.missing_objects(added.manifest, range(601)) == []
    assert_sound(store)


def test_an_adopted_object_is_replaced_by_one_in_a_pack(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "model" / "m.safetensors", [70_000])
    add_paths(store, [path], copy=False)
    assert store.index.query("SELECT COUNT(*) FROM objects WHERE place=2") == [(1,)]
    # As an older version might have left one that is small.
    small = small_objects(20)
    (digest, first) = digest_of(small[0]), small[0]
    store.index.write(
        lambda db: db.execute("UPDATE objects SET digest=?, size=9 WHERE place=2", (digest,))
    )
    keep(store, small)
    assert store.index.query("SELECT COUNT(*) FROM objects WHERE place=2") == [(0,)]
    assert bytes_of(store, digest) == first


# ---- kills

RECEIVING = """
import os, signal, sys
from pathlib import Path
from tensorswarm.store import packs, pack_care, upkeep
from tensorswarm.store.digest import digest_of
from tensorswarm.store.index import Index
from tensorswarm.store.store import Store
from tests.unit.test_packs import small_objects, COUNT

step, at = sys.argv[2], int(sys.argv[3])
calls = 0

def die_at(place, name, is_after):
    real = getattr(place, name)
    def dying(*args, **kwargs):
        global calls
        calls += 1
        if calls == at and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(place, name, dying)

def halved(descriptor, parts, offset):
    return real_write(descriptor, [b"".join(parts)[:5000]], offset)

store = Store(Path(sys.argv[1]))
real_write = os.pwritev
if step == "half a write":
    os.pwritev = halved
STEPS = {
    "half a write": (packs.os, "pwrite", False),
    "before the write": (packs, "_write_all", False),
    "after the write": (packs, "_write_all", True),
    "before the commit": (packs, "insert_packed", True),
    "after the commit": (Index, "_commit", True),
    "moving": (packs, "_write_all", True),
    "moved": (pack_care, "remove_file", False),
}
if step in STEPS:
    die_at(*STEPS[step])
if step.startswith("mov"):
    upkeep.collect(store)
else:
    objects = small_objects()
    for start in range(0, COUNT, 50):
        part = objects[start : start + 50]
        store.keep_small([(digest_of(each), each) for each in part]).result()
        print(start, flush=True)
    if step == "wait":
        sys.stdin.read()
"""
"""Keeps the objects in batches, says so after each, and is killed at a certain call."""


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "step",
    [
        "before the write",
        "half a write",
        "after the write",
        "before the commit",
        "after the commit",
    ],
)
def test_a_kill_loses_nothing_that_was_kept(store_dir: Path, step: str, at: int) -> None:
    process = start_python(RECEIVING, store_dir, step, str(at))
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGKILL
    kept = 50 * len(output.split())
    objects = small_objects()
    with Store(store_dir) as store:
        assert_sound(store)
        here = store.all_digests()
        assert set(here) >= {digest_of(each) for each in objects[:kept]}
        committed = kept + (50 if step == "after the commit" else 0)
        assert len(here) == committed
        assert len(packs_of(store)) == (1 if committed else 0), "a file that no row names stays"
        keep(store, objects)
        assert_sound(store)
        assert len(store.all_digests()) == COUNT


def test_a_kill_from_outside_loses_nothing_that_was_kept(store_dir: Path) -> None:
    process = start_python(RECEIVING, store_dir, "wait", "0")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    with Store(store_dir) as store:
        assert_sound(store)
        assert len(store.all_digests()) >= 50 * len(lines)


@pytest.mark.parametrize("step", ["moving", "moved"])
def test_a_kill_while_room_is_given_back_loses_nothing(store_dir: Path, step: str) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects)
        for each in objects[:100]:
            upkeep.pin(store, digest_of(each))
    process = start_python(RECEIVING, store_dir, step, "1")
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGKILL
    with Store(store_dir) as store:
        assert set(store.all_digests()) == {digest_of(each) for each in objects[:100]}
        assert_sound(store)
        upkeep.collect(store)
        assert_sound(store)
    with Store(store_dir) as store:
        upkeep.collect(store)  # now the one that was open is nobody's
        (pack,) = packs_of(store)
        assert pack.stat().st_size == sum(map(len, objects[:100]))
        assert_sound(store)


# ---- power cuts, and packs that are damaged


def test_power_cut_drops_what_was_torn_and_keeps_the_rest(store_dir: Path) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects)
        (pack,) = packs_of(store)
    cut_the_power(store_dir)
    ends = [sum(map(len, objects[: i + 1])) for i in range(COUNT)]
    with pack.open("r+b") as file:
        file.seek(ends[9])  # the eleventh
        file.write(bytes(100))
    os.truncate(pack, ends[-2] + 10)  # the last
    with Store(store_dir) as store:
        lost = {digest_of(objects[10]), digest_of(objects[-1])}
        assert set(store.all_digests()) == {digest_of(each) for each in objects} - lost
        assert_sound(store)
        keep(store, [objects[10], objects[-1]])
        assert_sound(store)


def test_what_was_synced_is_not_hashed_again_after_a_power_cut(store_dir: Path) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects[:100])
        store.sync()
        (pack,) = packs_of(store)
        keep(store, objects[100:])
    assert edit_index(store_dir, "SELECT durable_bytes < size_bytes FROM packs") == [(1,)]
    cut_the_power(store_dir)
    with pack.open("r+b") as file:
        file.write(bytes(10))  # as no power cut does: it tells whether anybody looks
        file.seek(-10, os.SEEK_END)
        file.write(bytes(10))
    with Store(store_dir) as store:
        assert len(store.all_digests()) == COUNT - 1
        with pytest.raises(StoreDamaged):
            check_object(store, digest_of(objects[0]))
        store.sync()
    assert edit_index(store_dir, "SELECT durable_bytes = size_bytes FROM packs") == [(1,)]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_pack_that_is_lost_takes_its_rows_along(store_dir: Path, is_open: bool) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects)
        if is_open:
            packs_of(store)[0].unlink()
            wanted = [(digest_of(each), len(each)) for each in objects]
            assert store.read_small(wanted) == [None] * COUNT
            assert store.all_digests() == []
    if not is_open:
        for path in (store_dir / "packs").iterdir():
            path.unlink()
    with Store(store_dir) as store:
        assert store.all_digests() == []
        keep(store, objects)
        assert_sound(store)
        assert len(store.all_digests()) == COUNT


def test_files_of_no_row_go_when_their_session_has_ended(store_dir: Path) -> None:
    with Store(store_dir) as living:
        keep(living, small_objects(20))
        mine = living.place.packs / living.place.unique_name()
        mine.write_bytes(b"not committed yet")
        orphan = living.place.packs / f"{'0' * 32}.1"
        orphan.write_bytes(b"left by a kill")
        with Store(store_dir) as other:
            assert mine.exists() and not orphan.exists()
            assert_sound(other)


# ---- several stores on one folder, and failing transactions


def test_each_process_writes_its_own_pack(store_dir: Path) -> None:
    objects = small_objects()
    with Store(store_dir) as first, Store(store_dir) as second:
        keep(first, objects[:100])
        keep(second, objects[100:])
        assert len(packs_of(first)) == 2
        assert_sound(first)
        upkeep.collect(first)  # nothing needs them: the rows go, the open packs stay
        assert first.all_digests() == []
        assert len(packs_of(second)) == 2
        keep(second, objects)
        assert_sound(first)


def test_a_transaction_that_is_tried_again_appends_once(store: Store) -> None:
    objects = small_objects()
    tries = 0

    def failing(db: sqlite3.Connection) -> None:
        nonlocal tries
        tries += 1
        raise ValueError("not this one")

    # One batch: the writer is held until both wait.
    held = threading.Event()
    first = store.index.submit(lambda db: held.wait(DEADLINE_S))
    kept = store.keep_small([(digest_of(each), each) for each in objects])
    bad = store.index.submit(failing)
    held.set()
    kept.result(DEADLINE_S)
    assert isinstance(bad.exception(DEADLINE_S), ValueError)
    first.result(DEADLINE_S)
    assert tries == 2, "the batch failed as a whole first"
    (pack,) = packs_of(store)
    assert pack.stat().st_size == sum(map(len, objects))
    assert_sound(store)


def test_a_full_disk_is_told_and_forgotten(tmp_path: Path) -> None:
    objects = small_objects()
    with small_disk(tmp_path / "disk", 4 << 20) as disk, Store(disk / "store") as store:
        keep(store, objects[:100])
        filler = fill(disk, 60_000)
        with pytest.raises(NoRoom):
            keep(store, objects[100:])
        assert len(store.all_digests()) == 100
        (pack,) = packs_of(store)
        assert pack.stat().st_size == sum(map(len, objects[:100])), "room is given back"
        filler.unlink()
        keep(store, objects[100:])
        assert len(store.all_digests()) == COUNT
        assert_sound(store)


# ---- giving room back


def test_room_of_what_was_dropped_is_given_back(store_dir: Path) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects[:150])
        keep(store, objects[150:])
    needed = objects[40:90]
    with Store(store_dir) as store:
        for each in needed:
            upkeep.pin(store, digest_of(each))
        upkeep.collect(store)
        (pack,) = packs_of(store)
        assert pack.stat().st_size == sum(map(len, needed))
        assert_sound(store)
        assert set(store.all_digests()) == {digest_of(each) for each in needed}
    with Store(store_dir) as store:
        for each in needed:
            upkeep.unpin(store, digest_of(each))
        upkeep.collect(store)
        assert packs_of(store) == []
        assert store.index.query("SELECT COUNT(*) FROM packs") == [(0,)]


def test_a_pack_is_left_alone_while_more_than_half_of_it_lives(store_dir: Path) -> None:
    objects = small_objects(100)
    with Store(store_dir) as store:
        keep(store, objects)
        (pack,) = packs_of(store)
        for each in objects[40:]:
            upkeep.pin(store, digest_of(each))
    with Store(store_dir) as store:
        upkeep.collect(store)
        assert packs_of(store) == [pack]
        assert_sound(store)


def test_a_full_disk_does_not_keep_room_from_being_given_back(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small_objects(100, 1), small_objects(100, 50)
    for objects in (first, second):
        with Store(store_dir) as store:
            keep(store, objects)
            for each in second[:40] if objects is second else ():
                upkeep.pin(store, digest_of(each))

    def full(parts: Sequence[bytes]) -> packs_module.Written:
        raise NoRoom("no room on disk")

    with Store(store_dir) as store:
        with monkeypatch.context() as patched:
            patched.setattr(store.packs, "append", full)
            upkeep.collect(store)
        assert len(packs_of(store)) == 1, "of the first nothing is left"
        assert set(store.all_digests()) == set(map(digest_of, second[:40]))
        assert_sound(store)
        upkeep.collect(store)
        (pack,) = packs_of(store)
        assert pack.stat().st_size == sum(map(len, second[:40]))
        assert_sound(store)


def test_what_is_moved_while_it_is_read_is_found_again(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects)
        for each in objects[:50]:
            upkeep.pin(store, digest_of(each))
    with Store(store_dir) as store, Store(store_dir) as other:
        real = store.packs.read
        reads = 0

        def read(spots: Sequence[packs_module.PackSpot]) -> list[bytes | None]:
            nonlocal reads
            reads += 1
            if reads == 1:
                upkeep.collect(other)
            return real(spots)

        monkeypatch.setattr(store.packs, "read", read)
        wanted = [(digest_of(each), len(each)) for each in objects[:60]]
        assert store.read_small(wanted) == [*objects[:50], *[None] * 10]
        assert reads == 2


def test_what_is_damaged_is_not_moved(store_dir: Path) -> None:
    objects = small_objects()
    with Store(store_dir) as store:
        keep(store, objects)
        (pack,) = packs_of(store)
        for each in objects[:50]:
            upkeep.pin(store, digest_of(each))
    with pack.open("r+b") as file:
        file.write(bytes(10))
    with Store(store_dir) as store:
        upkeep.collect(store)
        assert pack.exists()
        with pytest.raises(StoreDamaged):
            check_object(store, digest_of(objects[0]))
        assert check_object(store, digest_of(objects[1])) == len(objects[1])


# ---- stores of the first version


def test_a_store_without_packs_is_brought_up_to_date(store_dir: Path) -> None:
    objects = small_objects(40)
    large = random_bytes(3 << 20, 30)
    with Store(store_dir):
        pass
    (store_dir / "index.db").unlink()
    for name in files_below(store_dir):
        assert not name.startswith("index.db"), "a log would be taken for the new one's"
    (store_dir / "packs").rmdir()
    database = sqlite3.connect(store_dir / "index.db")
    database.executescript(index_module._SCHEMA)
    database.executescript(
        "CREATE INDEX objects_head ON objects(head); PRAGMA user_version=1;"
        "CREATE TRIGGER object_added AFTER INSERT ON objects"
        "    BEGIN UPDATE changes SET objects = objects + 1; END;"
    )
    database.executemany(
        "INSERT INTO objects(digest, size, place, data, chunk_list, head) VALUES(?,?,0,?,x'',?)",
        [(digest_of(each), len(each), each, i) for i, each in enumerate(objects)],
    )
    database.commit()
    database.close()
    with Store(store_dir) as store:
        assert len(store.all_digests()) == 40
        assert_sound(store)
        assert store.change_count()[1] == 40
        keep(store, small_objects(30, 60))
        store.put_blob(large)
        assert store.change_count()[1] == 40 + 30 + 2
        assert_sound(store)
    assert edit_index(store_dir, "PRAGMA user_version") == [(index_module.SCHEMA_VERSION,)]


def test_the_index_of_first_chunks_is_used(store: Store) -> None:
    plan = store.index.query(
        "EXPLAIN QUERY PLAN SELECT 1 FROM objects WHERE head=? AND place IN (1, 2) LIMIT 1", (5,)
    )
    assert "objects_head" in str(plan)


def test_a_download_keeps_what_comes_together_in_a_pack(store: Store, store_dir: Path) -> None:
    objects = {digest_of(each): each for each in small_objects()}
    table = ObjectTable([ObjectRef(d, len(objects[d]), b"") for d in sorted(objects)])
    wanted = store.want(table, range(len(table)))
    wanted.write_small([(i, objects[table.digest(i)]) for i in range(len(table))])
    wanted.wait_ended()
    assert rows_in_packs(store_dir) == COUNT
    assert_sound(store)


def test_an_older_program_is_told_that_it_is_too_old(store_dir: Path) -> None:
    with Store(store_dir):
        pass
    (version,) = edit_index(store_dir, "PRAGMA user_version")[0]
    assert version == 2, "it is by this number that version 1 refuses a store with packs"


def test_packs_survive_another_process(store_dir: Path) -> None:
    objects = small_objects(30)
    with Store(store_dir) as store:
        keep(store, objects)
    assert (
        run_python(
            "import sys; from pathlib import Path; from tensorswarm.store.store import Store\n"
            "with Store(Path(sys.argv[1])) as store: print(len(store.all_digests()))",
            store_dir,
        )
        == "30\n"
    )
