"""Reader of GGUF, the format of llama.cpp, versions 2 and 3, little-endian.

A file is a header (key-value metadata and a table of tensors), padding, and the tensors'
bytes, each aligned. The header is one piece and is kept as it is, metadata and all. A
tensor's dimensions stand in the file with the fastest first; shapes here are the other
way round, as numpy and safetensors have them.

Quantised types are opaque: blocks of so many elements in so many bytes (`dtypes`). Types
unknown here have no known size; a file with one is refused.

Source: ``docs/gguf.md`` of the ggml project, and the table of types in ``gguf-py``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..dtypes import MAX_DIMENSIONS, tensor_size_bytes
from ..errors import BadInput
from ..manifest import MAX_TENSORS
from ..names import check_tensor_name, quoted
from .cursor import Cursor
from .layout import Layout, ReadAt, TensorRange
from .tile import tile

FORMAT = "gguf"

MAX_HEADER_BYTES = 1 << 30
"""Longest header. A vocabulary of a million tokens with scores takes some 30 MB; reading
goes by windows, and nothing of the metadata is kept."""

MAX_KEYS = 1 << 16
"""Most metadata entries; models have under a hundred."""

MAX_VALUES = 64 << 20
"""Most values of arrays, all together: walking over strings takes time for each."""

MAX_NAME_BYTES = 1 << 16
"""Longest key: the format's own limit (2¹⁶ - 1)."""

DEFAULT_ALIGNMENT = 32

TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0[32:18]",
    3: "Q4_1[32:20]",
    6: "Q5_0[32:22]",
    7: "Q5_1[32:24]",
    8: "Q8_0[32:34]",
    9: "Q8_1[32:40]",
    10: "Q2_K[256:84]",
    11: "Q3_K[256:110]",
    12: "Q4_K[256:144]",
    13: "Q5_K[256:176]",
    14: "Q6_K[256:210]",
    15: "Q8_K[256:292]",
    16: "IQ2_XXS[256:66]",
    17: "IQ2_XS[256:74]",
    18: "IQ3_XXS[256:98]",
    19: "IQ1_S[256:50]",
    20: "IQ4_NL[32:18]",
    21: "IQ3_S[256:110]",
    22: "IQ2_S[256:82]",
    23: "IQ4_XS[256:136]",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M[256:56]",
    30: "BF16",
    34: "TQ1_0[256:54]",
    35: "TQ2_0[256:66]",
    39: "MXFP4[32:17]",
    40: "NVFP4[64:36]",
    41: "Q1_0[128:18]",
}
"""Types by number, as in ``GGMLQuantizationType`` and ``GGML_QUANT_SIZES``."""

_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING = 8
_ARRAY = 9
_ALIGNMENT_KEY = b"general.alignment"


def is_gguf(size_bytes: int, read_at: ReadAt) -> bool:
    """Tell whether a file begins as one of this format."""
    return size_bytes >= 24 and read_at(0, 4) == b"GGUF"


def parse(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return the layout of a GGUF file.

    Raises
    ------
    BadInput
        The file breaks a rule of the format, or a limit.
    """
    found, cursor, tensor_count = _read_metadata(size_bytes, read_at)
    entries = [_entry(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // found.alignment) * found.alignment
    tensors = [each._replace(offset=start + each.offset) for each in entries]
    return tile(FORMAT, size_bytes, [_at_most(each, size_bytes) for each in tensors])


class Metadata(NamedTuple):
    """Where a file's metadata and its table of tensors are.

    Attributes
    ----------
    entries : list of (bytes, int, int)
        Key, type and place of the value of each entry.
    alignment : int
        Where tensors may begin: at multiples of this.
    table_start, table_stop : int
        The table of tensors, in bytes from the start of the file.
    """

    entries: list[tuple[bytes, int, int]]
    alignment: int
    table_start: int
    table_stop: int


def metadata(size_bytes: int, read_at: ReadAt) -> Metadata:
    """Return where things are in a file's header.

    Raises
    ------
    BadInput
        As for `parse`.
    """
    found, cursor, tensor_count = _read_metadata(size_bytes, read_at)
    for _ in range(tensor_count):
        _entry(cursor)
    return found._replace(table_stop=cursor.position)


def _read_metadata(size_bytes: int, read_at: ReadAt) -> tuple[Metadata, _Header, int]:
    """Read a header up to the table of tensors; return how many there are, too."""
    cursor = _Header(size_bytes, read_at)
    if cursor.take(4) != b"GGUF":
        raise BadInput("not a GGUF file: it does not begin as one")
    version = cursor.unsigned(4)
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "in big-endian order" if swapped in (1, 2, 3) else f"of version {version}"
        raise BadInput(f"a GGUF file {what}; versions 2 and 3 in little-endian order are read")
    tensor_count, key_count = cursor.unsigned(8), cursor.unsigned(8)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise BadInput(f"a GGUF file of {tensor_count} tensors and {key_count} metadata entries")
    alignment = DEFAULT_ALIGNMENT
    keys: list[tuple[bytes, int, int]] = []
    for _ in range(key_count):
        key = cursor.text(MAX_NAME_BYTES)
        kind = cursor.unsigned(4)
        keys.append((key, kind, cursor.position))
        if key == _ALIGNMENT_KEY:
            if kind != 4:
                raise BadInput("the alignment is not a 32-bit number")
            alignment = cursor.unsigned(4)
        else:
            cursor.skip_value(kind)
    if not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise BadInput(f"an alignment of {alignment}, which is no power of two up to 2^20")
    return Metadata(keys, alignment, cursor.position, 0), cursor, tensor_count


def _at_most(tensor: TensorRange, size_bytes: int) -> TensorRange:
    """Return a tensor, an empty one not beyond the file's end: padding may be left out."""
    if tensor.size_bytes:
        return tensor
    return tensor._replace(offset=min(tensor.offset, size_bytes))


def _entry(cursor: _Header) -> TensorRange:
    raw = cursor.text(MAX_NAME_BYTES)
    try:
        name = check_tensor_name(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadInput(f"a tensor with the name {raw[:40]!r}, which is not UTF-8") from error
    count = cursor.unsigned(4)
    if count > MAX_DIMENSIONS:
        raise BadInput(f"tensor {quoted(name)} has {count} dimensions")
    shape = tuple(cursor.unsigned(8) for _ in range(count))[::-1]
    kind, offset = cursor.unsigned(4), cursor.unsigned(8)
    dtype = TYPES.get(kind)
    if dtype is None:
        raise BadInput(f"tensor {quoted(name)} has the unknown type {kind}")
    try:
        return TensorRange(name, dtype, shape, offset, tensor_size_bytes(dtype, shape))
    except BadInput as error:
        raise BadInput(f"tensor {quoted(name)}: {error}") from error


class _Header(Cursor):
    """Reads a header's strings and values."""

    def __init__(self, size_bytes: int, read_at: ReadAt) -> None:
        super().__init__(min(size_bytes, MAX_HEADER_BYTES), read_at)
        self._values_left = MAX_VALUES

    def text(self, limit: int) -> bytes:
        """Return the next string."""
        length = self.unsigned(8)
        if length > limit:
            raise BadInput(f"a name of {length} bytes, at most {limit}")
        return self.take(length)

    def skip_value(self, kind: int) -> None:
        """Skip a value of metadata."""
        if kind == _STRING:
            self.skip(self.unsigned(8))
        elif kind == _ARRAY:
            inner, count = struct.unpack("<IQ", self.take(12))
            if inner == _STRING:
                self._values_left -= count
                if self._values_left < 0:
                    raise BadInput(f"metadata of more than {MAX_VALUES} strings")
                for _ in range(count):
                    self.skip(self.unsigned(8))
            else:
                self.skip(_scalar_bytes(inner) * count)
        else:
            self.skip(_scalar_bytes(kind))


def _scalar_bytes(kind: int) -> int:
    size = _SCALAR_BYTES.get(kind)
    if size is None:
        raise BadInput(f"metadata of the unknown type {kind}")
    return size
