"""Reader of PyTorch checkpoints in the ZIP form that ``torch.save`` writes since 1.6.

Storages are stored members of the archive, so they are read by range; which tensors lie
on them is said by a pickle, which `pickle_reader` reads and never runs. A tensor need not
fill its storage, nor lie there in C order, nor be alone on it: views, transposed and
strided tensors, and tied weights come out as what PyTorch would show (`tile`).

Names are paths through dicts and lists, joined with dots, so that the entries of a
``state_dict`` have their own names. The other files with these endings (older
checkpoints, which are one long pickle, and ``.bin`` files of other kinds) are kept
verbatim. So is a checkpoint with a tensor that no recipe may pick from its storage
(`recipes` bounds what that may cost in memory): better no tensor of it is seen than one
less than it has, and its layout's note says which one it was.

Source: PyTorch, ``torch/serialization.py`` (``_save``, ``persistent_id``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..dtypes import DTYPE_BITS, MAX_DIMENSIONS, tensor_size_bytes
from ..errors import BadInput
from ..manifest import MAX_TENSORS
from ..names import check_tensor_name, quoted
from ..recipes import MAX_SPREAD_BYTES, MAX_STRIDED_BYTES
from . import verbatim
from .layout import Layout, ReadAt, TensorRange, read_exactly
from .pickle_reader import MAX_PICKLE_BYTES, Tensor, read_pickle
from .tile import StridedTensor, is_contiguous, tile
from .zipdir import STORED, Member, is_zip, read_directory

FORMAT = "torch-zip"

MAX_DEPTH = 64
"""Deepest nesting of dicts and lists that tensors are looked for in."""

MAX_VISITED = 1 << 20
"""Most tensors, dicts and lists looked at: a list that holds one list many times, which
holds another many times, is small in the file and endless to walk."""

_STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.ComplexDoubleStorage": "C128[1:16]",
    "torch.storage.UntypedStorage": "U8",
}

_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.complex128": "C128[1:16]",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
}


def parse(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of a checkpoint; of any other file, that of `verbatim`.

    Raises
    ------
    BadInput
        The archive is damaged, or its pickle wants what is not allowed.
    """
    if not is_zip(size_bytes, read_at):
        return verbatim.parse(size_bytes, read_at)
    members = {member.name: member for member in read_directory(size_bytes, read_at)}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        return verbatim.parse(size_bytes, read_at)
    prefix = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{prefix}byteorder")
    if order is not None and _content(order, read_at, 16) != b"little":
        raise BadInput("a checkpoint in big-endian order, which is not read here")
    value = read_pickle(_content(members[pickles[0]], read_at, MAX_PICKLE_BYTES))
    plain: list[TensorRange] = []
    strided: list[StridedTensor] = []
    for name, tensor in _tensors(value):
        try:
            check_tensor_name(name)
            _place(name, tensor, members.get(f"{prefix}data/{tensor.storage.key}"), plain, strided)
        except BadInput as error:
            raise BadInput(f"tensor {quoted(name)}: {error}") from error
    layout = tile(FORMAT, size_bytes, plain, strided)
    if costly := _too_costly(layout):
        note = f"kept whole, its tensors are not seen: {quoted(costly)} is not contiguous and large"
        return replace(verbatim.parse(size_bytes, read_at), note=note)
    return layout


def _too_costly(layout: Layout) -> str:
    """Return the name of a tensor that no recipe may pick from the file, if there is one."""
    for held in layout.held:
        content = held.content
        source_bytes = sum(extent.size_bytes for extent in content.extents)
        if content.decode == "strided" and (
            max(source_bytes, content.size_bytes) > MAX_STRIDED_BYTES
            or content.size_bytes > max(source_bytes, MAX_SPREAD_BYTES)
        ):
            return held.name
    return ""


def _content(member: Member, read_at: ReadAt, limit: int) -> bytes:
    if member.method != STORED:
        raise BadInput(f"member {quoted(member.name)} is compressed, which PyTorch never does")
    if member.size_bytes > limit:
        raise BadInput(f"member {quoted(member.name)} has {member.size_bytes} bytes")
    return read_exactly(read_at, member.offset, member.size_bytes)


def _tensors(root: object) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor among nested dicts, lists and tuples, with its name."""
    stack: list[tuple[str, int, object]] = [("", 0, root)]
    visited = found = 0
    while stack:
        name, depth, value = stack.pop()
        visited += 1
        if visited > MAX_VISITED or depth > MAX_DEPTH:
            raise BadInput("a checkpoint nested too deeply, or that holds itself")
        if isinstance(value, Tensor):
            found += 1
            if found > MAX_TENSORS:
                raise BadInput(f"more than {MAX_TENSORS} tensors")
            yield name, value
            continue
        if isinstance(value, dict):
            entries = list(value.items())
        elif type(value) in (list, tuple):
            assert isinstance(value, list | tuple)
            entries = list(enumerate(value))
        else:
            continue
        if visited + len(stack) + len(entries) > MAX_VISITED:
            raise BadInput("a checkpoint nested too deeply, or that holds itself")
        for key, item in reversed(entries):
            if isinstance(item, Tensor | dict | list | tuple):
                stack.append((_join(name, key), depth + 1, item))


def _join(name: str, key: object) -> str:
    text = key.decode("latin-1") if isinstance(key, bytes) else str(key)
    if len(name) + len(text) > 4096:
        raise BadInput("a checkpoint with a name of more than 4096 characters")
    return f"{name}.{text}" if name else text


def _place(
    name: str,
    tensor: Tensor,
    member: Member | None,
    plain: list[TensorRange],
    strided: list[StridedTensor],
) -> None:
    """Find a tensor's bytes, and put it into one of the lists."""
    stored = _STORAGES.get(tensor.storage.kind)
    dtype = _DTYPES.get(tensor.dtype) if tensor.dtype else stored
    if stored is None or dtype is None:
        raise BadInput(f"its type {quoted(tensor.dtype or tensor.storage.kind)} is not read here")
    if len(tensor.shape) > MAX_DIMENSIONS or min((*tensor.shape, *tensor.strides, 0)) < 0:
        raise BadInput("its shape or strides are out of range")
    size = tensor_size_bytes(dtype, tensor.shape)
    if member is None:
        raise BadInput(f"its storage {quoted(tensor.storage.key)} is not in the file")
    if member.method != STORED:
        raise BadInput("its storage is compressed, which PyTorch never does")
    if tensor.storage.element_count * _item_bytes(stored) != member.size_bytes:
        raise BadInput(f"its storage has {member.size_bytes} bytes, which is not what it should")
    item = _item_bytes(dtype)
    if not size:
        plain.append(TensorRange(name, dtype, tensor.shape, member.offset, 0))
        return
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.offset < 0 or (tensor.offset + reach + 1) * item > member.size_bytes:
        raise BadInput("it reaches beyond its storage")
    offset = member.offset + tensor.offset * item
    if is_contiguous(tensor.shape, tensor.strides):
        plain.append(TensorRange(name, dtype, tensor.shape, offset, size))
        return
    assert math.prod(tensor.shape) * item == size
    strides = tuple(stride * item for stride in tensor.strides)
    strided.append(StridedTensor(name, dtype, tensor.shape, item, offset, strides))


def _item_bytes(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8 if dtype in DTYPE_BITS else 16
