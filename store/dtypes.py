"""Element types of tensors: their names, widths, and numpy counterparts.

The names are those of safetensors (``Dtype`` in its reference implementation,
``safetensors/src/tensor.rs``); every format parser translates into them. A
tensor's bytes are little-endian, in C order, without padding; elements narrower
than a byte are packed, and a tensor of them must fill whole bytes.

Types that safetensors does not know have *opaque* names, which say how much room they
take and nothing else: ``Q4_K[256:144]`` packs 256 elements into 144 bytes. So a node can
carry quantised weights of kinds that were made up after it was written.

``numpy`` and ``ml_dtypes`` are imported only when somebody asks for an array.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .digest import MAX_OBJECT_SIZE
from .errors import BadInput
from .names import quoted

if TYPE_CHECKING:
    import numpy

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Width of one element in bits, by name."""

_OPAQUE = re.compile(r"[A-Z][A-Z0-9_]{0,23}\[([1-9][0-9]{0,5}):([1-9][0-9]{0,5})\]")
"""Name, elements in a block, bytes of a block."""

MAX_DIMENSIONS = 32
"""Most dimensions of a tensor: numpy's own limit before version 2 (``NPY_MAXDIMS``)."""

_MAX_BITS = 8 * MAX_OBJECT_SIZE

_NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "C64": "<c8",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}

_ML_DTYPES_NAMES = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def tensor_size_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of this type and shape takes.

    Parameters
    ----------
    dtype : str
        A name from ``DTYPE_BITS``, or an opaque one.
    shape : sequence of int
        The length of each dimension; empty for a scalar, zeros allowed.

    Raises
    ------
    BadInput
        The type is unknown, there are too many dimensions, one is negative, the
        tensor would be larger than ``MAX_OBJECT_SIZE``, or it would end inside
        a byte. A zero does not excuse other dimensions that are too large:
        numpy could not make such an array.
    """
    block, bits = block_of(dtype)
    if len(shape) > MAX_DIMENSIONS:
        raise BadInput(f"a tensor of {len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    empty = False
    for length in shape:
        if length > 0:
            bits *= length
            if bits > _MAX_BITS * block:
                raise BadInput(f"a tensor larger than {MAX_OBJECT_SIZE} bytes")
        elif length == 0:
            empty = True
        else:
            raise BadInput("a tensor with a negative dimension")
    if empty:
        return 0
    if bits % (8 * block):
        what = "bytes" if block == 1 else "blocks"
        raise BadInput(f"a {dtype} tensor of {bits // block} bits, which are not whole {what}")
    return bits // (8 * block)


def block_of(dtype: str) -> tuple[int, int]:
    """Return how many elements are packed together, and into how many bits.

    Raises
    ------
    BadInput
        The type is unknown.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is not None:
        return 1, bits
    match = _OPAQUE.fullmatch(dtype)
    if match is None:
        raise BadInput(f"unknown dtype {quoted(dtype)}")
    return int(match[1]), 8 * int(match[2])


def is_packed(name: str) -> bool:
    """Tell whether a type packs elements into bits or blocks, so that numpy has none for it.

    Raises
    ------
    BadInput
        The type is unknown.
    """
    elements, bits = block_of(name)
    return bits < 8 or elements > 1


def packed_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a tensor's bytes: its own, with the last dimension in bytes.

    Where rows do not end between bytes or blocks it is one dimension. The ``gguf``
    library shows quantised tensors in the same way.

    Raises
    ------
    BadInput
        As for `tensor_size_bytes`.
    """
    size = tensor_size_bytes(dtype, shape)
    block, bits = block_of(dtype)
    if shape and shape[-1] * bits % (8 * block) == 0:
        return (*shape[:-1], shape[-1] * bits // (8 * block))
    return (size,)


def numpy_dtype(name: str) -> numpy.dtype[Any]:
    """Return the numpy type with which a tensor's bytes can be viewed.

    Parameters
    ----------
    name : str
        A name from ``DTYPE_BITS``.

    Raises
    ------
    BadInput
        The type is unknown, or packs elements narrower than a byte, for which
        numpy has no type.
    """
    import numpy

    if name in _NUMPY_NAMES:
        return numpy.dtype(_NUMPY_NAMES[name])
    if name in _ML_DTYPES_NAMES:
        import ml_dtypes

        dtype: numpy.dtype[Any] = numpy.dtype(getattr(ml_dtypes, _ML_DTYPES_NAMES[name]))
        return dtype
    if name == "C128[1:16]":
        return numpy.dtype("<c16")
    elements, bits = block_of(name)
    if elements == 1 and name.startswith("V"):  # as numpy reads types it does not know
        return numpy.dtype(f"V{bits // 8}")
    raise BadInput(f"numpy has no type for {name}")
