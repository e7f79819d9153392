"""Which other files hold a file's tensors, by what the file itself says.

An index of shards, a TensorFlow.js ``model.json`` and an ONNX model with external data
name the files that belong to them. Whoever is given one of these alone, by its path or
its URL, learns here what else there is to read. Names are relative to the file's folder
and must stay below it; nothing here looks whether the files are there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import Any

from ..errors import BadInput
from ..names import check_path, check_paths
from . import onnx
from .layout import ReadAt, read_exactly
from .safetensors import load_header
from .tfjs import MAX_JSON_BYTES

MAX_COMPANIONS = 10_000
"""Most files that one may name: published models have some hundreds of shards."""


def companions(name: str, size_bytes: int, read_at: ReadAt) -> tuple[str, ...]:
    """Return the paths of the other files that a file names, sorted.

    Parameters
    ----------
    name : str
        The file's path in the model.
    size_bytes : int
        Its size.
    read_at : ReadAt
        Reads it.

    Raises
    ------
    BadInput
        It is malformed, or names files that no model can have.
    """
    end = name.lower()
    if end.endswith(".onnx"):
        tensors = onnx.read_tensors(size_bytes, read_at)
        named: Iterable[object] = (
            each.external.get("location", "") for each in tensors if each.is_external
        )
    elif end.endswith(".json") and size_bytes <= MAX_JSON_BYTES:
        named = _in_json(size_bytes, read_at)
    else:
        return ()
    folder = posixpath.dirname(name)
    found: set[str] = set()
    for path in named:
        if not isinstance(path, str):
            raise BadInput("it names a file by something that is no text")
        if path:
            found.add(check_path(posixpath.normpath(posixpath.join(folder, path))))
        if len(found) > MAX_COMPANIONS:
            raise BadInput(f"it names more than {MAX_COMPANIONS} files")
    found.discard(name)
    check_paths([name, *found])
    return tuple(sorted(found))


def _in_json(size_bytes: int, read_at: ReadAt) -> Iterable[object]:
    """Return what an index of shards or a ``model.json`` names; nothing for other JSON."""
    data = read_exactly(read_at, 0, size_bytes)
    if b'"weightsManifest"' not in data and b'"weight_map"' not in data:
        return ()
    document: dict[str, Any] = load_header(data.lstrip())
    shards, groups = document.get("weight_map"), document.get("weightsManifest")
    if isinstance(shards, dict):
        return shards.values()
    if not isinstance(groups, list):
        return ()
    named: list[object] = []
    for group in groups:
        paths = group.get("paths") if isinstance(group, dict) else None
        if not isinstance(paths, list):
            raise BadInput("a group of weights without paths")
        named += paths
    return named
