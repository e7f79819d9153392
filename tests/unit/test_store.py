"""The store: what is put in is what comes out, and nothing false is ever visible."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST, chunk_list_of, digest_of
from tensorswarm.store.errors import BadInput, HashMismatch, LocalError, StoreDamaged
from tensorswarm.store.incoming import ChunkMismatch
from tensorswarm.store.index import SCHEMA_VERSION
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest, ManifestBuilder, ObjectRef
from tensorswarm.store.objects import INLINE_LIMIT
from tensorswarm.store.records import NewObject, head_of
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
    edit_index,
    files_below,
    random_bytes,
    random_model,
    receive_all,
    ref_of,
    rubbish,
    shuffled,
    write_safetensors,
)

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
    edit_index(store_dir, f"PRAGMA user_version={SCHEMA_VERSION}")
    with Store(store_dir):
        pass


def test_chunk_size_is_what_these_tests_believe() -> None:
    assert CHUNK_SIZE == MIB
