"""Reader of TensorFlow.js models: ``model.json`` and the shards it names.

The weights of a group lie one after another in its shards, which are cut anywhere: a
tensor may begin in one and end in another. Such a tensor is put together, and the ends
of the shards are made from it. The tensors are listed with ``model.json``.

Quantised weights are listed with the type they have in the file. Of a group with strings
only what is before the first of them is listed, because a string's length stands in its
bytes. A JSON file that is none of a model's, or whose shards were not added, stays as it
is.

Source: the TensorFlow.js guide, "Save and load models", and ``tfjs-core``'s
``io/types.ts`` (``WeightsManifestConfig``).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..dtypes import tensor_size_bytes
from ..errors import BadInput
from ..names import check_tensor_name, quoted
from . import verbatim
from .layout import Content, Extent, HeldTensor, Layout, Made, ReadAt, TensorRange, read_exactly
from .safetensors import load_header
from .tile import tile

FORMAT = "tfjs"
SHARD_FORMAT = "tfjs-shard"

MAX_JSON_BYTES = 100_000_000
"""Largest JSON file looked into: the limit of a safetensors header."""

_DTYPES = {
    "float32": "F32",
    "int32": "I32",
    "bool": "BOOL",
    "complex64": "C64",
    "float16": "F16",
    "uint8": "U8",
    "uint16": "U16",
}


def parse_group(
    name: str, files: Mapping[str, tuple[int, ReadAt]], layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """Return better layouts of a ``model.json`` and its shards; none if it is no such file.

    Parameters
    ----------
    name : str
        The JSON file's path.
    files : mapping of str to (int, ReadAt)
        All files.
    layouts : mapping of str to Layout
        Their layouts so far.

    Raises
    ------
    BadInput
        The manifest of weights does not fit the shards.
    """
    groups = _weights_manifest(*files[name])
    better: dict[str, Layout] = {}
    held: list[HeldTensor] = []
    empty: list[TensorRange] = []
    for group in groups:
        shards = _shards(group, name, files)
        if shards is None:
            continue
        for path, _ in shards:
            if layouts[path].format != verbatim.FORMAT or path in better or path == name:
                raise BadInput(f"the shard {quoted(path)} is used twice, or is another format")
        better |= _cut_group(group, shards, held, empty)
    if not better:
        return {}
    layout = verbatim.parse(*files[name])
    return {name: replace(layout, format=FORMAT, tensors=tuple(empty), held=tuple(held)), **better}


def _weights_manifest(size_bytes: int, read_at: ReadAt) -> list[dict[str, Any]]:
    """Return the groups of a ``model.json``; none for any other JSON."""
    if size_bytes > MAX_JSON_BYTES:
        return []
    data = read_exactly(read_at, 0, size_bytes)
    if b'"weightsManifest"' not in data:
        return []
    try:
        document = load_header(data.lstrip())
    except BadInput:
        return []
    groups = document.get("weightsManifest")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return []
    return groups


def _shards(
    group: dict[str, Any], name: str, files: Mapping[str, tuple[int, ReadAt]]
) -> list[tuple[str, int]] | None:
    """Return the paths and sizes of a group's shards; None if some were not added."""
    paths = group.get("paths")
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadInput("a group of weights without paths")
    if len(set(paths)) != len(paths):
        raise BadInput("a group of weights with a shard twice")
    folder = posixpath.dirname(name)
    found = [posixpath.normpath(posixpath.join(folder, path)) for path in paths]
    if not all(path in files for path in found):
        return None
    return [(path, files[path][0]) for path in found]


def _cut_group(
    group: dict[str, Any],
    shards: list[tuple[str, int]],
    held: list[HeldTensor],
    empty: list[TensorRange],
) -> dict[str, Layout]:
    """Return the layouts of a group's shards, and note its tensors."""
    fixed: dict[str, dict[int, int]] = {path: {} for path, _ in shards}
    made: dict[str, dict[int, Made]] = {path: {} for path, _ in shards}
    total = sum(size for _, size in shards)
    space = _Space(shards)
    complete = True
    for tensor_name, dtype, shape in _weights(group):
        if not dtype:
            complete = False
            break
        size = tensor_size_bytes(dtype, shape)
        if not size:
            empty.append(TensorRange(tensor_name, dtype, shape, 0, 0))
            continue
        extents = tuple(space.take(size))
        content = Content(extents, "", (), size)
        held.append(HeldTensor(tensor_name, dtype, shape, content))
        start = 0
        for path, offset, length in extents:
            fixed[path][offset] = length
            if len(extents) > 1:
                made[path][offset] = Made("slice", (start,), (content,))
            start += length
    if complete and space.taken_bytes != total:
        raise BadInput(f"weights of {space.taken_bytes} bytes in shards of {total}")
    return {
        path: tile(SHARD_FORMAT, size, (), fixed=fixed[path], made=made[path])
        for path, size in shards
    }


def _weights(group: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each weight; no dtype for strings."""
    weights = group.get("weights")
    if not isinstance(weights, list):
        raise BadInput("a group of weights that lists none")
    for weight in weights:
        if not isinstance(weight, dict):
            raise BadInput("a weight that is not described")
        name, kind, shape = weight.get("name"), weight.get("dtype"), weight.get("shape")
        quantization = weight.get("quantization")
        if isinstance(quantization, dict):
            kind = quantization.get("dtype")
        if type(name) is not str or type(kind) is not str or not isinstance(shape, list):
            raise BadInput("a weight without name, dtype or shape")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise BadInput(f"weight {quoted(name)} has a shape that is none")
        if kind not in _DTYPES and kind != "string":
            raise BadInput(f"weight {quoted(name)} has the unknown dtype {quoted(kind)}")
        yield check_tensor_name(name), _DTYPES.get(kind, ""), tuple(shape)


class _Space:
    """The shards of a group as one run of bytes, handed out from the beginning."""

    def __init__(self, shards: list[tuple[str, int]]) -> None:
        self.taken_bytes = 0
        self._left = [Extent(path, 0, size) for path, size in shards if size]
        self._left.reverse()

    def take(self, size_bytes: int) -> Iterator[Extent]:
        """Yield the next runs of bytes.

        Raises
        ------
        BadInput
            There are not so many.
        """
        self.taken_bytes += size_bytes
        while size_bytes:
            if not self._left:
                raise BadInput("the shards end before their weights do")
            path, offset, left = self._left.pop()
            length = min(left, size_bytes)
            yield Extent(path, offset, length)
            size_bytes -= length
            if left > length:
                self._left.append(Extent(path, offset + length, left - length))
