"""From tensors anywhere in a file to pieces that cover it.

Most formats have a table that says where each tensor lies. Nothing but good manners keeps
these ranges from overlapping, and PyTorch's views overlap by design. This module cuts a
file so that

- a tensor that overlaps no other is a piece;
- of tensors that lie inside another one, that one is the piece, and the others are held:
  runs of its bytes, or items picked from it;
- tensors that overlap in any other way are held together in one piece that is none;
- a tensor that fills its range in another order than C's is taken for what it is, and
  the piece is made from it;
- what is between is a piece of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..errors import BadInput
from ..names import quoted
from ..recipes import MAX_STRIDED_BYTES
from .layout import Content, Extent, HeldTensor, Layout, Made, Piece, TensorRange


class StridedTensor(NamedTuple):
    """A named tensor whose items are picked from a range of the file.

    Attributes
    ----------
    name, dtype, shape
        As in `TensorRange`.
    item_bytes : int
        Bytes of an element.
    offset : int
        The first element's place in the file.
    strides : tuple of int
        Bytes from one element to the next, for each dimension; at least 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    item_bytes: int
    offset: int
    strides: tuple[int, ...]

    @property
    def span_bytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        steps = ((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return sum(steps) + self.item_bytes

    def is_permutation(self) -> bool:
        """Tell whether the elements fill their span, each once."""
        expected = self.item_bytes
        for stride, length in sorted(
            (s, n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1
        ):
            if stride != expected:
                return False
            expected *= length
        return True


class _Group(NamedTuple):
    """Tensors whose ranges overlap, and what they cover together."""

    start: int
    stop: int
    plain: list[TensorRange]
    strided: list[StridedTensor]


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether strides in elements are those of an array in C order."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def tile(
    format_name: str,
    size_bytes: int,
    tensors: Iterable[TensorRange],
    strided: Iterable[StridedTensor] = (),
    fixed: Mapping[int, int] | None = None,
    held: Sequence[HeldTensor] = (),
    made: Mapping[int, Made] | None = None,
) -> Layout:
    """Return the layout of a file in which these tensors lie.

    Parameters
    ----------
    format_name : str
        The format.
    size_bytes : int
        The file's size.
    tensors : iterable of TensorRange
        Tensors whose bytes are runs of the file.
    strided : iterable of StridedTensor
        Tensors whose elements are picked from it.
    fixed : mapping of int to int
        Sizes by offset of further pieces, which `held` and `made` are about. No tensor
        may overlap one.
    held, made
        As in `Layout`.

    Raises
    ------
    BadInput
        A tensor is not inside the file, two have one name, or something overlaps a
        fixed piece.
    """
    ranges = sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes))
    picked = sorted(strided, key=lambda tensor: tensor.offset)
    names: set[str] = set()
    for name in [t.name for t in ranges] + [t.name for t in picked] + [t.name for t in held]:
        if name in names:
            raise BadInput(f"two tensors have the name {quoted(name)}")
        names.add(name)
    empty = [tensor for tensor in ranges if not tensor.size_bytes]
    fixed = fixed or {}
    pieces: dict[int, Piece] = {
        offset: Piece(offset, size, is_tensor=False) for offset, size in fixed.items()
    }
    plain: list[TensorRange] = []
    all_held, all_made = list(held), dict(made or {})
    for group in _groups([t for t in ranges if t.size_bytes], picked):
        if group.start < 0 or group.stop > size_bytes:
            raise BadInput(
                f"tensor {quoted(_first_name(group))} lies outside the file: "
                f"bytes {group.start} to {group.stop} of {size_bytes}"
            )
        if group.start in pieces:
            raise BadInput(f"tensor {quoted(_first_name(group))} overlaps something else")
        pieces[group.start] = _cut(group, plain, all_held, all_made)
    ordered = sorted([*plain, *empty], key=lambda tensor: (tensor.offset, tensor.size_bytes))
    covering = tuple(_fill(pieces, size_bytes))
    return Layout(format_name, covering, tuple(ordered), tuple(all_held), all_made)


def _first_name(group: _Group) -> str:
    return (group.plain[0] if group.plain else group.strided[0]).name


def _groups(ranges: list[TensorRange], picked: list[StridedTensor]) -> Iterator[_Group]:
    """Yield the tensors in groups: those of one overlap, those of two do not."""
    every: list[tuple[int, int, TensorRange | StridedTensor]] = [
        (t.offset, t.offset + t.size_bytes, t) for t in ranges
    ]
    every += [(t.offset, t.offset + t.span_bytes, t) for t in picked]
    every.sort(key=lambda entry: entry[:2])
    group: _Group | None = None
    for start, stop, tensor in every:
        if group is None or start >= group.stop:
            if group is not None:
                yield group
            group = _Group(start, stop, [], [])
        group = group._replace(stop=max(stop, group.stop))
        if isinstance(tensor, TensorRange):
            group.plain.append(tensor)
        else:
            group.strided.append(tensor)
    if group is not None:
        yield group


def _cut(
    group: _Group, plain: list[TensorRange], held: list[HeldTensor], made: dict[int, Made]
) -> Piece:
    """Return the piece that a group becomes, and sort its tensors into the lists."""
    start, size = group.start, group.stop - group.start
    extent = Extent("", start, size)
    whole = [t for t in group.plain if (t.offset, t.size_bytes) == (start, size)]
    plain += whole
    views = {(t.item_bytes, t.offset, t.shape, t.strides) for t in group.strided}
    for tensor in group.plain:
        if tensor not in whole:
            content = Content((extent,), "slice", (tensor.offset - start,), tensor.size_bytes)
            held.append(HeldTensor(tensor.name, tensor.dtype, tensor.shape, content))
    for view in group.strided:
        content = _picked(view, extent)
        held.append(HeldTensor(view.name, view.dtype, view.shape, content))
        if (
            not group.plain
            and len(views) == 1
            and view.is_permutation()
            and size == view.span_bytes
            and size <= MAX_STRIDED_BYTES
        ):
            made[start] = Made("strided", _inverse(view), (content,))
    return Piece(start, size, is_tensor=bool(whole))


def _picked(view: StridedTensor, extent: Extent) -> Content:
    return Content(
        (extent,),
        "strided",
        strided_parameters(view.item_bytes, view.offset - extent.offset, view.shape, view.strides),
        math.prod(view.shape) * view.item_bytes,
    )


def _inverse(view: StridedTensor) -> tuple[int, ...]:
    """Return how a permuted tensor's span is picked from the tensor in C order."""
    own, step = [], view.item_bytes
    for length in reversed(view.shape):
        own.append(step)
        step *= length
    own.reverse()
    # The span's own dimensions are the tensor's, the widest stride first.
    order = sorted(range(len(view.shape)), key=lambda i: (-view.strides[i], -view.shape[i]))
    return strided_parameters(
        view.item_bytes, 0, [view.shape[i] for i in order], [own[i] for i in order]
    )


def strided_parameters(
    item_bytes: int, offset: int, shape: Sequence[int], strides: Sequence[int]
) -> tuple[int, ...]:
    """Return the parameters of a ``strided`` recipe."""
    return (item_bytes, offset, len(shape), *shape, *strides)


def _fill(pieces: Mapping[int, Piece], size_bytes: int) -> Iterator[Piece]:
    """Yield pieces in order, with what is between them."""
    end = 0
    for offset in sorted(pieces):
        if offset < end:
            raise BadInput(f"parts of the file overlap at byte {offset}")
        if offset > end:
            yield Piece(end, offset - end, is_tensor=False)
        yield pieces[offset]
        end = offset + pieces[offset].size_bytes
    if end > size_bytes:
        raise BadInput(f"a part of the file ends at byte {end}, the file at {size_bytes}")
    if end < size_bytes:
        yield Piece(end, size_bytes - end, is_tensor=False)
