"""What a format parser gives: which bytes of a file are which tensor.

A parser reads a file's headers through a ``ReadAt`` and returns a `Layout`. Its
*pieces* cover the file from the first byte to the last, in order, and each
becomes one object: a piece that is a tensor's bytes is shared with every other
file that holds this tensor, any other piece (a header, padding) is a blob.
Its *tensors* name ranges of the file. Several names may share one range (tied
weights); an empty tensor has a range of no bytes and no piece.

Not every tensor's bytes are one run of its file. *Held* tensors are described by a
`Content`: runs of bytes, in this file or in others of the model, and what has to be done
with them to get the tensor (unpack, pick, put in order). The other way round, *made*
says of a piece how its bytes follow from such tensors, so that it need not be kept
beside them (`recipes.py`). Whoever adds the file tries that, and keeps the piece where
it does not hold.

Parsers do no I/O of their own, never read tensor data, and raise nothing but
``BadInput`` for what a file's bytes say. An error of ``ReadAt`` passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..dtypes import tensor_size_bytes
from ..errors import BadInput
from ..names import quoted
from ..recipes import check_recipe

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


class Extent(NamedTuple):
    """A run of bytes of a file of the model; an empty path means the file at hand."""

    path: str
    offset: int
    size_bytes: int


class Content(NamedTuple):
    """A tensor's bytes, where they are not one piece of its file.

    Attributes
    ----------
    extents : tuple of Extent
        Runs of bytes which, put together, are the tensor, or hold it.
    decode : str
        Empty if they are the tensor; else the kind of recipe (``strided``, ``inflate``,
        ``unvarint``, ``slice``) that gets it out of the one extent.
    parameters : tuple of int
        That recipe's parameters.
    size_bytes : int
        The tensor's size.
    inner : Content or None
        What it is made from instead of extents, where that takes a second step.
    """

    extents: tuple[Extent, ...]
    decode: str
    parameters: tuple[int, ...]
    size_bytes: int
    inner: Content | None = None

    @property
    def first(self) -> Extent:
        """The first run of bytes that it comes from."""
        return self.extents[0] if self.inner is None else self.inner.first


class Made(NamedTuple):
    """How a piece can be made from contents: a recipe's kind, parameters and inputs.

    No parameters of ``deflate`` means that the level is to be found out.
    """

    kind: str
    parameters: tuple[int, ...]
    inputs: tuple[Content, ...]


class HeldTensor(NamedTuple):
    """A named tensor whose bytes are not one piece of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content


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
    held : tuple of HeldTensor
        Tensors whose bytes have to be put together or decoded.
    made : mapping of int to Made
        By offset, the pieces that can be made from held tensors.
    note : str
        What a person should hear: why tensors that are in the file are not seen.
    """

    format: str
    pieces: tuple[Piece, ...]
    tensors: tuple[TensorRange, ...]
    held: tuple[HeldTensor, ...] = ()
    made: Mapping[int, Made] = field(default_factory=dict)
    note: str = ""


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
    _check_held(layout, size_bytes)
    return layout


def _check_held(layout: Layout, size_bytes: int) -> None:
    """Check what is described by contents: sizes, and runs that lie in the file."""
    sizes = {piece.offset: piece.size_bytes for piece in layout.pieces if not piece.is_tensor}
    for name, dtype, shape, content in layout.held:
        if tensor_size_bytes(dtype, shape) != content.size_bytes:
            raise BadInput(f"tensor {quoted(name)}: its dtype and shape do not fit its bytes")
        check_content(content, size_bytes)
    for offset, made in layout.made.items():
        if offset not in sizes:
            raise BadInput(f"what is made at byte {offset} is no part of the file")
        for content in made.inputs:
            check_content(content, size_bytes)
        if made.kind != "deflate" or made.parameters:
            inputs = [content.size_bytes for content in made.inputs]
            check_recipe(made.kind, made.parameters, inputs, sizes[offset])


def check_content(content: Content, size_bytes: int) -> None:
    """Check that a content's runs lie in the file and give as many bytes as it says.

    Raises
    ------
    BadInput
        They do not.
    """
    if content.inner is not None:
        if content.extents or content.inner.inner is not None:
            raise BadInput("a tensor that is made in more than two steps")
        check_content(content.inner, size_bytes)
        sizes = [content.inner.size_bytes]
        check_recipe(content.decode, content.parameters, sizes, content.size_bytes)
        return
    for extent in content.extents:
        end = extent.offset + extent.size_bytes
        if extent.offset < 0 or extent.size_bytes <= 0 or (not extent.path and end > size_bytes):
            raise BadInput(f"bytes {extent.offset} to {end} are not in the file")
    total = sum(extent.size_bytes for extent in content.extents)
    if content.decode:
        check_recipe(content.decode, content.parameters, [total], content.size_bytes)
    elif total != content.size_bytes or not content.extents:
        raise BadInput(f"{total} bytes for a tensor of {content.size_bytes}")


def absolute(content: Content, path: str) -> Content:
    """Return a content of the file at `path` in which no path stands for the file at hand."""
    extents = tuple(each if each.path else each._replace(path=path) for each in content.extents)
    inner = None if content.inner is None else absolute(content.inner, path)
    return content._replace(extents=extents, inner=inner)


def pieces_made_of(layouts: Mapping[str, Layout]) -> dict[Content, list[Extent]]:
    """Return the pieces that are made of one content each, by path and offset.

    Contents are absolute, and so are the pieces.
    """
    found: dict[Content, list[Extent]] = {}
    for path, layout in sorted(layouts.items()):
        for offset, size_bytes, _ in layout.pieces:
            made = layout.made.get(offset)
            if made is not None and len(made.inputs) == 1:
                pieces = found.setdefault(absolute(made.inputs[0], path), [])
                pieces.append(Extent(path, offset, size_bytes))
    return found


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
