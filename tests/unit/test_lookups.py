"""Rows of many digests are found whichever way is quicker."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tensorswarm.store import lookups
from tensorswarm.store.digest import digest_of
from tensorswarm.store.lookups import rows_of
from tensorswarm.store.store import Store

COLUMNS = "SELECT digest, size FROM objects "


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def fill(store: Store, count: int) -> list[bytes]:
    """Keep objects of four bytes; return their digests, in order."""
    objects = [i.to_bytes(4, "big") for i in range(count)]
    store.keep_small([(digest_of(each), each) for each in objects]).result()
    return sorted(map(digest_of, objects))


def found(store: Store, digests: list[bytes]) -> set[bytes]:
    return {row[0] for row in rows_of(store.index, COLUMNS, digests)}


@pytest.mark.parametrize("count", [0, 1, 31, 32, 500, 2000])
def test_those_that_are_here_are_found(store: Store, count: int) -> None:
    here = fill(store, 2000)
    rng = random.Random(count)
    missing = [rng.randbytes(32) for _ in range(count // 2)]
    for chosen in (here[:count], here[-count:] if count else [], rng.sample(here, count)):
        wanted = [*chosen, *missing]
        rng.shuffle(wanted)
        assert found(store, wanted) & set(wanted) == set(chosen)


def test_an_empty_store_has_none(store: Store) -> None:
    rng = random.Random(1)
    assert rows_of(store.index, COLUMNS, [rng.randbytes(32) for _ in range(100)]) == []


def test_neighbours_are_read_together_and_others_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fill(store, 3000)
    asked: list[str] = []
    query = store.index.query

    def noting(sql: str, parameters: Sequence[bytes] = ()) -> list[tuple[object, ...]]:
        asked.append("range" if "BETWEEN" in sql else "each" if "IN (" in sql else "count")
        return query(sql, parameters)

    monkeypatch.setattr(store.index, "query", noting)
    rows_of(store.index, COLUMNS, here[200:456])
    assert asked == ["count", "range"]
    asked.clear()
    rows_of(store.index, COLUMNS, [*here[100:200], *here[2000:2100], here[1000]])
    assert asked == ["count", "range", "range", "each"]
    asked.clear()
    rows_of(store.index, COLUMNS, here[::20])
    assert asked == ["count", "each"], "most of what lies between belongs to others"
    asked.clear()
    rows_of(store.index, COLUMNS, here[: lookups.RANGE_LEAST - 1])
    assert asked == ["each"]


def test_what_lies_between_is_bounded(store: Store) -> None:
    here = fill(store, 3000)
    rows = rows_of(store.index, COLUMNS, here[500:1000:2])
    assert len(rows) <= 2 * lookups.RANGE_PART * 250
