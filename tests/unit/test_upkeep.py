"""Removing models and collecting garbage: what anybody needs stays, what nobody needs goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tensorswarm.store import upkeep
from tensorswarm.store.errors import BadInput, NotFound
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tests.support.model_files import WEIGHTS, write_safetensors
from tests.support.store_world import (
    LARGE,
    MIB,
    begin,
    bytes_of,
    chunk_of,
    digest_of,
    random_bytes,
    receive_all,
)

SHARED = np.frombuffer(random_bytes(2 * MIB, 1), np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def add_model(store: Store, folder: Path, own_seed: int, *, copy: bool = True) -> Manifest:
    """Add a model of a shared tensor and one of its own, both of several chunks."""
    folder.mkdir()
    own = np.frombuffer(random_bytes(MIB + 5, own_seed), np.uint8)
    write_safetensors(folder / WEIGHTS, {"shared": SHARED, "own": own})
    return add_paths(store, [folder], copy=copy).manifest


def everything(store: Store) -> set[bytes]:
    return set(store.all_digests())


def test_what_models_share_stays_until_the_last_is_removed(store: Store, tmp_path: Path) -> None:
    first = add_model(store, tmp_path / "first", 10)
    after_first = everything(store)
    second = add_model(store, tmp_path / "second", 11)
    freed = upkeep.remove_models(store, [second.digest])
    assert everything(store) == after_first
    assert MIB < freed.size_bytes < 2 * MIB
    assert store.missing_objects(first, range(len(first.objects))) == []
    assert [record.digest for record in store.models()] == [first.digest]
    upkeep.remove_models(store, [first.digest])
    assert everything(store) == set()
    assert not any(path.is_file() for path in store.place.objects.rglob("*"))


def test_a_pinned_model_is_not_removed(store: Store, tmp_path: Path) -> None:
    model = add_model(store, tmp_path / "model", 10)
    upkeep.pin(store, model.digest)
    before = everything(store)
    with pytest.raises(BadInput, match="pinned"):
        upkeep.remove_models(store, [model.digest])
    assert everything(store) == before
    assert upkeep.unpin(store, model.digest)
    assert not upkeep.unpin(store, model.digest)
    upkeep.remove_models(store, [model.digest])
    assert everything(store) == set()


def test_nothing_goes_when_one_of_several_is_unknown(store: Store, tmp_path: Path) -> None:
    model = add_model(store, tmp_path / "model", 10)
    before = everything(store)
    with pytest.raises(NotFound):
        upkeep.remove_models(store, [model.digest, bytes(32)])
    assert everything(store) == before
    assert len(store.models()) == 1


def test_garbage_is_what_neither_models_nor_pins_need(store: Store, tmp_path: Path) -> None:
    add_model(store, tmp_path / "model", 10)
    before = everything(store)
    kept, lost = LARGE, random_bytes(3 * MIB, 12)
    for tensor in (kept, lost):
        receive_all(store, tensor)
    upkeep.pin(store, digest_of(kept))
    would = upkeep.collect(store, dry_run=True)
    assert bytes_of(store, digest_of(lost)) == lost, "a dry run drops nothing"
    freed = upkeep.collect(store)
    assert freed == would
    assert freed.objects == 2, "the tensor and its chunk list"
    assert bytes_of(store, digest_of(kept)) == kept
    assert everything(store) - before == {digest_of(kept), *chunk_lists(store, digest_of(kept))}
    assert upkeep.collect(store) == (0, 0, 0)


def chunk_lists(store: Store, digest: bytes) -> list[bytes]:
    return [store.records([digest])[digest].chunk_list]


def test_only_what_is_here_can_be_pinned(store: Store) -> None:
    with pytest.raises(NotFound):
        upkeep.pin(store, bytes(32))


def test_parts_of_downloads_go_when_they_are_given_up(store: Store) -> None:
    long_ago = time.time() - 2 * upkeep.PARTIAL_AGE_S
    with Store(store.root) as receiving:
        incoming = begin(receiving, LARGE)
        incoming.write_chunk(0, chunk_of(LARGE, 0))
        path = incoming.path
        os.utime(path, (long_ago, long_ago))
        assert upkeep.collect(receiving).partials == 0, "it is being received"
    os.utime(path)
    assert upkeep.collect(store).partials == 0, "somebody else may be receiving it"
    os.utime(path, (long_ago, long_ago))
    freed = upkeep.collect(store)
    assert freed.partials == 1
    assert freed.size_bytes >= MIB
    assert not path.exists()
    receive_all(store, LARGE)
    assert bytes_of(store, digest_of(LARGE)) == LARGE


def test_what_a_living_process_adds_stays(store: Store, tmp_path: Path) -> None:
    with Store(store.root) as other:
        name = other.place.unique_name()
        other.put_blob(b"half of a model", added_by=name)
        assert upkeep.collect(store).objects == 0
    assert upkeep.collect(store).objects == 1, "the other has ended without a model"


def test_a_model_added_meanwhile_is_not_taken_for_garbage(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its objects lie about as garbage; it gets into the list between look and drop."""
    model = add_model(store, tmp_path / "model", 10)
    store.index.write(lambda db: db.execute("DELETE FROM manifests"))
    look = upkeep._droppable

    def look_then_add(of: Store) -> dict[bytes, int]:
        found = look(of)
        of.put_manifest(model, "came meanwhile")
        return found

    monkeypatch.setattr(upkeep, "_droppable", look_then_add)
    assert upkeep.collect(store).objects == 0
    assert store.missing_objects(model, range(len(model.objects))) == []


def test_files_of_the_users_are_never_touched(store: Store, tmp_path: Path) -> None:
    model = add_model(store, tmp_path / "model", 10, copy=False)
    before = (tmp_path / "model" / WEIGHTS).read_bytes()
    freed = upkeep.remove_models(store, [model.digest])
    assert freed.size_bytes < 10_000
    assert everything(store) == set()
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == before


def test_exports_in_the_store_go_with_their_model(store: Store, tmp_path: Path) -> None:
    model = add_model(store, tmp_path / "model", 10)
    export = store.root / upkeep.EXPORTS / model.model_id
    export.mkdir(parents=True)
    (export / WEIGHTS).write_bytes(b"written by the library")
    (export.parent / "notes.txt").write_text("somebody's own")
    upkeep.remove_models(store, [model.digest])
    assert [path.name for path in export.parent.iterdir()] == ["notes.txt"]
