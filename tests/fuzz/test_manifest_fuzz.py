"""Manifests from hostile peers.

The invariant: bytes are either refused with ``BadInput``, whose message is one short
printable line, or they are the one encoding of a manifest that keeps every rule. No
other exception.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorswarm.store.digest import CHUNK_SIZE, EMPTY_DIGEST
from tensorswarm.store.dtypes import DTYPE_BITS
from tensorswarm.store.errors import BadInput
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.names import check_paths

EXAMPLES = 200
"""Per test; together they take some seconds."""

SEED = bytes.fromhex(
    json.loads((Path(__file__).parents[1] / "vectors" / "manifest.json").read_text("utf-8"))[
        "manifest"
    ]
)
ROWS: list[Any] = msgpack.unpackb(SEED)


def decode(data: bytes) -> Manifest | None:
    try:
        manifest = Manifest.decode(data)
    except BadInput as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1500
        return None
    assert manifest.encode() == data
    check_invariant(manifest)
    return manifest


def check_invariant(manifest: Manifest) -> None:
    objects = manifest.objects
    assert manifest.files
    assert [o.digest for o in objects] == sorted({o.digest for o in objects})
    for item in objects:
        assert (item.size_bytes == 0) == (item.digest == EMPTY_DIGEST)
        assert len(item.chunk_list) == (32 if item.size_bytes > CHUNK_SIZE else 0)
    paths = [entry.path for entry in manifest.files]
    assert paths == sorted(set(paths))
    check_paths(paths)
    used: set[int] = set()
    for entry in manifest.files:
        assert min(entry.parts, default=0) >= 0
        assert sum(objects[i].size_bytes for i in entry.parts) == entry.size_bytes
        assert all(objects[i].size_bytes for i in entry.parts)
        assert len({tensor.name for tensor in entry.tensors}) == len(entry.tensors)
        for tensor in entry.tensors:
            bits = DTYPE_BITS[tensor.dtype]
            for length in tensor.shape:
                bits *= length
            assert tensor.object_index >= 0
            assert bits == 8 * objects[tensor.object_index].size_bytes
            assert bits == 0 or tensor.object_index in entry.parts
        used.update(entry.parts, (tensor.object_index for tensor in entry.tensors))
    assert used == set(range(len(objects)))


def test_the_seed_is_good() -> None:
    assert decode(SEED) is not None


@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    decode(data)


@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=80), st.integers(0, len(SEED)))
def test_any_bytes_behind_a_good_start(data: bytes, start: int) -> None:
    decode(SEED[:start] + data)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SEED)),
            st.integers(0, 8),
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from(
                    [b"\x90", b"\x80", b"\xc0", b"\xc3", b"\xdd\xff\xff\xff\xff", b"\xc6" * 5]
                    + [b"\xca" + bytes(4), b"\xd6\xff" + bytes(4), b"\xff", b"\xa1\xff"]
                ),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_bytes(changes: list[tuple[int, int, bytes]]) -> None:
    data = SEED
    for at, removed, inserted in changes:
        data = data[:at] + inserted + data[at + removed :]
    decode(data)


def test_every_single_bit() -> None:
    for position in range(len(SEED)):
        for bit in range(8):
            data = bytearray(SEED)
            data[position] ^= 1 << bit
            decode(bytes(data))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([2**20, 2**20 + 1, 2**44, 2**44 + 1, 2**63, 2**64 - 1, -(2**63)]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["a", "../x", "a/b", "verbatim", "U8", "F32", "\u00e9", "e\u0301"]),
    st.binary(max_size=5),
    st.sampled_from([EMPTY_DIGEST, bytes(32), b"\x01" * 32]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=2), st.binary(max_size=2)), inner, max_size=2),
    ),
    max_leaves=10,
)


@settings(max_examples=EXAMPLES)
@given(values)
def test_any_messagepack(value: Any) -> None:
    decode(msgpack.packb(value))


def places(value: list[Any]) -> list[tuple[list[Any], int]]:
    found: list[tuple[list[Any], int]] = []
    for i, item in enumerate(value):
        found.append((value, i))
        if isinstance(item, list):
            found += places(item)
    return found


PLACES = len(places(ROWS))


@settings(max_examples=2 * EXAMPLES)
@given(
    st.lists(
        st.tuples(
            st.integers(0, PLACES - 1),
            st.sampled_from(["replace", "replace", "delete", "repeat", "swap"]),
            values,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_mutated_fields(changes: list[tuple[int, str, Any]]) -> None:
    rows = copy.deepcopy(ROWS)
    for number, action, value in changes:
        spots = places(rows)
        container, i = spots[number % len(spots)]
        if action == "replace":
            container[i] = value
        elif action == "delete":
            del container[i]
        elif action == "repeat":
            container.insert(i, copy.deepcopy(container[i]))
        else:
            container[i], container[-1] = container[-1], container[i]
        if not rows:
            break
    decode(msgpack.packb(rows))


model_rows = st.tuples(
    st.just(1),
    st.lists(
        st.tuples(
            st.sampled_from([bytes([i]) * 32 for i in range(4)] + [EMPTY_DIGEST]),
            st.integers(0, 3),
            st.just(b""),
        ),
        max_size=3,
    ).map(sorted),
    st.lists(
        st.tuples(
            st.sampled_from(["a", "A", "b", "b/c", "..", "c"]),
            st.integers(0, 4),
            st.just("verbatim"),
            st.lists(st.integers(0, 3), max_size=2),
            st.lists(
                st.tuples(
                    st.sampled_from(["x", "y", ""]),
                    st.sampled_from(["U8", "I8", "F16", "F4"]),
                    st.lists(st.integers(0, 3), max_size=1),
                    st.integers(0, 3),
                ),
                max_size=2,
            ),
        ),
        min_size=1,
        max_size=2,
    ).map(sorted),
)


@settings(max_examples=3 * EXAMPLES)
@given(model_rows)
def test_rows_of_the_right_shape(rows: tuple[Any, ...]) -> None:
    decode(msgpack.packb(rows))
