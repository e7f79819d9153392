"""Files that change: while they are added, and afterwards when they were not copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tensorswarm.store import ingest, records
from tensorswarm.store.digest import digest_of
from tensorswarm.store.errors import BadInput
from tensorswarm.store.ingest import add_paths, describe_paths
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    Meddler,
    assert_sound,
    become_fifo,
    become_folder,
    bytes_of,
    cut,
    cut_the_power,
    edit_index,
    files_below,
    grow,
    random_model,
    receive_all,
    replace,
    rewrite,
    rubbish,
    state_of,
    vanish,
)

both_ways = pytest.mark.parametrize("copy", [True, False], ids=["copied", "adopted"])


@pytest.mark.parametrize("change", [rewrite, grow, cut])
@both_ways
def test_file_that_changes_while_it_is_read(
    store: Store, tmp_path: Path, change: Callable[[Path], object], copy: bool
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    before = state_of(store)
    with pytest.raises(BadInput, match=r"changed while|cannot be read"):
        add_paths(store, [path], copy=copy, progress=Meddler(path, change, 200_000))
    assert state_of(store) == before
    assert rubbish(store.root) == []


def test_file_that_changes_between_its_header_and_its_bytes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header that was parsed would not be the header that is kept."""
    path = random_model(tmp_path / "m.safetensors", [100, 200])
    other = random_model(tmp_path / "other", [200, 100], seed=3).read_bytes()
    assert len(other) == path.stat().st_size
    real = ingest.read_sources

    def read_then_change(paths: Sequence[Path], verbatim: Sequence[str]) -> object:
        sources = real(paths, verbatim)
        path.write_bytes(other)
        return sources

    monkeypatch.setattr(ingest, "read_sources", read_then_change)
    for call in (lambda: add_paths(store, [path]), lambda: describe_paths([path])):
        path.write_bytes(other)
        with pytest.raises(BadInput, match="changed while"):
            call()
    assert state_of(store) == ([], [], [])


# ---- adopted files

CHANGES = [rewrite, replace, grow, cut, vanish, become_folder, become_fifo]


@pytest.fixture
def adopted(store: Store, tmp_path: Path) -> tuple[Path, Manifest]:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    return path, add_paths(store, [path], copy=False).manifest


def test_adopting_copies_nothing(store: Store, adopted: tuple[Path, Manifest]) -> None:
    assert files_below(store.root / "objects") == []
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_adopted_file_is_not_given_out(
    store: Store, adopted: tuple[Path, Manifest], change: Callable[[Path], object]
) -> None:
    path, manifest = adopted
    readers = [store.open_reader(ref.digest) for ref in manifest.objects]
    change(path)
    large = [ref for ref in manifest.objects if ref.size_bytes > INLINE_LIMIT]
    assert len(large) == 3
    for ref in large:
        assert not store.has(ref.digest)
        assert store.open_reader(ref.digest) is None
        assert store.get_blob(ref.digest, 3 * MIB) is None
        assert ref.digest not in store.holdings([ref.digest])
        assert ref.digest not in store.all_digests()
    assert len(store.missing_objects(manifest, range(len(manifest.objects)))) == 3
    for ref, reader in zip(manifest.objects, readers, strict=True):
        assert reader is not None
        data = bytearray(ref.size_bytes)
        try:
            reader.read_into(0, memoryview(data))
        except OSError:
            assert ref in large
        else:
            assert digest_of(data) == ref.digest, "an open reader gave what is not the object"
        reader.close()
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copy", [True, False])
def test_content_of_a_changed_adopted_file_can_come_again(
    store: Store,
    adopted: tuple[Path, Manifest],
    tmp_path: Path,
    change: Callable[[Path], object],
    copy: bool,
) -> None:
    path, manifest = adopted
    elsewhere = tmp_path / "elsewhere" / "m.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(path.read_bytes())
    change(path)
    ingested = add_paths(store, [elsewhere], copy=copy)
    assert ingested.manifest == manifest
    assert ingested.new_bytes == 200_000 + 2 * MIB + 300_000
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    assert_sound(store)


@pytest.mark.parametrize("change", CHANGES)
def test_content_of_a_changed_adopted_file_can_be_received(
    store: Store, adopted: tuple[Path, Manifest], change: Callable[[Path], object]
) -> None:
    path, manifest = adopted
    contents = [bytes_of(store, ref.digest) for ref in manifest.objects]
    change(path)
    for data in contents:
        assert data is not None
        receive_all(store, data)
    assert store.missing_objects(manifest, range(len(manifest.objects))) == []
    assert_sound(store)


def test_changed_file_is_added_again(store: Store, adopted: tuple[Path, Manifest]) -> None:
    path, manifest = adopted
    rewrite(path)
    ingested = add_paths(store, [path], copy=False)
    assert ingested.manifest != manifest
    assert ingested.new_bytes == 200_000 + 2 * MIB + 300_000
    assert_sound(store)
    assert len(store.missing_objects(manifest, range(len(manifest.objects)))) == 1
    assert len(store.adopted.all()) == 1


def test_touched_file_is_hashed_again_when_the_store_opens(store_dir: Path, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, 2 * MIB, 300_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
        everything = range(len(manifest.objects))
        os.utime(path, (1, 1))
        assert len(store.missing_objects(manifest, everything)) == 3
        with Store(store_dir):
            pass
        assert store.missing_objects(manifest, everything) == []
        rewrite(path)
        with Store(store_dir) as other:
            assert len(other.missing_objects(manifest, everything)) == 1
            assert_sound(other)
        assert len(store.missing_objects(manifest, everything)) == 1


def test_vanished_file_may_come_back(store_dir: Path, tmp_path: Path) -> None:
    """As a disk does that is mounted later."""
    path = random_model(tmp_path / "disk" / "m.safetensors", [200_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
    path.parent.rename(tmp_path / "away")
    with Store(store_dir) as store:
        assert len(store.missing_objects(manifest, range(2))) == 1
        assert_sound(store)
        (tmp_path / "away").rename(path.parent)
        assert store.missing_objects(manifest, range(2)) == []
        assert_sound(store)


def test_power_cut_after_adopting(store_dir: Path, tmp_path: Path) -> None:
    """The user's own file may be torn too: its times and size can outlive its bytes."""
    path = random_model(tmp_path / "m.safetensors", [200_000, 300_000])
    with Store(store_dir) as store:
        manifest = add_paths(store, [path], copy=False).manifest
    cut_the_power(store_dir)
    rewrite(path)
    stat = path.stat()
    state = (stat.st_mtime_ns, stat.st_ctime_ns)
    edit_index(store_dir, "UPDATE adopted_files SET mtime_ns=?, ctime_ns=?", state)
    with Store(store_dir) as store:
        assert_sound(store)
        assert len(store.missing_objects(manifest, range(3))) == 1
        assert store.sync() == 1
    cut_the_power(store_dir)
    assert edit_index(store_dir, "SELECT COUNT(*) FROM objects WHERE boot IS NOT NULL") == [(0,)]


def test_dropping_an_adopted_object_leaves_the_file(
    store: Store, adopted: tuple[Path, Manifest]
) -> None:
    path, manifest = adopted
    before = path.read_bytes()
    store.forget([ref.digest for ref in manifest.objects])
    assert path.read_bytes() == before
    assert store.adopted.all() == []


def test_own_copy_is_not_replaced_by_an_adopted_one(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [200_000])
    manifest = add_paths(store, [path]).manifest
    add_paths(store, [path], copy=False)
    path.unlink()
    assert store.missing_objects(manifest, range(2)) == []
    assert_sound(store)


@pytest.mark.parametrize(
    ("ctime_ns", "now_ns", "slept_s"),
    [
        (5_000_000_001, 5_000_000_001, 0.02),
        (5_000_000_001, 5_015_000_001, 0.005),
        (5_000_000_001, 5_020_000_001, None),
        (5_000_000_001, 4_000_000_000, None),  # a clock that was set back: nothing to wait for
        (5_000_000_000, 5_500_000_000, 1.5),  # whole seconds: a coarse clock, perhaps
        (5_000_000_000, 7_000_000_000, None),
    ],
)
def test_wait_for_the_clock(
    monkeypatch: pytest.MonkeyPatch, ctime_ns: int, now_ns: int, slept_s: float | None
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(records.time, "time_ns", lambda: now_ns)
    monkeypatch.setattr(records.time, "sleep", slept.append)
    records.wait_for_clock(records.FileState(1, 1, ctime_ns, 1))
    assert slept == ([] if slept_s is None else [pytest.approx(slept_s)])


def test_change_within_one_tick_of_the_clock(tmp_path: Path, store: Store) -> None:
    """A file written just now is hashed only when a further change would show."""
    path = random_model(tmp_path / "m.safetensors", [200_000])
    for _ in range(20):
        with path.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(os.urandom(10))
        manifest = add_paths(store, [path], copy=False).manifest
        with path.open("r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(os.urandom(10))
        assert len(store.missing_objects(manifest, range(2))) == 1
