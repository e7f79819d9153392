"""An object received by several chunk lists at once: which of them others get to see."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorswarm.store.digest import chunk_list_of, digest_of
from tensorswarm.store.errors import HashMismatch
from tensorswarm.store.incoming import Incoming
from tensorswarm.store.manifest import ObjectRef
from tensorswarm.store.store import Holding, Store
from tests.support.store_world import DEADLINE_S, MIB, begin, bytes_of, chunk_of, random_bytes

TRUE = random_bytes(3 * MIB + 17, 1)
FALSE = random_bytes(3 * MIB + 17, 2)
DIGEST = digest_of(TRUE)


def begin_by_list_of(store: Store, data: bytes) -> Incoming:
    """Begin to receive the object TRUE by the chunk list of other bytes."""
    chunk_list = chunk_list_of(data)
    return store.receive(ObjectRef(DIGEST, len(TRUE), digest_of(chunk_list)), chunk_list)


def prove(incoming: Incoming, data: bytes, *chunks: int) -> None:
    for chunk in chunks:
        incoming.write_chunk(chunk, chunk_of(data, chunk))


def assert_shown(store: Store, data: bytes, bitmap: int) -> None:
    """Assert that these chunks of `data`, and no others, are told of and served."""
    holding = Holding(len(TRUE), bytes([bitmap]), digest_of(chunk_list_of(data)))
    assert store.holdings([DIGEST]) == {DIGEST: holding}
    reader = store.open_reader(DIGEST)
    assert reader is not None
    for chunk in range(4):
        expected = chunk_of(data, chunk)
        assert reader.covers(chunk * MIB, len(expected)) == bool(bitmap >> chunk & 1)
        if bitmap >> chunk & 1:
            view = memoryview(bytearray(len(expected)))
            reader.read_into(chunk * MIB, view)
            assert view == expected
    reader.close()


@pytest.mark.parametrize("order", [(TRUE, FALSE), (FALSE, TRUE)], ids=["true first", "false first"])
def test_the_first_to_begin_is_shown(store: Store, order: tuple[bytes, bytes]) -> None:
    first, second = (begin_by_list_of(store, data) for data in order)
    prove(second, order[1], 0, 3)
    prove(first, order[0], 1)
    for _ in range(3):  # whatever is written to the index, and in which order
        assert_shown(store, order[0], 0b0010)
        assert (first.is_shown, second.is_shown) == (True, False)
        assert begin_by_list_of(store, order[1]) is second
        store._receiver.touched(second)
        store._receiver.flush()
        store._receiver.touched(first)
        store._receiver.flush()


def test_the_other_is_shown_when_the_first_proves_false(store: Store) -> None:
    poisoned = begin_by_list_of(store, FALSE)
    honest = begin(store, TRUE)
    prove(honest, TRUE, 0)
    prove(poisoned, FALSE, 0, 1, 2, 3)
    with pytest.raises(HashMismatch):
        poisoned.finished.result(DEADLINE_S)
    assert not poisoned.is_shown
    prove(honest, TRUE, 2)
    assert honest.is_shown
    assert_shown(store, TRUE, 0b0101)
    prove(honest, TRUE, 1, 3)
    honest.finished.result(DEADLINE_S)
    assert store.holdings([DIGEST]) == {DIGEST: Holding(len(TRUE), None, b"")}
    assert bytes_of(store, DIGEST) == TRUE


def test_the_other_is_shown_when_nobody_receives_the_first_any_more(store: Store) -> None:
    first, second = begin_by_list_of(store, FALSE), begin(store, TRUE)
    prove(first, FALSE, 0)
    prove(second, TRUE, 1)
    store._receiver.flush()
    store.index.write(lambda db: None)  # behind it, nothing written before is held on to
    del first
    gc.collect()
    assert_shown(store, FALSE, 0b0001)  # by the index: it was told of so far
    prove(second, TRUE, 2)
    assert_shown(store, TRUE, 0b0110)


def test_what_another_process_shows_does_not_change_with_what_it_writes(store_dir: Path) -> None:
    with Store(store_dir) as one, Store(store_dir) as two:
        first, second = begin_by_list_of(one, FALSE), begin(one, TRUE)
        steps: list[Callable[[], None]] = [
            lambda: prove(first, FALSE, 0),
            lambda: prove(second, TRUE, 1),
            lambda: prove(first, FALSE, 2),
            lambda: prove(second, TRUE, 3),
        ]
        for step, bitmap in zip(steps, (0b0001, 0b0001, 0b0101, 0b0101), strict=True):
            step()
            one._receiver.flush()
            assert_shown(two, FALSE, bitmap)


def test_one_chunk_is_never_shown_in_part(store: Store) -> None:
    data = random_bytes(MIB, 3)
    incoming = begin(store, data)
    assert not incoming.is_shown
    assert store.holdings([digest_of(data)]) == {}
    prove(incoming, data, 0)
    incoming.finished.result(DEADLINE_S)
    assert store.holdings([digest_of(data)]) == {digest_of(data): Holding(MIB, None, b"")}
    assert not incoming.is_shown
