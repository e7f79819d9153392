"""Tensors as numpy arrays, mapped from the store and not copied.

The arrays are read-only. They stay valid after the store is closed, and after their
tensors are dropped from it; those of objects in the index (64 KiB and less) are ordinary
memory. Those in a file that was added without a copy show what anybody writes into that
file later, and a program that reads them after the file was cut short is killed by the
system (SIGBUS): do not write into files that are in use.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checking import iterate_part
from .dtypes import numpy_dtype
from .errors import BadInput, StoreDamaged
from .manifest import Manifest, NamedTensor
from .mapping import Mapping
from .reader import FileReader, InlineReader, read_all
from .store import Store

Array = NDArray[Any]

MAX_MAPS = 32_768
"""Most files mapped for one model: Linux allows a process 65,530 mappings in all."""


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
    loader = Loader(store, manifest)
    return {name: loader.load(tensor) for name, tensor in chosen.items()}


def load_tensor(store: Store, manifest: Manifest, tensor: NamedTensor) -> Array:
    """Return one tensor of a model, as `load_tensors` does."""
    return Loader(store, manifest).load(tensor)


class Loader:
    """Makes arrays of a model's tensors; an adopted file is mapped once for all of its own.

    Parameters
    ----------
    store : Store
        A store that has the tensors, whole.
    manifest : Manifest
        The model.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._adopted: dict[Path, Mapping] = {}
        self._map_count = 0

    def load(self, tensor: NamedTensor) -> Array:
        """Return one tensor.

        Raises
        ------
        BadInput, StoreDamaged
            As for `load_tensors`.
        """
        dtype = numpy_dtype(tensor.dtype)
        if math.prod(tensor.shape) == 0:
            empty = np.empty(tensor.shape, dtype)
            empty.flags.writeable = False
            return empty
        if self._manifest.recipe(tensor.object_index) is not None:
            return self._made(tensor.object_index).view(dtype).reshape(tensor.shape)
        ref = self._manifest.objects[tensor.object_index]
        reader = self._store.open_whole(ref.digest)
        if reader is None:
            raise StoreDamaged(f"tensor {tensor.name!r} is not in the store: fetch the model first")
        try:
            if reader.size_bytes != ref.size_bytes:
                raise StoreDamaged(f"tensor {tensor.name!r} has another size than the model says")
            if isinstance(reader, InlineReader):
                flat = np.frombuffer(reader.data, np.uint8)
            else:
                flat = self._bytes_of(reader)
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"tensor {tensor.name!r}: cannot be mapped: {error}") from error
        finally:
            reader.close()
        return flat.view(dtype).reshape(tensor.shape)

    def _made(self, index: int) -> NDArray[np.uint8]:
        """Return what a recipe makes, in memory of its own."""
        data = bytearray(self._manifest.size_of(index))
        size = 0
        for block in iterate_part(self._store, self._manifest, index):
            data[size : size + len(block)] = block
            size += len(block)
        return np.frombuffer(bytes(data), np.uint8)

    def _bytes_of(self, reader: FileReader) -> NDArray[np.uint8]:
        """Return an object's bytes, mapped; copied when there are too many maps already."""
        mapped = self._adopted.get(reader.path)
        if mapped is None:
            try:
                mapped = self._map(reader)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return np.frombuffer(bytes(read_all(reader)), np.uint8)
        reader.confirm()  # the file that was mapped is the one that was hashed
        return np.asarray(mapped)[reader.start : reader.start + reader.size_bytes]

    def _map(self, reader: FileReader) -> Mapping:
        if self._map_count >= MAX_MAPS:
            raise OSError(errno.ENOMEM, "too many files are mapped")
        mapped = Mapping(reader.descriptor, os.fstat(reader.descriptor).st_size)
        self._map_count += 1
        if reader.is_adopted:
            self._adopted[reader.path] = mapped
        return mapped
