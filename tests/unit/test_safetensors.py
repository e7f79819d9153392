"""The safetensors reader and its neighbours: vectors, limits, and what it reads."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorswarm.store.digest import MAX_OBJECT_SIZE
from tensorswarm.store.dtypes import (
    DTYPE_BITS,
    MAX_DIMENSIONS,
    numpy_dtype,
    tensor_size_bytes,
)
from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats import layout_of
from tensorswarm.store.formats.layout import (
    Layout,
    Piece,
    TensorRange,
    check_layout,
)
from tensorswarm.store.formats.safetensors import MAX_HEADER_BYTES, MAX_HEADER_MARKS

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "safetensors.json").read_text("utf-8")
)


class File:
    """A file whose buffer of tensors is only pretended: reading it fails the test."""

    def __init__(self, header: bytes, buffer_bytes: int = 0, length: int | None = None) -> None:
        length = len(header) if length is None else length
        self.head = struct.pack("<Q", length) + header
        self.size_bytes = len(self.head) + buffer_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and offset + length <= len(self.head), "read beyond the header"
        return self.head[offset : offset + length]

    def layout(self) -> Layout:
        return layout_of("model.safetensors", self.size_bytes, self.read_at)

    def fault(self) -> str:
        with pytest.raises(BadInput) as caught:
            self.layout()
        message = str(caught.value)
        assert message.isprintable(), "the message is not one printable line"
        assert len(message) < 500
        return message


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("vector", VECTORS["valid"], ids=lambda vector: vector["name"])
def test_valid_vector(vector: dict[str, Any]) -> None:
    layout = File(vector["header"].encode(), vector["buffer"]).layout()
    assert layout.format == "safetensors"
    assert layout.pieces == tuple(Piece(*piece) for piece in vector["pieces"])
    assert layout.tensors == tuple(
        TensorRange(name, dtype, tuple(shape), offset, size_bytes)
        for name, dtype, shape, offset, size_bytes in vector["tensors"]
    )


@pytest.mark.parametrize("vector", VECTORS["invalid"], ids=lambda vector: vector["name"])
def test_invalid_vector(vector: dict[str, Any]) -> None:
    assert vector["fault"] in File(vector["header"].encode(), vector["buffer"]).fault()


@pytest.mark.parametrize("size_bytes", range(8))
def test_too_short_for_a_header_length(size_bytes: int) -> None:
    with pytest.raises(BadInput, match="too few"):
        layout_of("m.safetensors", size_bytes, lambda offset, length: bytes(length))


@pytest.mark.parametrize("length", [3, 100, MAX_HEADER_BYTES])
def test_header_beyond_the_file(length: int) -> None:
    assert "header ends at byte" in File(b"{}", length=length).fault()


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 200_000_000, 2**63, 2**64 - 1])
def test_header_over_the_limit_is_not_read(length: int) -> None:
    # The pretended file is large enough; reading its header would fail the test.
    assert f"at most {MAX_HEADER_BYTES}" in File(b"", 2**40, length=length).fault()


@pytest.mark.parametrize("tail", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"])
def test_header_that_is_not_utf8(tail: bytes) -> None:
    assert "not UTF-8 at byte 2" in File(b'{"' + tail + b'":0}').fault()


@pytest.mark.parametrize("opening", [b'{"a":', b'{"a":[' + b"["])
def test_deep_nesting(opening: bytes) -> None:
    assert "nested too deeply" in File(opening * 100_000).fault()


def test_too_many_values_are_not_parsed() -> None:
    header = b'{"a":[' + b"[]," * (MAX_HEADER_MARKS // 2) + b"[]]}"
    assert f"at most {MAX_HEADER_MARKS}" in File(header).fault()


def test_integer_of_very_many_digits() -> None:
    # Python itself refuses to convert more than some thousand digits.
    header = b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}'
    assert "shape" in File(header, 1).fault()


def test_long_name_is_shortened_in_the_message() -> None:
    header = json.dumps({"n" * 900: entry("F99", [1], 0, 1)}).encode()
    assert len(File(header, 1).fault()) < 200


def test_name_over_the_limit() -> None:
    assert (
        "1025 bytes long"
        in File(json.dumps({"n" * 1025: entry("U8", [1], 0, 1)}).encode(), 1).fault()
    )
    header = json.dumps({"é" * 513: entry("U8", [1], 0, 1)}).encode()
    assert "1026 bytes long" in File(header, 1).fault()
    assert File(json.dumps({"é" * 512: entry("U8", [1], 0, 1)}).encode(), 1).layout()


def test_control_characters_in_a_name_do_not_reach_the_terminal() -> None:
    header = json.dumps({"\x1b[2J\n\u202e": entry("F99", [1], 0, 1)}).encode()
    assert "\\x1b[2J\\n\\u202e" in File(header, 1).fault()


def test_a_file_cut_while_it_is_read() -> None:
    file = File(b"{}")
    with pytest.raises(BadInput, match="gave 1 of 2 bytes at byte 8"):
        layout_of("m.safetensors", 10, lambda at, n: file.read_at(at, n)[: 9 - at or None])


def test_disk_errors_pass_through() -> None:
    def read_at(offset: int, length: int) -> bytes:
        raise OSError(5, "the disk is on fire")

    with pytest.raises(OSError, match="fire"):
        layout_of("m.safetensors", 100, read_at)


def test_many_tensors() -> None:
    count = 20_000
    names = {f"layer.{i}.weight": entry("BF16", [4, 2], 16 * i, 16 * i + 16) for i in range(count)}
    layout = File(json.dumps(names).encode(), 16 * count).layout()
    assert [tensor.name for tensor in layout.tensors] == list(names)
    assert len(layout.pieces) == count + 1


# ---- picking a format


def never_read(offset: int, length: int) -> bytes:
    raise AssertionError("the file was read")


@pytest.mark.parametrize(
    "name", ["config.json", "safetensors", "model.safetensors.index.json", "a/b", "m.safetensors2"]
)
def test_other_files_are_kept_verbatim(name: str) -> None:
    assert layout_of(name, 7, never_read) == Layout("verbatim", (Piece(0, 7, False),), ())
    assert layout_of(name, 0, never_read) == Layout("verbatim", (), ())


@pytest.mark.parametrize("name", ["m.safetensors", "a/B.SafeTensors", ".safetensors"])
def test_safetensors_by_name(name: str) -> None:
    file = File(b"{}")
    assert layout_of(name, file.size_bytes, file.read_at).format == "safetensors"


def test_a_file_larger_than_an_object() -> None:
    assert layout_of("a", MAX_OBJECT_SIZE, never_read).pieces
    with pytest.raises(BadInput, match="at most"):
        layout_of("a", MAX_OBJECT_SIZE + 1, never_read)


# ---- the rules of layouts, which later formats may break in other ways


def test_tied_tensors_share_a_piece() -> None:
    tied = (TensorRange("a", "U8", (2,), 1, 2), TensorRange("b", "I8", (2,), 1, 2))
    layout = Layout("x", (Piece(0, 1, False), Piece(1, 2, True)), tied)
    assert check_layout(layout, 3) is layout


@pytest.mark.parametrize(
    ("pieces", "tensors", "fault"),
    [
        ([(1, 2, False)], [], "gap"),
        ([(0, 2, False), (1, 2, False)], [], "gap"),
        ([(0, 0, False), (0, 3, False)], [], "gap"),
        ([(0, 2, False)], [], "end at byte 2"),
        ([(0, 4, False)], [], "end at byte 4"),
        ([(0, 3, False)], [("a", 0, 3)], "overlaps"),
        ([(0, 3, True)], [("a", 0, 2)], "overlaps"),
        ([(0, 3, True)], [("a", 1, 2)], "overlaps"),
        ([(0, 1, True), (1, 2, True)], [("b", 1, 2), ("a", 0, 1)], "order"),
        ([(0, 3, True)], [("a", 0, 3), ("b", 4, 0)], "order"),
        ([(0, 3, True)], [], "without a name"),
    ],
)
def test_broken_layouts(
    pieces: list[tuple[int, int, bool]], tensors: list[tuple[str, int, int]], fault: str
) -> None:
    layout = Layout(
        "x",
        tuple(Piece(*piece) for piece in pieces),
        tuple(TensorRange(name, "U8", (size,), at, size) for name, at, size in tensors),
    )
    with pytest.raises(BadInput, match=fault):
        check_layout(layout, 3)


# ---- element types


def test_sizes_of_every_dtype() -> None:
    for name, bits in DTYPE_BITS.items():
        assert tensor_size_bytes(name, (2, 3, 4)) == 3 * bits
        assert tensor_size_bytes(name, (2, 0, 4)) == 0
    assert tensor_size_bytes("BF16", ()) == 2
    assert tensor_size_bytes("U8", (MAX_OBJECT_SIZE,)) == MAX_OBJECT_SIZE
    assert tensor_size_bytes("F4", (2 * MAX_OBJECT_SIZE,)) == MAX_OBJECT_SIZE


@pytest.mark.parametrize(
    ("dtype", "shape", "fault"),
    [
        ("", (), "unknown"),
        ("float32", (), "unknown"),
        ("F4", (), "whole bytes"),
        ("F6_E3M2", (2,), "whole bytes"),
        ("U8", (-1,), "negative"),
        ("U8", (0, -1), "negative"),
        ("U8", (MAX_OBJECT_SIZE + 1,), "larger"),
        ("U8", (2**40, 2**40, 0), "larger"),
        ("U8", (1 << 100_000,) * MAX_DIMENSIONS, "larger"),
        ("U8", (1,) * (MAX_DIMENSIONS + 1), "dimensions"),
    ],
)
def test_sizes_that_cannot_be(dtype: str, shape: tuple[int, ...], fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        tensor_size_bytes(dtype, shape)


def test_numpy_types_have_the_right_width_and_byte_order() -> None:
    for name, bits in DTYPE_BITS.items():
        if bits < 8:
            with pytest.raises(BadInput, match="no type"):
                numpy_dtype(name)
            continue
        dtype = numpy_dtype(name)
        assert dtype.itemsize * 8 == bits
        assert dtype.byteorder in "<|=" and (dtype.byteorder != "=" or sys.byteorder == "little")
    with pytest.raises(BadInput, match="unknown"):
        numpy_dtype("float32")


@pytest.mark.parametrize(
    ("name", "data", "value"),
    [
        ("BOOL", "01", True),
        ("I16", "feff", -2),
        ("F16", "003e", 1.5),
        ("BF16", "c03f", 1.5),
        ("F64", "000000000000f83f", 1.5),
        ("C64", "0000c03f000080bf", 1.5 - 1j),
        ("F8_E4M3", "7e", 448.0),  # the finite variant: others hold 240 or infinity here
        ("F8_E5M2", "7b", 57344.0),
        ("F8_E8M0", "80", 2.0),
        ("F8_E4M3FNUZ", "7f", 240.0),
        ("F8_E5M2FNUZ", "7f", 57344.0),
    ],
)
def test_numpy_types_read_the_right_value(name: str, data: str, value: complex) -> None:
    import numpy

    assert numpy.frombuffer(bytes.fromhex(data), numpy_dtype(name))[0] == value
