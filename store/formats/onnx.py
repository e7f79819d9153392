"""Reader of ONNX models: the tensors in a graph's protocol buffer, read by range.

The message is walked field by field; everything but numbers, names and shapes is
stepped over. So a graph may be gigabytes and nothing of its tensors is read. What is not
a tensor (nodes, names, metadata) stays as it is, in pieces between the tensors, so that
models that share weights share them whatever their graphs are.

Tensors are the initializers and the values of ``Constant`` nodes and other attributes,
of the graph and of graphs inside nodes. A name that is taken gets ``#2``, ``#3``.

Where their elements are:

- ``raw_data``, and packed ``float_data`` and ``double_data``: a run of bytes.
- floats not packed: one every 5 or 9 bytes, and picked from there.
- ``int32_data``, ``int64_data``, ``uint64_data``: varints. The tensor is decoded, and the
  varints are made from it.
- external data: in another file, see `onnx_external`.

Not named, but kept with the graph: strings, sparse tensors, elements in several packed
runs, and 4-bit elements of an odd number.

Source: ``onnx/onnx.proto`` and the encoding of protocol buffers (protobuf.dev,
"Encoding").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..dtypes import MAX_DIMENSIONS, block_of, tensor_size_bytes
from ..errors import BadInput
from ..manifest import MAX_TENSORS
from ..names import check_tensor_name, quoted
from ..recipes import MAX_VARINT_BYTES
from .cursor import Cursor
from .layout import Content, Extent, HeldTensor, Layout, Made, ReadAt, TensorRange
from .tile import StridedTensor, tile

FORMAT = "onnx"

MAX_FIELDS = 1 << 24
"""Most fields walked over: a node has some ten, and the largest graphs a million nodes."""

MAX_GRAPH_DEPTH = 16
"""Deepest nesting of graphs in nodes: a loop inside a branch is two."""

MAX_TEXT_BYTES = 4096
"""Longest name, path or number given as text."""

DTYPES = {
    1: "F32",
    2: "U8",
    3: "I8",
    4: "U16",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    12: "U32",
    13: "U64",
    14: "C64",
    15: "C128[1:16]",
    16: "BF16",
    17: "F8_E4M3",
    18: "F8_E4M3FNUZ",
    19: "F8_E5M2",
    20: "F8_E5M2FNUZ",
    21: "U4[2:1]",
    22: "I4[2:1]",
    23: "F4",
    24: "F8_E8M0",
    25: "U2[4:1]",
    26: "I2[4:1]",
}
"""``TensorProto.DataType``; 8 are strings."""

_SIGNED = frozenset({"I8", "I16", "I32", "I64"})

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5

# Where a message holds graphs, nodes, attributes and tensors: field numbers.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_OUTPUT, _NODE_ATTRIBUTE = 2, 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11


class Field(NamedTuple):
    """A field of a message: its number, wire type, and value or place in the file."""

    number: int
    wire: int
    value: int
    offset: int
    size_bytes: int


@dataclass(slots=True)
class TensorProto:
    """What a tensor's message says, and where its elements are."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw: list[Field] = field(default_factory=list)
    typed: list[Field] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False

    def dtype(self) -> str | None:
        """Return the tensor's type; None for strings and what is unknown."""
        return DTYPES.get(self.data_type)


def parse(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of a model, without tensors that are in other files.

    Raises
    ------
    BadInput
        The file is no protocol buffer, or breaks a rule of the format or a limit.
    """
    return layout_with(size_bytes, read_tensors(size_bytes, read_at), ())


def read_tensors(size_bytes: int, read_at: ReadAt) -> list[TensorProto]:
    """Return every tensor of a model, with names that are unique.

    Raises
    ------
    BadInput
        As for `parse`.
    """
    reader = _Reader(size_bytes, read_at)
    tensors: list[TensorProto] = []
    names: dict[str, int] = {}
    for found in reader.fields(0, size_bytes):
        if found.number == _MODEL_GRAPH and found.wire == _BYTES:
            for tensor in reader.graph(found, 0):
                taken = names[tensor.name] = names.get(tensor.name, 0) + 1
                if taken > 1:
                    tensor.name = f"{tensor.name}#{taken}"
                    if tensor.name in names:
                        raise BadInput(f"two tensors have the name {quoted(tensor.name)}")
                    names[tensor.name] = 1
                if len(tensors) >= MAX_TENSORS:
                    raise BadInput(f"more than {MAX_TENSORS} tensors")
                tensors.append(tensor)
    return tensors


def metadata_props(size_bytes: int, read_at: ReadAt) -> Iterator[tuple[bytes, Field]]:
    """Yield the keys of a model's metadata, each with the field that has the value.

    Raises
    ------
    BadInput
        As for `parse`.
    """
    reader = _Reader(size_bytes, read_at)
    for found in reader.fields(0, size_bytes):
        if found.number == _MODEL_METADATA and found.wire == _BYTES:
            yield from reader.entry(found)


def layout_with(
    size_bytes: int, tensors: list[TensorProto], elsewhere: tuple[HeldTensor, ...]
) -> Layout:
    """Return a model's layout, given its tensors and those in other files."""
    plain: list[TensorRange] = []
    strided: list[StridedTensor] = []
    held = list(elsewhere)
    fixed: dict[int, int] = {}
    made: dict[int, Made] = {}
    for tensor in tensors:
        if tensor.is_external:
            continue
        try:
            check_tensor_name(tensor.name)
            _place(tensor, plain, strided, held, fixed, made)
        except BadInput as error:
            raise BadInput(f"tensor {quoted(tensor.name)}: {error}") from error
    return tile(FORMAT, size_bytes, plain, strided, fixed, held, made)


def size_of(tensor: TensorProto) -> int | None:
    """Return a tensor's size in bytes; None for one that is left with the graph."""
    dtype = tensor.dtype()
    if dtype is None:
        return None
    if len(tensor.dims) > MAX_DIMENSIONS:
        raise BadInput(f"{len(tensor.dims)} dimensions, at most {MAX_DIMENSIONS}")
    block, bits = block_of(dtype)
    if bits * max(math.prod(tensor.dims), 0) % (8 * block):
        return None  # half a byte is left over
    return tensor_size_bytes(dtype, tensor.dims)


def _place(
    tensor: TensorProto,
    plain: list[TensorRange],
    strided: list[StridedTensor],
    held: list[HeldTensor],
    fixed: dict[int, int],
    made: dict[int, Made],
) -> None:
    """Find a tensor's bytes, and put it into one of the lists."""
    size, dtype = size_of(tensor), tensor.dtype()
    if size is None or dtype is None:
        return
    shape = tuple(tensor.dims)
    if not size:
        plain.append(TensorRange(tensor.name, dtype, shape, 0, 0))
        return
    runs = tensor.raw or tensor.typed
    if not runs:
        raise BadInput(f"no bytes for a tensor of {size}")
    first = runs[0]
    if first.wire in (_FIXED_32, _FIXED_64):
        _place_unpacked(tensor, dtype, runs, strided)
        return
    if len(runs) > 1 or first.wire != _BYTES:
        if tensor.raw:
            raise BadInput("its raw_data is there twice")
        return  # in several runs, or varints each by itself: left with the graph
    if tensor.raw or first.number in (4, 10):
        if first.size_bytes != size:
            raise BadInput(f"{first.size_bytes} bytes for a tensor of {size}")
        plain.append(TensorRange(tensor.name, dtype, shape, first.offset, size))
        return
    block, bits = block_of(dtype)
    item = bits // 8
    if item not in (1, 2, 4, 8) or size > MAX_VARINT_BYTES:
        return
    parameters = (item, 1 if dtype in _SIGNED else 0)
    content = Content((Extent("", first.offset, first.size_bytes),), "unvarint", parameters, size)
    held.append(HeldTensor(tensor.name, dtype, shape, content))
    fixed[first.offset] = first.size_bytes
    made[first.offset] = Made("varint", parameters, (content,))


def _place_unpacked(
    tensor: TensorProto, dtype: str, runs: list[Field], strided: list[StridedTensor]
) -> None:
    """Place floats that have a tag each: the tag's one byte lies between two of them."""
    item = 4 if runs[0].wire == _FIXED_32 else 8
    if block_of(dtype) != (1, 8 * item):
        return  # complex numbers have two entries each
    if len(runs) != math.prod(tensor.dims):
        raise BadInput(f"{len(runs)} elements for a tensor of {math.prod(tensor.dims)}")
    step = item + 1
    if any(each.offset != runs[0].offset + i * step for i, each in enumerate(runs)):
        return
    strides = [step * math.prod(tensor.dims[i + 1 :]) for i in range(len(tensor.dims))]
    strided.append(
        StridedTensor(tensor.name, dtype, tuple(tensor.dims), item, runs[0].offset, tuple(strides))
    )


class _Reader:
    """Walks over messages."""

    def __init__(self, size_bytes: int, read_at: ReadAt) -> None:
        self._cursor = Cursor(size_bytes, read_at)
        self._fields_left = MAX_FIELDS

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """Yield a message's fields; the caller may read elsewhere meanwhile."""
        position = start
        while position < stop:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise BadInput(f"a model of more than {MAX_FIELDS} fields")
            self._cursor.position = position
            tag = self._varint()
            number, wire = tag >> 3, tag & 7
            value = size = 0
            offset = self._cursor.position
            if wire == _VARINT:
                value = self._varint()
            elif wire == _BYTES:
                size = self._varint()
                offset = self._cursor.position
                self._cursor.skip(size)
            elif wire in (_FIXED_32, _FIXED_64):
                size = 4 if wire == _FIXED_32 else 8
                self._cursor.skip(size)
            else:
                raise BadInput(f"not an ONNX model: a field of the wire type {wire}")
            if number == 0 or self._cursor.position > stop:
                raise BadInput("not an ONNX model: a message that ends inside a field")
            position = self._cursor.position
            yield Field(number, wire, value, offset, size)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._cursor.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF
            shift += 7
            if shift > 63:
                raise BadInput("not an ONNX model: a number of more than ten bytes")

    def _inside(self, found: Field) -> Iterator[Field]:
        return self.fields(found.offset, found.offset + found.size_bytes)

    def _text(self, found: Field) -> str:
        if found.wire != _BYTES or found.size_bytes > MAX_TEXT_BYTES:
            raise BadInput(f"a name of {found.size_bytes} bytes, at most {MAX_TEXT_BYTES}")
        self._cursor.position = found.offset
        try:
            return self._cursor.take(found.size_bytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput("a name that is not UTF-8") from error

    def graph(self, found: Field, depth: int) -> Iterator[TensorProto]:
        """Yield the tensors of a graph."""
        if depth > MAX_GRAPH_DEPTH:
            raise BadInput("graphs nested too deeply")
        for item in self._inside(found):
            if item.wire != _BYTES:
                continue
            if item.number == _GRAPH_INITIALIZER:
                yield self._tensor(item)
            elif item.number == _GRAPH_NODE:
                yield from self._node(item, depth)

    def _node(self, found: Field, depth: int) -> Iterator[TensorProto]:
        output = ""
        for item in self._inside(found):
            if item.wire != _BYTES:
                continue
            if item.number == _NODE_OUTPUT and not output:
                output = self._text(item)
            elif item.number == _NODE_ATTRIBUTE:
                yield from self._attribute(item, output, depth)

    def _attribute(self, found: Field, output: str, depth: int) -> Iterator[TensorProto]:
        for item in self._inside(found):
            if item.wire != _BYTES:
                continue
            if item.number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                tensor = self._tensor(item)
                tensor.name = tensor.name or output
                yield tensor
            elif item.number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                yield from self.graph(item, depth + 1)

    def _tensor(self, found: Field) -> TensorProto:
        tensor = TensorProto()
        for item in self._inside(found):
            number = item.number
            if number == 1:
                tensor.dims += self._integers(item)
            elif number == 2 and item.wire == _VARINT:
                tensor.data_type = item.value
            elif number == 8:
                tensor.name = self._text(item)
            elif number == 9 and item.wire == _BYTES:
                tensor.raw.append(item)
            elif number in (4, 5, 7, 10, 11):
                if item.size_bytes or item.wire == _VARINT:
                    tensor.typed.append(item)
            elif number == 13 and item.wire == _BYTES:
                key, value = self._pair(item)
                tensor.external[key] = value
            elif number == 14 and item.wire == _VARINT:
                tensor.is_external = item.value == 1
            elif number == 3:
                raise BadInput("a tensor in segments, which is not read here")
            if len(tensor.dims) > MAX_DIMENSIONS or len(tensor.external) > MAX_DIMENSIONS:
                raise BadInput(f"more than {MAX_DIMENSIONS} dimensions")
        if any(length >= 1 << 63 for length in tensor.dims):
            raise BadInput("a tensor with a negative dimension")
        return tensor

    def _integers(self, found: Field) -> list[int]:
        """Return repeated integers, packed or one by itself."""
        if found.wire == _VARINT:
            return [found.value]
        if found.wire != _BYTES or found.size_bytes > 10 * MAX_DIMENSIONS:
            raise BadInput(f"more than {MAX_DIMENSIONS} dimensions")
        stop = found.offset + found.size_bytes
        self._cursor.position = found.offset
        values = []
        while self._cursor.position < stop:
            values.append(self._varint())
        return values

    def entry(self, found: Field) -> Iterator[tuple[bytes, Field]]:
        """Yield an entry's key and the field of its value, if it has both."""
        parts = {item.number: item for item in self._inside(found) if item.wire == _BYTES}
        if 1 in parts and 2 in parts:
            yield self._text(parts[1]).encode(), parts[2]

    def _pair(self, found: Field) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for item in self._inside(found):
            if item.number in texts:
                texts[item.number] = self._text(item)
        return texts[1], texts[2]
