"""The store after kills and power cuts, on damaged and on full disks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorswarm.store.digest import chunk_list_of, digest_of
from tensorswarm.store.errors import LocalError, NoRoom, StoreDamaged
from tensorswarm.store.manifest import ObjectRef
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
    cut_the_power,
    edit_index,
    files_below,
    fill,
    random_bytes,
    receive_all,
    rubbish,
    run_python,
    small_disk,
)

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
