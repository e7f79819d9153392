"""PyTorch tensors over bytes that lie in memory already; PyTorch is only imported here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import is_packed, packed_shape
from .errors import BadInput

Converter = Callable[[str, Sequence[int], Callable[[], NDArray[np.uint8]]], Any]
"""Takes a dtype, a shape and a way to get the bytes; returns a ``torch.Tensor``."""

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C128[1:16]": "complex128",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def torch_converter() -> Converter:
    """Return what makes PyTorch tensors.

    Raises
    ------
    BadInput
        PyTorch is not installed.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BadInput(
            f"framework 'pt' needs PyTorch, which cannot be imported: {error}"
        ) from error

    def convert(dtype: str, shape: Sequence[int], read: Callable[[], NDArray[np.uint8]]) -> Any:
        kind = getattr(torch, _NAMES.get(dtype, ""), None)
        if kind is None and is_packed(dtype):
            kind, shape = torch.uint8, packed_shape(dtype, shape)
        if kind is None:
            raise BadInput(f"PyTorch has no type for {dtype}: load it with framework 'np'")
        if math.prod(shape) == 0:
            return torch.empty(tuple(shape), dtype=kind)
        flat = read()
        if flat.ctypes.data % kind.itemsize:
            flat = flat.copy()  # PyTorch's kernels may rely on alignment
        return torch.from_numpy(flat).view(kind).reshape(tuple(shape))

    return convert
