"""What a format parser gives: which bytes of a file are which tensor.

A parser reads a file's headers through a ``ReadAt`` and returns a `Layout`. Its
*pieces* cover the file from the first byte to the last, in order, and each
becomes one object: a piece that is a tensor's bytes is shared with every other
file that holds this tensor, any other piece (a header, padding) is a blob.
Its *tensors* name ranges of the file. Several names may share one range (tied
weights); an empty tensor has a range of no bytes and no piece.

Parsers do no I/O of their own, never read tensor data, and raise nothing but
``BadInput`` for what a file's bytes say. An error of ``ReadAt`` passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BadInput
from ..names import quoted

ReadAt = Callable[[int, int], bytes]
"""Takes an offset and a length in bytes, returns these bytes of the file."""


class Piece(NamedTuple):
    """A run of a file's bytes that becomes one object.

    Attributes
    ----------
    offset : int
        First byte, counted from the start of the file.
    size_bytes : int
        Length, at least one byte.
    is_tensor : bool
        Whether the bytes are exactly those of a tensor.
    """

    offset: int
    size_bytes: int
    is_tensor: bool


class TensorRange(NamedTuple):
    """A named tensor and where its bytes are in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Layout:
    """A parsed file.

    Attributes
    ----------
    format : str
        Name of the format.
    pieces : tuple of Piece
        In order of offset, without gaps or overlaps, covering the whole file.
    tensors : tuple of TensorRange
        In order of offset; each of those with bytes is one of the pieces.
    """

    format: str
    pieces: tuple[Piece, ...]
    tensors: tuple[TensorRange, ...]


def check_layout(layout: Layout, size_bytes: int) -> Layout:
    """Return `layout` if it keeps the rules for a file of `size_bytes` bytes.

    Every parser's result passes through here, so that a format with a laxer
    table of contents than safetensors cannot break what is built on layouts.

    Raises
    ------
    BadInput
        The pieces do not cover the file exactly, or the tensors are not exactly
        the pieces that are said to be tensors.
    """
    end = 0
    pieces: dict[int, int] = {}
    for piece in layout.pieces:
        if piece.offset != end or piece.size_bytes <= 0:
            raise BadInput(f"the parts of the file leave a gap or overlap at byte {end}")
        if piece.is_tensor:
            pieces[piece.offset] = piece.size_bytes
        end += piece.size_bytes
    if end != size_bytes:
        raise BadInput(f"the parts of the file end at byte {end}, the file at {size_bytes}")
    previous = 0
    named: set[int] = set()
    for tensor in layout.tensors:
        if not previous <= tensor.offset <= size_bytes:
            raise BadInput(f"tensor {quoted(tensor.name)} is out of order")
        if tensor.size_bytes:
            if pieces.get(tensor.offset) != tensor.size_bytes:
                raise BadInput(f"tensor {quoted(tensor.name)} overlaps another one")
            named.add(tensor.offset)
        previous = tensor.offset
    if len(named) != len(pieces):
        raise BadInput("a part of the file is a tensor without a name")
    return layout


def read_exactly(read_at: ReadAt, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset`.

    Raises
    ------
    BadInput
        The file gave fewer or more: it was cut while it was read.
    """
    data = read_at(offset, length)
    if len(data) != length:
        raise BadInput(f"the file gave {len(data)} of {length} bytes at byte {offset}")
    return data
