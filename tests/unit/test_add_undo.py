"""Adding that fails: full disks, interruptions, and others who add at the same time."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from tensorswarm.store.errors import BadInput, LocalError, NoRoom
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.place import COPY_BUFFER_SIZE
from tensorswarm.store.store import Store
from tests.support.store_world import (
    MIB,
    Meddler,
    assert_sound,
    fill,
    grow,
    random_bytes,
    random_model,
    rubbish,
    run_python,
    small_disk,
    state_of,
    write_safetensors,
)


def test_full_disk_takes_everything_back(tmp_path: Path) -> None:
    old = random_model(tmp_path / "old.safetensors", [100, 200_000])
    new = random_model(tmp_path / "new.safetensors", [100, 60_000, 200_000, 3 * MIB, 30 * MIB], 1)
    with small_disk(tmp_path / "disk", 16 * MIB) as disk, Store(disk / "store") as store:
        add_paths(store, [old])
        before = state_of(store)
        with pytest.raises(NoRoom):
            add_paths(store, [new])
        assert state_of(store) == before
        assert rubbish(store.root) == []
        assert_sound(store)
        add_paths(store, [random_model(tmp_path / "small.safetensors", [100, 3 * MIB], 2)])
        assert_sound(store)


def test_limit_on_file_sizes_takes_everything_back(store_dir: Path, tmp_path: Path) -> None:
    """A full disk of another kind, without root: nothing may be written past a limit."""
    paths = {
        "large": random_model(tmp_path / "large.safetensors", [100, 70_000, 2 * MIB], 1),
        "small": random_model(tmp_path / "small.safetensors", [60_000] * 60, 2),
    }
    with Store(store_dir) as store:
        add_paths(store, [random_model(tmp_path / "old.safetensors", [100, 70_000])])
        before = state_of(store)
    for path in paths.values():
        printed = run_python(
            "import resource, sys; from pathlib import Path\n"
            "from tensorswarm.store.errors import NoRoom\n"
            "from tensorswarm.store.ingest import add_paths\n"
            "from tensorswarm.store.store import Store\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
            "with Store(Path(sys.argv[1])) as store:\n"
            "    try: add_paths(store, [Path(sys.argv[2])])\n"
            "    except NoRoom: print('no room')\n",
            store_dir,
            path,
        )
        assert printed == "no room\n"
        with Store(store_dir) as store:
            assert state_of(store) == before
            assert rubbish(store_dir) == []
            assert_sound(store)
    with Store(store_dir) as store:
        for path in paths.values():
            add_paths(store, [path])
        assert_sound(store)


def test_full_index_takes_everything_back(tmp_path: Path) -> None:
    """Many small tensors: all of it is the index's to take, and to give back when full."""
    new = random_model(tmp_path / "new.safetensors", [60_000] * 400)
    with small_disk(tmp_path / "disk", 16 * MIB) as disk:
        root = disk / "store"
        with Store(root) as store:
            add_paths(store, [random_model(tmp_path / "old.safetensors", [100, 200_000])])
            before = state_of(store)
            with pytest.raises(NoRoom):
                add_paths(store, [new])
            assert state_of(store) == before
            assert_sound(store)
        with Store(root) as store:
            assert state_of(store) == before
            add_paths(store, [random_model(tmp_path / "s.safetensors", [100, 70_000], 2)])
            assert_sound(store)


def test_no_room_for_the_manifest(tmp_path: Path) -> None:
    path = random_model(tmp_path / "new.safetensors", [200_000])
    with small_disk(tmp_path / "disk", 8 * MIB) as disk, Store(disk / "store") as store:
        add_paths(store, [random_model(tmp_path / "old.safetensors", [100])])
        before = state_of(store)
        filler = fill(disk, leave_bytes=4096)
        with pytest.raises(NoRoom):
            add_paths(store, [path])
        filler.unlink()
        assert state_of(store) == before
        assert add_paths(store, [path]).new_bytes == path.stat().st_size
        assert_sound(store)


def test_interrupted_add_takes_everything_back(store: Store, tmp_path: Path) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 200_000, COPY_BUFFER_SIZE + 1, 300_000])

    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    for after in (1, 150_000, COPY_BUFFER_SIZE):
        with pytest.raises(KeyboardInterrupt):
            add_paths(store, [path], progress=Meddler(path, interrupt, after))
        assert state_of(store) == ([], [], [])
        assert rubbish(store.root) == []


def test_failed_add_does_not_take_what_another_relies_on(store_dir: Path, tmp_path: Path) -> None:
    """Two add a shared tensor; the one that brought it fails after the other is done."""
    shared = random_bytes(300_000, 7)
    tiny = random_bytes(50, 8)
    tensors = {"s": ("U8", [len(shared)], shared), "t": ("U8", [50], tiny)}
    rest = {"r": ("U8", [2 * MIB], random_bytes(2 * MIB, 9))}
    failing = write_safetensors(tmp_path / "failing.safetensors", {**tensors, **rest})
    good = write_safetensors(tmp_path / "good.safetensors", tensors)
    with Store(store_dir) as one, Store(store_dir) as two:
        added: list[Manifest] = []

        def meanwhile(_: Path) -> None:
            one.put_blob(tiny)  # known to the other before it begins
            added.append(add_paths(two, [good]).manifest)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            add_paths(one, [failing], progress=Meddler(failing, meanwhile, 300_100))
        assert two.missing_objects(added[0], range(len(added[0].objects))) == []
        assert_sound(two)
        assert len(one.all_digests()) == 1 + len(added[0].objects)


def test_add_begins_anew_when_another_takes_back_what_it_relied_on(
    store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000, 2 * MIB])
    real = Store.put_complete
    calls: list[bool] = []

    def put_complete(self: Store, manifest: Manifest, *rest: Any) -> bool:
        if not calls:
            self.forget([ref.digest for ref in manifest.objects])
        calls.append(real(self, manifest, *rest))
        return calls[-1]

    monkeypatch.setattr(Store, "put_complete", put_complete)
    with Store(store_dir) as store:
        manifest, new_bytes, _ = add_paths(store, [path])
        assert calls == [False, True]
        assert new_bytes == path.stat().st_size
        assert store.missing_objects(manifest, range(len(manifest.objects))) == []
        assert_sound(store)


def test_add_gives_up_when_it_is_robbed_again_and_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000])
    monkeypatch.setattr(Store, "put_complete", lambda *_: False)
    with pytest.raises(LocalError, match="removed from the store"):
        add_paths(store, [path])
    assert state_of(store) == ([], [], [])


def test_undo_that_fails_does_not_hide_the_cause(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model(tmp_path / "m.safetensors", [100, 300_000])

    def undo(*_: object) -> None:
        raise NoRoom("no room to undo")

    monkeypatch.setattr(Store, "undo", undo)
    with pytest.raises(BadInput, match="changed while"):
        add_paths(store, [path], progress=Meddler(path, grow, 1))


def test_threads_of_an_add_end_with_it(store: Store, tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        add_paths(store, [random_model(tmp_path / "m.safetensors", [100, 2 * MIB])])
        with pytest.raises(BadInput):
            add_paths(store, [tmp_path / "missing"])
    gc.collect()
    assert threading.active_count() == before
