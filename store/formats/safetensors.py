"""Reader of the safetensors format, as strict as its reference implementation.

A file is an 8-byte little-endian header length N, N bytes of JSON, and a buffer.
The JSON object maps tensor names to ``{dtype, shape, data_offsets}``, offsets
counted from the start of the buffer, and may map ``__metadata__`` to an object
of strings. The tensors must tile the buffer exactly.

Source: the format section of the safetensors README, and ``SafeTensors::
read_metadata`` with ``Metadata::validate`` in its ``tensor.rs``. Two rules of the
README that the reference does not enforce are enforced here: the header begins
with ``{``, and no key occurs twice. Unknown keys beside ``dtype``, ``shape`` and
``data_offsets`` are passed over, as the reference does.

Tensor data is never read. The header is one piece, each tensor with bytes
another; an empty tensor is named but has no piece.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ..dtypes import tensor_size_bytes
from ..errors import BadInput
from ..manifest import MAX_TENSORS
from ..names import check_tensor_name, quoted
from .layout import Layout, Piece, ReadAt, TensorRange, read_exactly

FORMAT = "safetensors"

LENGTH_BYTES = 8
"""Bytes of the header length at the start of the file."""

MAX_HEADER_BYTES = 100_000_000
"""Longest JSON header: the reference implementation's own limit."""

MAX_HEADER_MARKS = 16 * MAX_TENSORS
"""Most commas, colons and opening brackets in a header.

JSON values can be as short as two bytes, and take some fifty in memory each, so
a small header could still become gigabytes. A tensor of two dimensions has 13
marks; those inside strings are counted too, which only free-form metadata feels.
"""

_MAX_INTEGER_DIGITS = 20
"""Digits of the largest 64-bit integer; a longer one is read as a float and refused."""

_METADATA_KEY = "__metadata__"


def parse(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of a safetensors file.

    Parameters
    ----------
    size_bytes : int
        The file's length in bytes.
    read_at : ReadAt
        Reads bytes of the file.

    Raises
    ------
    BadInput
        The file breaks a rule of the format; the message says which.
    """
    if size_bytes < LENGTH_BYTES:
        raise BadInput(f"{size_bytes} bytes are too few for a header length")
    header_bytes = int.from_bytes(read_exactly(read_at, 0, LENGTH_BYTES), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise BadInput(f"a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}")
    buffer_start = LENGTH_BYTES + header_bytes
    if buffer_start > size_bytes:
        raise BadInput(f"the header ends at byte {buffer_start}, the file at {size_bytes}")
    header = load_header(read_exactly(read_at, LENGTH_BYTES, header_bytes))
    _check_metadata(header.pop(_METADATA_KEY, None))
    if len(header) > MAX_TENSORS:
        raise BadInput(f"{len(header)} tensors, at most {MAX_TENSORS}")
    tensors = [_tensor_range(name, entry, buffer_start) for name, entry in header.items()]
    # Offset, then size: an empty tensor comes before the one that starts there.
    # Empty tensors at one offset keep the order of the header.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    _check_tiling(tensors, buffer_start, size_bytes)
    pieces = [Piece(0, buffer_start, is_tensor=False)]
    pieces += (
        Piece(tensor.offset, tensor.size_bytes, is_tensor=True)
        for tensor in tensors
        if tensor.size_bytes
    )
    return Layout(FORMAT, tuple(pieces), tuple(tensors))


def load_header(data: bytes) -> dict[str, Any]:
    """Read a JSON object from a stranger.

    Raises
    ------
    BadInput
        It is none, has a key twice, or would take too much memory.
    """
    if data[:1] != b"{":
        raise BadInput("the header does not begin with '{'")
    marks = sum(map(data.count, (b",", b":", b"[", b"{")))
    if marks > MAX_HEADER_MARKS:
        raise BadInput(f"the header has {marks} JSON marks, at most {MAX_HEADER_MARKS}")
    try:
        header = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise BadInput(f"the header is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadInput(f"the header is not JSON: {error}") from error
    except RecursionError as error:
        raise BadInput("the header is nested too deeply") from error
    assert isinstance(header, dict)  # it began with a brace
    return header


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadInput(f"the header has the key {quoted(key)} twice")
            seen.add(key)
    return entries


def _parse_integer(text: str) -> int | float:
    """Read a JSON integer as the reference does, for which ``-0`` is a float."""
    if len(text) > _MAX_INTEGER_DIGITS or text == "-0":
        return float(text)
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise BadInput(f"the header is not JSON: it holds {text}")


def _check_metadata(metadata: object) -> None:
    if metadata is None:  # left out, or null, which the reference takes for the same
        return
    if not isinstance(metadata, dict):
        raise BadInput(f"{_METADATA_KEY} is not an object")
    for key, value in metadata.items():
        if type(value) is not str:
            raise BadInput(f"{_METADATA_KEY} entry {quoted(key)} is not a string")
        try:
            (key + value).encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{_METADATA_KEY} entry {quoted(key)} is not valid Unicode") from error


def _tensor_range(name: str, entry: object, buffer_start: int) -> TensorRange:
    check_tensor_name(name)
    if not isinstance(entry, dict):
        raise BadInput(f"tensor {quoted(name)}: its entry is not an object")
    dtype = entry.get("dtype")
    if type(dtype) is not str:
        raise BadInput(f"tensor {quoted(name)}: dtype missing or not a string")
    shape = _unsigned_integers(name, "shape", entry.get("shape"))
    offsets = _unsigned_integers(name, "data_offsets", entry.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"tensor {quoted(name)}: data_offsets are not a begin and an end")
    begin, end = offsets
    try:
        expected_bytes = tensor_size_bytes(dtype, shape)
    except BadInput as error:
        raise BadInput(f"tensor {quoted(name)}: {error}") from error
    if end - begin != expected_bytes:
        raise BadInput(
            f"tensor {quoted(name)}: {end - begin} bytes by its offsets, "
            f"{expected_bytes} by its dtype and shape"
        )
    return TensorRange(name, dtype, shape, buffer_start + begin, expected_bytes)


def _unsigned_integers(name: str, key: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise BadInput(f"tensor {quoted(name)}: {key} missing or not an array")
    for value in values:
        # Not isinstance: a JSON true is an instance of int.
        if type(value) is not int or not 0 <= value < 1 << 64:
            raise BadInput(f"tensor {quoted(name)}: {key} must hold only 64-bit unsigned integers")
    return tuple(values)


def _check_tiling(tensors: list[TensorRange], buffer_start: int, size_bytes: int) -> None:
    end = buffer_start
    for tensor in tensors:
        if tensor.offset < end:
            raise BadInput(f"tensor {quoted(tensor.name)} overlaps the one before it")
        if tensor.offset > end:
            raise BadInput(
                f"{tensor.offset - end} bytes before tensor {quoted(tensor.name)} "
                "belong to no tensor"
            )
        end += tensor.size_bytes
    if end != size_bytes:
        raise BadInput(f"the tensors end at byte {end}, the file at {size_bytes}")
