"""Recipes: bytes that need not be kept, because they can be made from other bytes.

A file's part, or a tensor, is mostly an object by itself. Some are not: a shard that ends
in the middle of a tensor, a compressed member of an archive, a matrix that lies in the
file transposed. A *recipe* says how such bytes are made from objects that are kept
anyway, and what their digest is, so that what was made is verified like what was read.

Kinds, with their parameters:

- ``slice`` [offset]: a run of one input's bytes.
- ``strided`` [item bytes, offset, n, n lengths, n strides]: items picked from one input
  in the order of an array of that shape; offset and strides in bytes, strides may be
  negative or 0 (the strides of ``torch.as_strided`` and of numpy's array interface).
- ``deflate`` [level]: the inputs, one after another, as one raw deflate stream
  (RFC 1951), made by zlib with its usual window, memory level and strategy.
- ``inflate`` [offset]: a run of what one input, a raw deflate stream, unpacks to.
- ``varint`` [item bytes, signed]: one input's integers in the base-128 encoding of
  protocol buffers, the shortest form, negative ones with the sign drawn out to 64 bits.
- ``unvarint`` [item bytes, signed]: the way back.

Recipes come from strangers too, so what one can cost is bounded before it is followed.
Nothing here does any I/O: inputs are read through callbacks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .digest import MAX_OBJECT_SIZE
from .errors import BadInput

Bytes = bytes | bytearray | memoryview

MAX_STRIDED_BYTES = 1 << 30
"""Largest input or output of ``strided``: both are in memory while it is followed. A
larger tensor than 1 GiB that is also not contiguous has not been seen in a checkpoint."""

MAX_SPREAD_BYTES = 64 << 20
"""Largest output of ``strided`` that is longer than its input (strides of 0): a few bytes
could otherwise stand for terabytes."""

MAX_VARINT_BYTES = 1 << 30
"""Largest array kept as varints: protocol buffers end at 2 GiB."""

MAX_INPUTS = 16
"""Most inputs of one recipe: an array's header and its bytes are two."""

MAX_DIMENSIONS = 33
"""Most dimensions of ``strided``: a tensor's 32, and one for the bytes of an item."""

MAX_INFLATION = 1032
"""Most bytes that a byte of deflate can stand for (zlib's technical details)."""

BLOCK_BYTES = 1 << 20
"""Bytes made at a time."""

_MAX_PARAMETER = 1 << 45
_RAW_DEFLATE = -15
_VARINT_ITEM_BYTES = (1, 2, 4, 8)


class Input(NamedTuple):
    """An object that a recipe uses: its size, and a way to read it."""

    size_bytes: int
    read_at: Callable[[int, int], Bytes]


def check_recipe(
    kind: str, parameters: Sequence[int], sizes: Sequence[int], size_bytes: int
) -> None:
    """Check that a recipe makes sense and stays within the limits.

    Parameters
    ----------
    kind : str
        One of the kinds in this module's header.
    parameters : sequence of int
        Its parameters.
    sizes : sequence of int
        The inputs' sizes in bytes.
    size_bytes : int
        How many bytes it is said to make.

    Raises
    ------
    BadInput
        It does not; the message says why.
    """
    check = _CHECKS.get(kind)
    if check is None:
        raise BadInput(f"a recipe of the unknown kind {kind[:20]!r}")
    if any(abs(value) > _MAX_PARAMETER for value in parameters):
        raise BadInput("a recipe with a parameter out of range")
    if not 0 < size_bytes <= MAX_OBJECT_SIZE:
        raise BadInput(f"a recipe for {size_bytes} bytes")
    if not sizes or (len(sizes) > 1 and kind != "deflate") or len(sizes) > MAX_INPUTS:
        raise BadInput(f"a {kind} recipe of {len(sizes)} inputs")
    if not check(parameters, sizes, size_bytes):
        raise BadInput(f"a {kind} recipe that does not fit its inputs")


def make(
    kind: str, parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int
) -> Iterator[Bytes]:
    """Yield the bytes that a checked recipe makes, in blocks.

    Raises
    ------
    BadInput
        The inputs cannot be used so: a damaged deflate stream, a bad varint. The caller
        compares what came out with the recipe's size and digest.
    """
    return _MAKERS[kind](parameters, inputs, size_bytes)


def read_blocks(item: Input, start: int = 0, stop: int | None = None) -> Iterator[Bytes]:
    """Yield an input's bytes from `start` to `stop`, a block at a time."""
    stop = item.size_bytes if stop is None else stop
    for offset in range(start, stop, BLOCK_BYTES):
        yield item.read_at(offset, min(BLOCK_BYTES, stop - offset))


# ---- slice


def _check_slice(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    return len(parameters) == 1 and 0 <= parameters[0] <= sizes[0] - size_bytes


def _slice(parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int) -> Iterator[Bytes]:
    return read_blocks(inputs[0], parameters[0], parameters[0] + size_bytes)


# ---- strided


class _Strides(NamedTuple):
    item_bytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _strides_of(parameters: Sequence[int]) -> _Strides | None:
    if len(parameters) < 3:
        return None
    item_bytes, offset, count, *rest = parameters
    if not 0 <= count <= MAX_DIMENSIONS or len(rest) != 2 * count:
        return None
    return _Strides(item_bytes, offset, tuple(rest[:count]), tuple(rest[count:]))


def _check_strided(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    view = _strides_of(parameters)
    if view is None or not 1 <= view.item_bytes <= 64 or any(n < 1 for n in view.shape):
        return False
    if math.prod(view.shape) * view.item_bytes != size_bytes:
        return False
    if max(size_bytes, sizes[0]) > MAX_STRIDED_BYTES:
        return False
    if size_bytes > max(sizes[0], MAX_SPREAD_BYTES):
        return False
    reach = [(n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)]
    first = view.offset + sum(step for step in reach if step < 0)
    last = view.offset + sum(step for step in reach if step > 0)
    return first >= 0 and last + view.item_bytes <= sizes[0]


def _strided(
    parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int
) -> Iterator[Bytes]:
    import numpy as np

    view = _strides_of(parameters)
    assert view is not None  # it was checked
    data = np.frombuffer(inputs[0].read_at(0, inputs[0].size_bytes), np.uint8)
    items = np.lib.stride_tricks.as_strided(
        data[view.offset :],
        (*view.shape, view.item_bytes),
        (*view.strides, 1),
        writeable=False,
    )
    made = np.ascontiguousarray(items).reshape(-1).data
    for start in range(0, size_bytes, BLOCK_BYTES):
        yield made[start : start + BLOCK_BYTES]


# ---- deflate and inflate


def _check_deflate(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    return len(parameters) == 1 and 0 <= parameters[0] <= 9 and sum(sizes) <= MAX_OBJECT_SIZE


def _deflate(
    parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int
) -> Iterator[Bytes]:
    packer = zlib.compressobj(parameters[0], zlib.DEFLATED, _RAW_DEFLATE)
    for item in inputs:
        for block in read_blocks(item):
            if packed := packer.compress(block):
                yield packed
    yield packer.flush()


def _check_inflate(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    if len(parameters) != 1 or parameters[0] < 0:
        return False
    return parameters[0] + size_bytes <= MAX_INFLATION * sizes[0]


def _inflate(
    parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int
) -> Iterator[Bytes]:
    skip, left = parameters[0], size_bytes
    for block in inflate(read_blocks(inputs[0])):
        part = memoryview(block)[min(skip, len(block)) :][:left]
        skip -= len(block) - len(memoryview(block)[min(skip, len(block)) :])
        left -= len(part)
        if part:
            yield part
        if not left:
            return


def inflate(blocks: Iterator[Bytes]) -> Iterator[bytes]:
    """Yield what a raw deflate stream unpacks to, at most a block at a time.

    Raises
    ------
    BadInput
        The stream is damaged, or ends too early.
    """
    unpacker = zlib.decompressobj(_RAW_DEFLATE)
    try:
        for block in blocks:
            data: Bytes = block
            while data and not unpacker.eof:
                if unpacked := unpacker.decompress(data, BLOCK_BYTES):
                    yield unpacked
                data = unpacker.unconsumed_tail
        # What zlib still holds back comes without further input.
        while not unpacker.eof and (unpacked := unpacker.decompress(b"", BLOCK_BYTES)):
            yield unpacked
    except zlib.error as error:
        raise BadInput(f"a damaged deflate stream: {error}") from error
    if not unpacker.eof:
        raise BadInput("a deflate stream that ends too early")


# ---- varint and its inverse


def _check_varint(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    if len(parameters) != 2 or parameters[0] not in _VARINT_ITEM_BYTES:
        return False
    count, rest = divmod(sizes[0], parameters[0])
    return (
        parameters[1] in (0, 1)
        and not rest
        and sizes[0] <= MAX_VARINT_BYTES
        and count <= size_bytes <= 10 * count
    )


def _varint(parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int) -> Iterator[Bytes]:
    item_bytes, signed = parameters
    carry = b""
    for block in read_blocks(inputs[0]):
        data = carry + bytes(block)
        usable = len(data) - len(data) % item_bytes
        carry = data[usable:]
        out = bytearray()
        for at in range(0, usable, item_bytes):
            value = int.from_bytes(data[at : at + item_bytes], "little", signed=bool(signed))
            value &= 0xFFFFFFFFFFFFFFFF
            while value > 0x7F:
                out.append(value & 0x7F | 0x80)
                value >>= 7
            out.append(value)
        yield out


def _check_unvarint(parameters: Sequence[int], sizes: Sequence[int], size_bytes: int) -> bool:
    return sizes[0] <= MAX_VARINT_BYTES and _check_varint(parameters, [size_bytes], sizes[0])


def _unvarint(
    parameters: Sequence[int], inputs: Sequence[Input], size_bytes: int
) -> Iterator[Bytes]:
    item_bytes = parameters[0]
    mask = (1 << 8 * item_bytes) - 1
    value = shift = 0
    for block in read_blocks(inputs[0]):
        out = bytearray()
        for byte in bytes(block):
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 70:
                raise BadInput("a varint of more than ten bytes")
            if byte < 0x80:
                out += (value & mask).to_bytes(item_bytes, "little")
                value = shift = 0
        yield out
    if shift:
        raise BadInput("a varint that ends too early")


_Check = Callable[[Sequence[int], Sequence[int], int], bool]
_Maker = Callable[[Sequence[int], Sequence[Input], int], Iterator[Bytes]]

_CHECKS: dict[str, _Check] = {
    "slice": _check_slice,
    "strided": _check_strided,
    "deflate": _check_deflate,
    "inflate": _check_inflate,
    "varint": _check_varint,
    "unvarint": _check_unvarint,
}

_MAKERS: dict[str, _Maker] = {
    "slice": _slice,
    "strided": _strided,
    "deflate": _deflate,
    "inflate": _inflate,
    "varint": _varint,
    "unvarint": _unvarint,
}
