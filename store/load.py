"""Tensors as numpy arrays, mapped from the store and not copied.

The arrays are read-only. They stay valid after the store is closed, and after their
tensors are dropped from it; those of objects in the index (64 KiB and less) are ordinary
memory. Those in a file that was added without a copy show what anybody writes into that
file later, and a program that reads them after the file was cut short is killed by the
system (SIGBUS): do not write into files that are in use.

For PyTorch the same bytes are mapped for this process alone, so that tensors may be
written to, as PyTorch expects: pages that are written to are copied, the others are not,
and neither the store nor another process sees it.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
from collections import abc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checking import iterate_part
from .dtypes import is_packed, numpy_dtype, packed_shape
from .errors import BadInput, StoreDamaged
from .manifest import Manifest, NamedTensor
from .mapping import Mapping
from .reader import FileReader, InlineReader, read_all
from .store import Store
from .to_torch import torch_converter

Array = NDArray[Any]

MAX_MAPS = 32_768
"""Most files mapped for one model: Linux allows a process 65,530 mappings in all."""


class LazyTensors(abc.Mapping[str, Any]):
    """A model's tensors by name, each made when it is asked for. Close it when done.

    Parameters
    ----------
    store : Store
        A store that has the tensors, whole; it is closed with this.
    manifest : Manifest
        The model.
    include : sequence of str
        Patterns of tensor names or file paths; none for every tensor.
    framework : str
        ``"np"`` or ``"pt"``.

    Raises
    ------
    BadInput
        As for `load_tensors`.
    """

    def __init__(
        self, store: Store, manifest: Manifest, include: Sequence[str], framework: str
    ) -> None:
        self._store = store
        self._chosen = choose(manifest, include)
        self._loader = Loader(store, manifest, framework)

    def __getitem__(self, name: str) -> Any:
        return self._loader.load(self._chosen[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def close(self) -> None:
        """Close the store; tensors that were given out stay valid."""
        self._store.close()

    def __enter__(self) -> LazyTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_tensors(
    store: Store, manifest: Manifest, include: Sequence[str] = (), framework: str = "np"
) -> dict[str, Any]:
    """Return a model's tensors by name.

    Parameters
    ----------
    store : Store
        A store that has the tensors, whole.
    manifest : Manifest
        The model.
    include : sequence of str
        Patterns of tensor names or file paths; none for every tensor.
    framework : str
        ``"np"`` for numpy arrays, ``"pt"`` for PyTorch tensors.

    Returns
    -------
    dict of str to numpy.ndarray or torch.Tensor
        Read-only arrays in the shapes and dtypes of the model, or tensors. BF16 and the
        8-bit floats are arrays of the dtypes of ``ml_dtypes``. Types that pack elements
        into bits or blocks (4-bit floats, GGUF's quantised types) are their bytes, uint8,
        the last dimension counted in bytes (`packed_shape`).

    Raises
    ------
    BadInput
        A pattern matches nothing, two files use one name for different tensors, a dtype
        has no form in the framework, or the framework is unknown or not installed.
    StoreDamaged
        A tensor is not in the store.
    """
    chosen = choose(manifest, include)
    loader = Loader(store, manifest, framework)
    return {name: loader.load(tensor) for name, tensor in chosen.items()}


def choose(manifest: Manifest, include: Sequence[str]) -> dict[str, NamedTensor]:
    """Return the tensors that `include` asks for, by name.

    Raises
    ------
    BadInput
        A pattern matches nothing, or two files use one name for different tensors.
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
    return chosen


def load_tensor(store: Store, manifest: Manifest, tensor: NamedTensor) -> Array:
    """Return one tensor of a model, as `load_tensors` does."""
    array: Array = Loader(store, manifest).load(tensor)
    return array


class Loader:
    """Makes arrays of a model's tensors; an adopted file is mapped once for all of its own.

    Parameters
    ----------
    store : Store
        A store that has the tensors, whole.
    manifest : Manifest
        The model.
    framework : str
        ``"np"`` or ``"pt"``.

    Raises
    ------
    BadInput
        The framework is unknown, or not installed.
    """

    def __init__(self, store: Store, manifest: Manifest, framework: str = "np") -> None:
        if framework not in ("np", "pt"):
            raise BadInput(f"framework {framework!r}: only 'np' and 'pt' are known")
        self._to_torch = torch_converter() if framework == "pt" else None
        self._store = store
        self._manifest = manifest
        self._adopted: dict[Path, Mapping] = {}
        self._map_count = 0

    def load(self, tensor: NamedTensor) -> Any:
        """Return one tensor.

        Raises
        ------
        BadInput, StoreDamaged
            As for `load_tensors`.
        """
        if self._to_torch is None:
            return self._array(tensor)
        return self._to_torch(tensor.dtype, tensor.shape, lambda: self._flat(tensor))

    def _array(self, tensor: NamedTensor) -> Array:
        if is_packed(tensor.dtype):
            dtype, shape = np.dtype(np.uint8), packed_shape(tensor.dtype, tensor.shape)
        else:
            dtype, shape = numpy_dtype(tensor.dtype), tensor.shape
        if math.prod(shape) == 0:
            empty = np.empty(shape, dtype)
            empty.flags.writeable = False
            return empty
        array: Array = self._flat(tensor).view(dtype).reshape(shape)
        return array

    def _flat(self, tensor: NamedTensor) -> NDArray[np.uint8]:
        """Return the bytes of a tensor that has some; writable ones for PyTorch."""
        if self._manifest.recipe(tensor.object_index) is not None:
            return self._made(tensor.object_index)
        ref = self._manifest.objects[tensor.object_index]
        reader = self._store.open_whole(ref.digest)
        if reader is None:
            raise StoreDamaged(f"tensor {tensor.name!r} is not in the store: fetch the model first")
        try:
            if reader.size_bytes != ref.size_bytes:
                raise StoreDamaged(f"tensor {tensor.name!r} has another size than the model says")
            if isinstance(reader, InlineReader):
                return self._in_memory(reader.data)
            return self._bytes_of(reader)
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"tensor {tensor.name!r}: cannot be mapped: {error}") from error
        finally:
            reader.close()

    def _in_memory(self, data: bytes | bytearray) -> NDArray[np.uint8]:
        """Return bytes as an array: read-only for good, or for PyTorch writable."""
        return np.frombuffer(bytes(data) if self._to_torch is None else bytearray(data), np.uint8)

    def _made(self, index: int) -> NDArray[np.uint8]:
        """Return what a recipe makes, in memory of its own."""
        data = bytearray(self._manifest.size_of(index))
        size = 0
        for block in iterate_part(self._store, self._manifest, index):
            data[size : size + len(block)] = block
            size += len(block)
        return self._in_memory(data)

    def _bytes_of(self, reader: FileReader) -> NDArray[np.uint8]:
        """Return an object's bytes, mapped; copied when there are too many maps already."""
        mapped = self._adopted.get(reader.path)
        if mapped is None:
            try:
                mapped = self._map(reader)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                return self._in_memory(read_all(reader))
        reader.confirm()  # the file that was mapped is the one that was hashed
        return np.asarray(mapped)[reader.start : reader.start + reader.size_bytes]

    def _map(self, reader: FileReader) -> Mapping:
        if self._map_count >= MAX_MAPS:
            raise OSError(errno.ENOMEM, "too many files are mapped")
        size_bytes = os.fstat(reader.descriptor).st_size
        if self._to_torch is None:
            mapped = Mapping(reader.descriptor, size_bytes)
        else:
            mapped = Mapping(reader.descriptor, size_bytes, writable=True)
        self._map_count += 1
        if reader.is_adopted:
            self._adopted[reader.path] = mapped
        return mapped
