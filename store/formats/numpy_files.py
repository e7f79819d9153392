"""Readers of NumPy's own formats: one array (``.npy``), and an archive of them (``.npz``).

An array is a short header (a Python dict as text, read here by a pattern and never
evaluated) and its elements. Arrays in C order and little-endian are runs of bytes. Those
in Fortran order or big-endian are other tensors' bytes in another order: the tensor is
what numpy would show, and the file's bytes are made from it.

An archive's stored members are read by range. A deflated one is unpacked, and packed
again when the file is written; where zlib does not give the same bytes again, the packed
bytes are kept, and the tensor is made from them. Of a deflated array in Fortran order or
big-endian the bytes are kept in the file's order, and the tensor is made from those: it has
its digest, but shares no bytes with the same tensor elsewhere. Where zlib does not give
its packed bytes again, such an array would need two steps, and is left unseen.

Arrays of Python objects are pickles: they are kept as bytes and never looked into. So
are strings, dates and records, which are no tensors.

Source: NumPy, "NEP 1 - A Simple File Format for NumPy Arrays" and ``numpy/lib/format.py``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import NamedTuple

from ..dtypes import tensor_size_bytes
from ..errors import BadInput
from ..recipes import MAX_DIMENSIONS, MAX_STRIDED_BYTES, inflate
from .layout import Content, Extent, HeldTensor, Layout, Made, ReadAt, TensorRange, read_exactly
from .tile import strided_parameters, tile
from .verbatim import parse as parse_verbatim
from .zipdir import DEFLATED, STORED, Member, read_directory

NPY_FORMAT = "npy"
NPZ_FORMAT = "npz"

MAX_HEADER_BYTES = 64 << 10
"""Longest header of an array: numpy itself reads at most 10,000 characters by default."""

_MAGIC = b"\x93NUMPY"

_HEADER = re.compile(
    r"\{(?=.*'descr': *'(?P<descr>[^']{1,40})')"
    r"(?=.*'fortran_order': *(?P<fortran>True|False))"
    r"(?=.*'shape': *\((?P<shape>[0-9L, ]{0,1000})\))"
    r"[^{}]*\} *\n?"
)

_DTYPES = {
    "b1": "BOOL",
    "u1": "U8",
    "i1": "I8",
    "u2": "U16",
    "i2": "I16",
    "f2": "F16",
    "u4": "U32",
    "i4": "I32",
    "f4": "F32",
    "u8": "U64",
    "i8": "I64",
    "f8": "F64",
    "c8": "C64",
    "c16": "C128[1:16]",
}

_DESCRIPTION = re.compile(r"([<>|=]?)([biufcV])([1-9][0-9]{0,2})")


class ArrayHeader(NamedTuple):
    """What an array's header says; `dtype` is empty for what is no tensor."""

    dtype: str
    shape: tuple[int, ...]
    item_bytes: int
    fortran: bool
    swapped: bool
    header_bytes: int


def parse_npy(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of an ``.npy`` file; its tensor has an empty name.

    Raises
    ------
    BadInput
        It breaks a rule of the format.
    """
    header = read_header(lambda start, length: read_exactly(read_at, start, length), size_bytes)
    if not header.dtype:
        return Layout(NPY_FORMAT, parse_verbatim(size_bytes, read_at).pieces, ())
    found = _Arrays()
    found.add("", header, header.header_bytes, size_bytes - header.header_bytes)
    return found.layout(NPY_FORMAT, size_bytes)


def named(layout: Layout, name: str) -> Layout:
    """Return the layout of an ``.npy`` file with its tensor named after the file."""
    return replace(
        layout,
        tensors=tuple(tensor._replace(name=name) for tensor in layout.tensors),
        held=tuple(tensor._replace(name=name) for tensor in layout.held),
    )


def parse_npz(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of an ``.npz`` archive; tensors have the members' names.

    Raises
    ------
    BadInput
        The archive, or an array in it, breaks a rule of its format.
    """
    found = _Arrays()
    for member in read_directory(size_bytes, read_at):
        if not member.name.endswith(".npy"):
            continue
        name = member.name.removesuffix(".npy")
        try:
            if member.method == STORED:
                header = read_header(_from(member.offset, read_at), member.size_bytes)
                space = member.size_bytes - header.header_bytes
                found.add(name, header, member.offset + header.header_bytes, space)
            elif member.method == DEFLATED:
                found.add_packed(name, member, _header_of_packed(member, read_at))
        except BadInput as error:
            raise BadInput(f"array {name[:80]!r}: {error}") from error
    return found.layout(NPZ_FORMAT, size_bytes)


def _from(start: int, read_at: ReadAt) -> ReadAt:
    """Return a reader of the file that begins at byte `start` of this one."""
    return lambda offset, length: read_exactly(read_at, start + offset, length)


def _header_of_packed(member: Member, read_at: ReadAt) -> ArrayHeader:
    """Read the header of a deflated array: as much is unpacked as it takes."""
    block_bytes = 16 << 10
    ends = range(0, member.packed_bytes, block_bytes)
    blocks = (
        read_exactly(read_at, member.offset + at, min(block_bytes, member.packed_bytes - at))
        for at in ends
    )
    unpacked = inflate(blocks)
    data = bytearray()

    def read(start: int, length: int) -> bytes:
        while len(data) < start + length:
            block = next(unpacked, None)
            if block is None:
                raise BadInput("an array shorter than its header")
            data.extend(block)
        return bytes(data[start : start + length])

    return read_header(read, member.size_bytes)


def read_header(read: ReadAt, size_bytes: int) -> ArrayHeader:
    """Read an array's header.

    Parameters
    ----------
    read : ReadAt
        Reads bytes of the array's file.
    size_bytes : int
        That file's size.

    Raises
    ------
    BadInput
        It is none, or longer than ``MAX_HEADER_BYTES``.
    """
    if size_bytes < 10:
        raise BadInput(f"{size_bytes} bytes are too few for an array")
    start = read(0, 10)
    if start[:6] != _MAGIC:
        raise BadInput("not an array: it does not begin as one")
    if start[6] == 1:
        begin, length = 10, int.from_bytes(start[8:10], "little")
    elif start[6] in (2, 3):
        if size_bytes < 12:
            raise BadInput(f"{size_bytes} bytes are too few for an array")
        begin, length = 12, int.from_bytes(read(8, 4), "little")
    else:
        raise BadInput(f"an array of the unknown version {start[6]}")
    if length > MAX_HEADER_BYTES:
        raise BadInput(f"an array's header of {length} bytes, at most {MAX_HEADER_BYTES}")
    if begin + length > size_bytes:
        raise BadInput("an array's header that ends after the file")
    text = read(begin, length).decode("latin-1")
    header_bytes = begin + length
    match = _HEADER.fullmatch(text.strip(" \n"))
    if match is None:
        if re.search(r"'descr': *\[", text):  # records are no tensors
            return ArrayHeader("", (), 0, False, False, header_bytes)
        raise BadInput("an array's header that is not the usual dict")
    return _interpret(match, header_bytes)


def _interpret(match: re.Match[str], header_bytes: int) -> ArrayHeader:
    nothing = ArrayHeader("", (), 0, False, False, header_bytes)
    numbers = [text.strip(" L") for text in match["shape"].split(",")]
    if numbers[-1] == "":
        numbers.pop()
    if not all(text.isdigit() and len(text) < 20 for text in numbers):
        raise BadInput("an array's shape that is none")
    if len(numbers) == 1 and "," not in match["shape"]:
        raise BadInput("an array's shape that is none")
    shape = tuple(map(int, numbers))
    described = _DESCRIPTION.fullmatch(match["descr"])
    if described is None:
        return nothing
    order, kind, width = described.groups()
    item_bytes = int(width)
    dtype = f"V{item_bytes}[1:{item_bytes}]" if kind == "V" else _DTYPES.get(kind + width, "")
    if not dtype or len(shape) > MAX_DIMENSIONS - 1:
        return nothing
    swapped = order == ">" and item_bytes > 1 and kind != "V"
    if swapped and kind == "c":
        return nothing  # two numbers in one item: each would have to be turned around
    fortran = match["fortran"] == "True" and sum(n > 1 for n in shape) > 1
    return ArrayHeader(dtype, shape, item_bytes, fortran, swapped, header_bytes)


class _Arrays:
    """Arrays found in a file, on the way to its layout."""

    def __init__(self) -> None:
        self._plain: list[TensorRange] = []
        self._held: list[HeldTensor] = []
        self._fixed: dict[int, int] = {}
        self._made: dict[int, Made] = {}

    def layout(self, format_name: str, size_bytes: int) -> Layout:
        """Return the layout of the file in which all of them lie."""
        return tile(
            format_name,
            size_bytes,
            self._plain,
            fixed=self._fixed,
            held=self._held,
            made=self._made,
        )

    def add(self, name: str, header: ArrayHeader, offset: int, space_bytes: int) -> None:
        """Note an array whose elements lie at an offset, with so much space."""
        if not header.dtype:
            return
        size = tensor_size_bytes(header.dtype, header.shape)
        if size != space_bytes:
            raise BadInput(f"{space_bytes} bytes for an array of {size}")
        if not size or not (header.fortran or header.swapped):
            self._plain.append(TensorRange(name, header.dtype, header.shape, offset, size))
        elif size <= MAX_STRIDED_BYTES:
            there, back = _reorderings(header)
            content = Content((Extent("", offset, size),), "strided", there, size)
            self._held.append(HeldTensor(name, header.dtype, header.shape, content))
            self._fixed[offset] = size
            self._made[offset] = Made("strided", back, (content,))

    def add_packed(self, name: str, member: Member, header: ArrayHeader) -> None:
        """Note a deflated array."""
        if not header.dtype:
            return
        size = tensor_size_bytes(header.dtype, header.shape)
        reordered = header.fortran or header.swapped
        if reordered and size > MAX_STRIDED_BYTES:
            return
        if size + header.header_bytes != member.size_bytes:
            raise BadInput(
                f"{member.size_bytes - header.header_bytes} bytes for an array of {size}"
            )
        if not size:
            self._plain.append(TensorRange(name, header.dtype, header.shape, member.offset, 0))
            return
        extents = (Extent("", member.offset, member.packed_bytes),)
        head = Content(extents, "inflate", (0,), header.header_bytes)
        body = Content(extents, "inflate", (header.header_bytes,), size)
        content = body
        if reordered:
            content = Content((), "strided", _reorderings(header)[0], size, body)
        self._held.append(HeldTensor(name, header.dtype, header.shape, content))
        self._fixed[member.offset] = member.packed_bytes
        self._made[member.offset] = Made("deflate", (), (head, body))


def _reorderings(header: ArrayHeader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how the tensor is picked from the file's bytes, and they from the tensor."""
    shape, item = header.shape, header.item_bytes
    c_strides = [item * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    f_strides = [item * math.prod(shape[:i]) for i in range(len(shape))]
    if not header.fortran:
        file_shape, there, back = list(shape), c_strides, c_strides
    else:
        file_shape, there, back = list(reversed(shape)), f_strides, c_strides[::-1]
    if not header.swapped:
        return (
            strided_parameters(item, 0, shape, there),
            strided_parameters(item, 0, file_shape, back),
        )
    return (
        strided_parameters(1, item - 1, [*shape, item], [*there, -1]),
        strided_parameters(1, item - 1, [*file_shape, item], [*back, -1]),
    )
