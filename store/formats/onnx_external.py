"""ONNX models whose tensors are in other files beside them ("external data").

A tensor's message then has a path relative to the model's folder, an offset and a
length. The data file is cut where tensors begin and end; they are listed with the model,
because only that knows their names. A data file that was not added is not missed: its
tensors are not listed.

Paths are only looked up among the files of the model, never on a disk.

Source: ``onnx/onnx.proto``, ``TensorProto.external_data``.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from ..errors import BadInput
from ..names import check_tensor_name, quoted
from . import onnx, verbatim
from .layout import Content, Extent, HeldTensor, Layout, ReadAt
from .tile import tile

DATA_FORMAT = "onnx-data"


def parse_group(
    name: str, files: Mapping[str, tuple[int, ReadAt]], layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """Return better layouts of a model and its data files; none if it has no such files.

    Parameters
    ----------
    name : str
        The model's path.
    files : mapping of str to (int, ReadAt)
        All files.
    layouts : mapping of str to Layout
        Their layouts so far.

    Raises
    ------
    BadInput
        A tensor is not inside its file, or overlaps another one in part.
    """
    tensors = onnx.read_tensors(*files[name])
    held: list[HeldTensor] = []
    cuts: dict[str, dict[int, int]] = {}
    for tensor in tensors:
        if not tensor.is_external:
            continue
        try:
            found = _locate(tensor, name, files)
        except BadInput as error:
            raise BadInput(f"tensor {quoted(tensor.name)}: {error}") from error
        if found is None:
            continue
        held.append(found)
        path, offset, size_bytes = found.content.extents[0]
        cut = cuts.setdefault(path, {})
        if cut.setdefault(offset, size_bytes) != size_bytes:
            raise BadInput(f"tensor {quoted(tensor.name)} overlaps another one")
    if not held:
        return {}
    better = {name: onnx.layout_with(files[name][0], tensors, tuple(held))}
    for path, cut in cuts.items():
        better[path] = _cut(layouts[path], files[path][0], cut, path)
    return better


def _locate(
    tensor: onnx.TensorProto, model: str, files: Mapping[str, tuple[int, ReadAt]]
) -> HeldTensor | None:
    """Return a tensor with its place, or None if it is not listed."""
    size, dtype = onnx.size_of(tensor), tensor.dtype()
    location = tensor.external.get("location", "")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(model), location))
    if not size or dtype is None or not location or path not in files or path == model:
        return None
    offset = _number(tensor.external.get("offset", "0"))
    length = _number(tensor.external.get("length", str(size)))
    if length != size:
        raise BadInput(f"{length} bytes for a tensor of {size}")
    if offset + length > files[path][0]:
        raise BadInput(f"bytes {offset} to {offset + length} of {quoted(path)}, which ends before")
    content = Content((Extent(path, offset, length),), "", (), size)
    return HeldTensor(check_tensor_name(tensor.name), dtype, tuple(tensor.dims), content)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadInput(f"{quoted(text)} is no offset and no length")
    return int(text)


def _cut(layout: Layout, size_bytes: int, cut: dict[int, int], path: str) -> Layout:
    """Return a data file's layout, cut for one more model."""
    if layout.format == DATA_FORMAT:  # another model has its tensors there too
        known = {piece.offset: piece.size_bytes for piece in layout.pieces}
        if all(known.get(offset) == size for offset, size in cut.items()):
            return layout
        raise BadInput(f"two models cut {quoted(path)} in different ways")
    if layout.format != verbatim.FORMAT:
        raise BadInput(f"{quoted(path)} holds tensors of a model, and is a {layout.format} file")
    return tile(DATA_FORMAT, size_bytes, (), fixed=cut)
