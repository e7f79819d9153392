"""Tensors as numpy arrays, mapped from the store and not copied.

The arrays are read-only. They stay valid after the store is closed; those of
objects in the index (64 KiB and less) are ordinary memory.
"""

from __future__ import annotations

import fnmatch
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import numpy_dtype
from .errors import BadInput, StoreDamaged
from .manifest import Manifest, NamedTensor
from .store import Store

Array = NDArray[Any]


def load_tensors(store: Store, manifest: Manifest, include: Sequence[str] = ()) -> dict[str, Array]:
    """Return a model's tensors by name.

    Parameters
    ----------
    store : Store
        A store that has the tensors, whole.
    manifest : Manifest
        The model.
    include : sequence of str
        Patterns of tensor names or file paths; none for every tensor.

    Returns
    -------
    dict of str to numpy.ndarray
        Read-only arrays in the shapes and dtypes of the model. BF16 and the 8-bit
        floats have the dtypes of ``ml_dtypes``.

    Raises
    ------
    BadInput
        A pattern matches nothing, two files use one name for different tensors, or a
        dtype has no numpy form.
    StoreDamaged
        A tensor is not in the store.
    """
    chosen: dict[str, NamedTensor] = {}
    for file in manifest.files:
        for tensor in file.tensors:
            if include and not any(
                fnmatch.fnmatchcase(tensor.name, p) or fnmatch.fnmatchcase(file.path, p)
                for p in include
            ):
                continue
            other = chosen.setdefault(tensor.name, tensor)
            if other[1:] != tensor[1:]:
                raise BadInput(
                    f"{tensor.name!r} names different tensors in different files of the model: "
                    "choose a file with include"
                )
    if include and not chosen:
        raise BadInput(f"no tensor matches {', '.join(map(repr, include))}")
    return {name: _load(store, manifest, tensor) for name, tensor in chosen.items()}


def _load(store: Store, manifest: Manifest, tensor: NamedTensor) -> Array:
    dtype = numpy_dtype(tensor.dtype)
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, dtype)
    ref = manifest.objects[tensor.object_index]
    found = store.locate(ref.digest)
    if found is None:
        raise StoreDamaged(f"tensor {tensor.name!r} is not in the store: fetch the model first")
    if isinstance(found, bytes):
        flat = np.frombuffer(found, dtype)
    else:
        flat = map_range(*found, ref.size_bytes).view(dtype)
    return flat.reshape(tensor.shape)


def map_range(path: Path, offset: int, size_bytes: int) -> NDArray[np.uint8]:
    """Map a byte range of a file, read-only; returns uint8 of shape ``(size_bytes,)``."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(
                descriptor, offset - start + size_bytes, access=mmap.ACCESS_READ, offset=start
            )
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise StoreDamaged(f"{path}: cannot be mapped: {error}") from error
    return np.frombuffer(mapped, np.uint8, count=size_bytes, offset=offset - start)
