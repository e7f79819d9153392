"""The safetensors reader under hostile bytes.

The invariant: a file is either refused with ``BadInput``, whose message is one short
printable line, or its pieces tile it and its tensors are what its header says. No
other exception, and no read outside the header.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tensorswarm.store.dtypes import DTYPE_BITS
from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats import Layout, layout_of

EXAMPLES = 150
"""Per test; together they take some seconds."""


def parse(data: bytes, size_bytes: int | None = None) -> Layout | None:
    """Parse a file that may be longer than its bytes given here; check the invariant."""
    size_bytes = len(data) if size_bytes is None else size_bytes
    header_end = min(8 + int.from_bytes(data[:8], "little"), size_bytes)

    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= header_end, "read outside the header"
        return data[offset : offset + length]

    try:
        layout = layout_of("m.safetensors", size_bytes, read_at)
    except BadInput as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1500
        return None
    check_invariant(layout, size_bytes, json.loads(data[8:header_end]))
    return layout


def check_invariant(layout: Layout, size_bytes: int, header: dict[str, Any]) -> None:
    position = 0
    for piece in layout.pieces:
        assert piece.offset == position
        assert piece.size_bytes > 0
        position += piece.size_bytes
    assert position == size_bytes

    header.pop("__metadata__", None)
    start = layout.pieces[0].size_bytes
    ranges = set()
    assert sorted(tensor.name for tensor in layout.tensors) == sorted(header)
    for tensor in layout.tensors:
        said = header[tensor.name]
        assert tensor.dtype == said["dtype"]
        assert list(tensor.shape) == said["shape"]
        assert tensor.offset == start + said["data_offsets"][0]
        assert tensor.offset + tensor.size_bytes == start + said["data_offsets"][1]
        bits = DTYPE_BITS[tensor.dtype]
        for length in tensor.shape:
            bits *= length
        assert bits == 8 * tensor.size_bytes
        if tensor.size_bytes:
            ranges.add((tensor.offset, tensor.size_bytes))
    assert ranges == {piece[:2] for piece in layout.pieces if piece.is_tensor}
    assert [piece.is_tensor for piece in layout.pieces] == [False] + [True] * len(ranges)


def file_of(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


# ---- valid files

byte_dtypes = st.sampled_from(sorted(name for name, bits in DTYPE_BITS.items() if bits >= 8))
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def valid_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Return a header and the bytes of tensors it describes."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.text(max_size=8), max_size=6, unique=True)):
        dtype, shape = draw(byte_dtypes), draw(shapes)
        size_bytes = DTYPE_BITS[dtype] // 8
        for length in shape:
            size_bytes *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    names = draw(st.permutations(sorted(header)))
    header = {name: header[name] for name in names}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
    return header, end


@settings(max_examples=EXAMPLES)
@given(valid_headers(), st.booleans(), st.integers(0, 9))
def test_valid_files_are_read(
    model: tuple[dict[str, Any], int], ascii_only: bool, padding: int
) -> None:
    header, buffer_bytes = model
    data = file_of(json.dumps(header, ensure_ascii=ascii_only).encode() + b" " * padding)
    assert parse(data, len(data) + buffer_bytes) is not None


@settings(max_examples=EXAMPLES)
@given(valid_headers(), st.integers(-40, 40).filter(bool))
def test_valid_files_of_another_length_are_refused(
    model: tuple[dict[str, Any], int], longer: int
) -> None:
    header, buffer_bytes = model
    data = file_of(json.dumps(header).encode())
    size_bytes = max(len(data) + buffer_bytes + longer, 0)
    assert parse(data[:size_bytes], size_bytes) is None


# ---- mutated files

splices = st.lists(
    st.tuples(
        st.floats(0, 1),  # where, as a share of the length
        st.integers(0, 12),  # how many bytes go
        st.one_of(
            st.binary(max_size=6),
            st.sampled_from(
                [b"-", b"0", b"1", b"9" * 30, b"1.5", b"1e9", b"null", b"true", b"NaN", b'"', b"{"]
                + [b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\xff", b"[" * 2000]
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


def spliced(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for share, removed, inserted in changes:
        at = int(share * len(data))
        data = data[:at] + inserted + data[at + removed :]
    return data


@settings(max_examples=EXAMPLES)
@given(valid_headers(), splices, st.booleans())
def test_mutated_files(
    model: tuple[dict[str, Any], int], changes: list[tuple[float, int, bytes]], mend: bool
) -> None:
    header, buffer_bytes = model
    if mend:  # keep the length right, so that the header is looked at
        data = file_of(spliced(json.dumps(header).encode(), changes))
    else:
        data = spliced(file_of(json.dumps(header).encode()), changes)
    parse(data, len(data) + buffer_bytes)


@settings(max_examples=EXAMPLES)
@given(valid_headers(), st.data())
def test_one_value_replaced(model: tuple[dict[str, Any], int], data: st.DataObject) -> None:
    header, buffer_bytes = model
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(header)
    if places:
        container, key = data.draw(st.sampled_from(places), label="place")
        container[key] = data.draw(json_values, label="value")
    file = file_of(json.dumps(header, allow_nan=True).encode())
    parse(file, len(file) + buffer_bytes)


# ---- anything

numbers = st.one_of(
    st.integers(-2, 40), st.integers(), st.floats(), st.sampled_from([2**63, 2**64, 10**25])
)
keys = st.one_of(
    st.text(max_size=4), st.sampled_from(["__metadata__", "dtype", "shape", "data_offsets"])
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=4), byte_dtypes),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(byte_dtypes, st.sampled_from(["F4", "F6_E2M3", "f32"])),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(st.one_of(st.integers(0, 20), numbers), max_size=3),
    },
)


@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=60))
@example(b"")
@example(b"\xff" * 8)
def test_any_bytes_as_a_file(data: bytes) -> None:
    parse(data)


@settings(max_examples=EXAMPLES)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: b"{" + b + b"}")))
@example(b'{"a":' * 50_000)
@example(b'{"a":[' + b"[" * 50_000)
@example(b'{"a":' + b"9" * 50_000 + b"}")
def test_any_bytes_as_a_header(header: bytes) -> None:
    parse(file_of(header))


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(keys, json_values, max_size=4), st.integers(0, 20))
def test_any_json_as_a_header(header: dict[str, Any], buffer_bytes: int) -> None:
    data = file_of(json.dumps(header).encode())
    parse(data, len(data) + buffer_bytes)


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(keys, entries, max_size=4), st.integers(0, 20))
def test_any_table_as_a_header(header: dict[str, Any], buffer_bytes: int) -> None:
    data = file_of(json.dumps(header).encode())
    parse(data, len(data) + buffer_bytes)
