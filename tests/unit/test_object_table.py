"""Objects in columns and encoded tensors: the same as tuples, at a part of the memory."""

from __future__ import annotations

import tracemalloc

import pytest

from tensorswarm.store.digest import digest_of
from tensorswarm.store.manifest import Manifest, ManifestBuilder, ObjectRef
from tensorswarm.store.object_table import ObjectTable

SMALL, LARGE = 5, 3 << 20


def refs(count: int) -> list[ObjectRef]:
    """Return objects in order, every third of several chunks."""
    digests = sorted(digest_of(b"%d" % i) for i in range(count))
    return [
        ObjectRef(digest, LARGE if i % 3 == 0 else SMALL, digest_of(digest) if i % 3 == 0 else b"")
        for i, digest in enumerate(digests)
    ]


def test_a_table_equals_a_tuple() -> None:
    rows = refs(3000)  # more than a block
    table = ObjectTable(rows)
    assert table == tuple(rows)
    assert tuple(rows) == table
    assert hash(table) == hash(tuple(rows))
    assert table[-1] == rows[-1]
    assert table[5:2000:7] == tuple(rows[5:2000:7])
    with pytest.raises(IndexError):
        table[3000]


def test_objects_are_found_by_digest() -> None:
    rows = refs(500)
    table = ObjectTable(rows)
    assert [table.find(row.digest) for row in rows] == list(range(500))
    assert table.find(digest_of(b"not there")) == -1
    assert ObjectTable().find(rows[0].digest) == -1


def test_digests_that_begin_alike_are_told_apart() -> None:
    digests = [b"12345678" + bytes([i]) * 24 for i in range(9)]
    table = ObjectTable([ObjectRef(digest, SMALL, b"") for digest in digests])
    assert [table.find(digest) for digest in digests] == list(range(9))
    assert table.find(b"12345678" + bytes([9]) * 24) == -1


def test_a_decoded_manifest_takes_little_memory() -> None:
    """What is kept of a tensor beside its encoding: 73 bytes, and its part's number."""
    count = 20_000
    builder = ManifestBuilder()
    rows = refs(count)
    named = [(f"layers.{i}.weight", "U8", (ref.size_bytes,), ref) for i, ref in enumerate(rows)]
    builder.add_file("model.bin", "verbatim", rows, named)
    data = builder.build().encode()
    tracemalloc.start()
    try:
        manifest = Manifest.decode(data)
        kept, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(manifest.files[0].tensors) == count
    freed = 3 * 2000 * 100  # tuples that the interpreter keeps for later, of each length
    assert kept < 120 * count + freed
    assert highest < 800 * count + len(data), "one file's tensors at a time"
    assert manifest.encode() is data
