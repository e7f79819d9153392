"""A tensor that grew takes the chunks of its older form, and nothing that is not proved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.incoming import Incoming
from tensorswarm.store.relatives import MAX_RELATIVES, copy_from_relatives
from tensorswarm.store.store import Store
from tests.support.store_world import (
    DEADLINE_S,
    MIB,
    begin,
    bytes_of,
    chunk_of,
    digest_of,
    random_bytes,
    receive_all,
)

OLD = random_bytes(3 * MIB + 500, 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def missing_chunks(incoming: Incoming) -> list[int]:
    return [i for i in range(incoming.chunk_count) if incoming.is_missing(i)]


def test_appended_rows_leave_only_their_own_chunks_missing(store: Store) -> None:
    receive_all(store, OLD)
    grown = OLD + random_bytes(MIB, 2)
    incoming = begin(store, grown)
    assert copy_from_relatives(store, [incoming]) == 3 * MIB
    assert missing_chunks(incoming) == [3, 4]
    receive_all(store, grown)
    assert bytes_of(store, digest_of(grown)) == grown


def test_a_shrunk_tensor_may_be_here_altogether(store: Store) -> None:
    receive_all(store, OLD)
    shrunk = OLD[: 2 * MIB]
    incoming = begin(store, shrunk)
    assert copy_from_relatives(store, [incoming]) == 2 * MIB
    incoming.finished.result(DEADLINE_S)
    assert bytes_of(store, digest_of(shrunk)) == shrunk


def test_rows_put_in_between_leave_the_chunks_that_did_not_move(store: Store) -> None:
    receive_all(store, OLD)
    moved = OLD[: 2 * MIB] + random_bytes(MIB, 3) + OLD[2 * MIB :]
    incoming = begin(store, moved)
    copy_from_relatives(store, [incoming])
    assert missing_chunks(incoming) == [2]  # the one behind it lies whole in a new place


def test_an_object_of_just_one_chunk_is_a_relative_too(store: Store) -> None:
    receive_all(store, OLD[:CHUNK_SIZE])
    incoming = begin(store, OLD)
    assert copy_from_relatives(store, [incoming]) == CHUNK_SIZE
    assert missing_chunks(incoming) == [1, 2, 3]


def test_strangers_and_small_objects_give_nothing(store: Store) -> None:
    receive_all(store, OLD)
    strangers = [begin(store, random_bytes(2 * MIB, 4)), begin(store, random_bytes(100, 5))]
    assert copy_from_relatives(store, strangers) == 0
    assert [each.missing_bytes() for each in strangers] == [2 * MIB, 100]


def test_a_damaged_relative_gives_only_what_still_matches(store: Store) -> None:
    receive_all(store, OLD)
    path = store.place.object_path(digest_of(OLD))
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"not what was hashed")
    grown = OLD + random_bytes(MIB, 6)
    incoming = begin(store, grown)
    assert copy_from_relatives(store, [incoming]) == MIB
    assert missing_chunks(incoming) == [1, 2, 3, 4]
    receive_all(store, grown)
    assert bytes_of(store, digest_of(grown)) == grown


def test_a_relative_that_was_taken_away_is_none(store: Store) -> None:
    receive_all(store, OLD)
    store.place.object_path(digest_of(OLD)).unlink()
    assert copy_from_relatives(store, [begin(store, OLD + b"more")]) == 0


def test_only_the_latest_relatives_are_read(store: Store) -> None:
    first = random_bytes(MIB, 7)
    rare = random_bytes(MIB, 8)
    receive_all(store, first + rare + b"oldest")
    for number in range(MAX_RELATIVES):
        receive_all(store, first + random_bytes(MIB, 9 + number))
    incoming = begin(store, first + rare + b"wanted")
    assert copy_from_relatives(store, [incoming]) == MIB
    incoming.write_chunk(1, chunk_of(first + rare, 1))
    assert missing_chunks(incoming) == [2]
