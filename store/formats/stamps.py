"""Hash metadata inside a model file's own header, where every other tool passes it over.

A *stamp* is a piece of JSON: for each tensor its digest and, if it has more than one
chunk, its chunk list. Who reads the header of a stamped file at a web server knows every
tensor and needs to fetch only those it lacks. It stands in

- safetensors: ``__metadata__``, under ``tensorswarm``;
- GGUF: the metadata, as the string ``tensorswarm.stamp``;
- ONNX: ``metadata_props``, under ``tensorswarm``;
- JSON files (TensorFlow.js's ``model.json``, an index of shards): the field
  ``tensorswarm``. Their tensors lie in other files, and so may those of an ONNX model.

Where a file's bytes follow from a tensor, but are not the tensor (a shard that ends in the
middle of it, integers kept as varints), the stamp has the digests of those parts too. With
them a reader can describe the file without having them.

A stamp is the word of whoever wrote it, like a manifest: bytes that do not match it are
refused. It says nothing about the header it stands in.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..digest import DIGEST_SIZE, chunk_count, digest_of
from ..errors import BadInput
from ..names import quoted
from . import gguf, onnx
from .layout import ReadAt, read_exactly
from .safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, load_header

KEY = "tensorswarm"
GGUF_KEY = b"tensorswarm.stamp"
VERSION = 1

MAX_STAMP_BYTES = 64 << 20
"""Longest stamp, as text: chunk lists of a terabyte take 45 MiB in base64."""

_METADATA_PROPS = 14
_GGUF_STRING = 8


class Stamped(NamedTuple):
    """What a stamp says of one tensor.

    Attributes
    ----------
    digest : bytes
        Its digest.
    chunk_list : bytes
        Its chunk list, or none.
    parts : tuple of bytes
        Digests of the pieces that are made of it (`pieces_made_of` has their order).
    """

    digest: bytes
    chunk_list: bytes
    parts: tuple[bytes, ...] = ()


class Run(NamedTuple):
    """A run of bytes of the original file, as a part of the stamped one."""

    offset: int
    size_bytes: int


def text_of(tensors: Mapping[str, Stamped]) -> str:
    """Return a stamp's text."""
    entries: dict[str, dict[str, str]] = {}
    for name, (digest, chunk_list, parts) in tensors.items():
        entries[name] = {"digest": digest.hex()}
        if chunk_list:
            entries[name]["chunks"] = base64.b64encode(chunk_list).decode()
        if parts:
            entries[name]["parts"] = base64.b64encode(b"".join(parts)).decode()
    return json.dumps({"version": VERSION, "tensors": entries}, separators=(",", ":"))


def parse_text(text: str) -> dict[str, Stamped]:
    """Read a stamp.

    Raises
    ------
    BadInput
        It is none, or of another version.
    """
    if len(text) > MAX_STAMP_BYTES:
        raise BadInput(f"a stamp of {len(text)} characters, at most {MAX_STAMP_BYTES}")
    try:
        document = load_header(text.encode())
    except (BadInput, UnicodeEncodeError) as error:
        raise BadInput(f"a stamp that cannot be read: {error}") from error
    return _parse_document(document)


def _parse_document(document: Mapping[str, Any]) -> dict[str, Stamped]:
    tensors = document.get("tensors")
    if document.get("version") != VERSION or not isinstance(tensors, dict):
        raise BadInput("a stamp of an unknown version")
    return {name: _parse_entry(name, entry) for name, entry in tensors.items()}


def _parse_entry(name: str, entry: object) -> Stamped:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    try:
        digest = bytes.fromhex(str(fields.get("digest", "")))
        chunk_list = base64.b64decode(str(fields.get("chunks", "")), validate=True)
        parts = base64.b64decode(str(fields.get("parts", "")), validate=True)
    except (ValueError, binascii.Error) as error:
        raise BadInput(f"a stamp with a bad entry for {quoted(name)}") from error
    if len(digest) != DIGEST_SIZE or (len(chunk_list) | len(parts)) % DIGEST_SIZE:
        raise BadInput(f"a stamp with a bad entry for {quoted(name)}")
    starts = range(0, len(parts), DIGEST_SIZE)
    return Stamped(digest, chunk_list, tuple(parts[at : at + DIGEST_SIZE] for at in starts))


def check_entry(name: str, entry: Stamped, size_bytes: int) -> bytes:
    """Return the digest of a stamped tensor's chunk list, empty if it has none.

    Raises
    ------
    BadInput
        The list does not fit a tensor of this size.
    """
    chunks = chunk_count(size_bytes)
    if len(entry.chunk_list) != (DIGEST_SIZE * chunks if chunks > 1 else 0):
        raise BadInput(f"a stamp whose list of chunks does not fit {quoted(name)}")
    return digest_of(entry.chunk_list) if entry.chunk_list else b""


def read_stamp(name: str, size_bytes: int, read_at: ReadAt) -> dict[str, Stamped] | None:
    """Return the stamp in a file's header, or None if it has none.

    Raises
    ------
    BadInput
        The header, or the stamp in it, is malformed.
    """
    end = name.lower()
    if end.endswith(".safetensors"):
        text = _metadata(_safetensors_header(size_bytes, read_at)).get(KEY)
    elif end.endswith(".gguf"):
        text = _find_in_gguf(size_bytes, read_at)
    elif end.endswith(".onnx"):
        text = _find_in_onnx(size_bytes, read_at)
    elif end.endswith(".json"):
        return _find_in_json(size_bytes, read_at)
    else:
        return None
    return None if text is None else parse_text(text)


def stamped(name: str, size_bytes: int, read_at: ReadAt, text: str) -> list[bytes | Run]:
    """Return what a stamped copy of a file is made of, in order.

    Parameters
    ----------
    name : str
        The file's name.
    size_bytes : int
        Its size.
    read_at : ReadAt
        Reads it.
    text : str
        The stamp.

    Raises
    ------
    BadInput
        The format cannot be stamped, or the file bears a stamp already.
    """
    if read_stamp(name, size_bytes, read_at) is not None:
        raise BadInput("it bears a stamp already")
    end = name.lower()
    if end.endswith(".safetensors"):
        return _stamp_safetensors(size_bytes, read_at, text)
    if end.endswith(".gguf"):
        return _stamp_gguf(size_bytes, read_at, text)
    if end.endswith(".onnx"):
        entry = _message_field(1, KEY.encode()) + _message_field(2, text.encode())
        return [Run(0, size_bytes), _message_field(_METADATA_PROPS, entry)]
    if end.endswith(".json"):
        return [_stamp_json(size_bytes, read_at, text)]
    raise BadInput("only safetensors, GGUF, ONNX and TensorFlow.js or index JSON can be stamped")


# ---- safetensors


def _safetensors_header(size_bytes: int, read_at: ReadAt) -> dict[str, Any]:
    if size_bytes < LENGTH_BYTES:
        raise BadInput(f"a safetensors file of {size_bytes} bytes")
    length = int.from_bytes(read_exactly(read_at, 0, LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > size_bytes:
        raise BadInput(f"a header of {length} bytes")
    return load_header(read_exactly(read_at, LENGTH_BYTES, length))


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    found = header.get("__metadata__")
    return found if isinstance(found, dict) else {}


def _stamp_safetensors(size_bytes: int, read_at: ReadAt, text: str) -> list[bytes | Run]:
    header = _safetensors_header(size_bytes, read_at)
    start = LENGTH_BYTES + int.from_bytes(read_exactly(read_at, 0, LENGTH_BYTES), "little")
    metadata = {**_metadata(header), KEY: text}
    new = json.dumps(
        {"__metadata__": metadata}
        | {key: value for key, value in header.items() if key != "__metadata__"},
        separators=(",", ":"),
    ).encode()
    new += b" " * (-len(new) % 8)
    if len(new) > MAX_HEADER_BYTES:
        raise BadInput(f"the stamp would make a header of {len(new)} bytes")
    return [struct.pack("<Q", len(new)) + new, Run(start, size_bytes - start)]


# ---- GGUF


def _find_in_gguf(size_bytes: int, read_at: ReadAt) -> str | None:
    for key, kind, offset in gguf.metadata(size_bytes, read_at).entries:
        if key == GGUF_KEY and kind == _GGUF_STRING:
            length = int.from_bytes(read_exactly(read_at, offset, 8), "little")
            if length > MAX_STAMP_BYTES or offset + 8 + length > size_bytes:
                raise BadInput(f"a stamp of {length} bytes, at most {MAX_STAMP_BYTES}")
            return _utf8(read_exactly(read_at, offset + 8, length))
    return None


def _stamp_gguf(size_bytes: int, read_at: ReadAt, text: str) -> list[bytes | Run]:
    found = gguf.metadata(size_bytes, read_at)
    data = text.encode()
    entry = struct.pack("<Q", len(GGUF_KEY)) + GGUF_KEY
    entry += struct.pack("<IQ", _GGUF_STRING, len(data)) + data
    count = struct.pack("<Q", len(found.entries) + 1)
    table = Run(found.table_start, found.table_stop - found.table_start)
    header_bytes = found.table_stop + len(entry)
    start = min(-(-found.table_stop // found.alignment) * found.alignment, size_bytes)
    parts: list[bytes | Run] = [Run(0, 16), count, Run(24, found.table_start - 24), entry, table]
    if start < size_bytes or found.table_stop < size_bytes:
        parts.append(bytes(-header_bytes % found.alignment))
        parts.append(Run(start, size_bytes - start))
    return parts


# ---- ONNX


def _find_in_onnx(size_bytes: int, read_at: ReadAt) -> str | None:
    for key, value in onnx.metadata_props(size_bytes, read_at):
        if key == KEY.encode():
            if value.size_bytes > MAX_STAMP_BYTES:
                raise BadInput(f"a stamp of {value.size_bytes} bytes, at most {MAX_STAMP_BYTES}")
            return _utf8(read_exactly(read_at, value.offset, value.size_bytes))
    return None


def _message_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# ---- JSON


def _find_in_json(size_bytes: int, read_at: ReadAt) -> dict[str, Stamped] | None:
    """Return the stamp in a JSON file that can have one; none in any other file."""
    if size_bytes > MAX_HEADER_BYTES:
        return None
    data = read_exactly(read_at, 0, size_bytes)
    if f'"{KEY}"'.encode() not in data:
        return None
    document = load_header(data.lstrip())
    found = document.get(KEY)
    if "weightsManifest" not in document and "weight_map" not in document:
        return None
    return _parse_document(found) if isinstance(found, dict) else None


def _stamp_json(size_bytes: int, read_at: ReadAt, text: str) -> bytes:
    if size_bytes > MAX_HEADER_BYTES:
        raise BadInput(f"a JSON file of {size_bytes} bytes, at most {MAX_HEADER_BYTES}")
    document = load_header(read_exactly(read_at, 0, size_bytes).lstrip())
    if "weightsManifest" not in document and "weight_map" not in document:
        raise BadInput("neither a TensorFlow.js model nor an index of shards")
    if KEY in document:
        raise BadInput("it bears a stamp already")
    return json.dumps({**document, KEY: json.loads(text)}, indent=1).encode()


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadInput("a stamp that is not UTF-8") from error


def bytes_of(parts: list[bytes | Run], read_at: ReadAt, block_bytes: int) -> Iterator[bytes]:
    """Yield a stamped copy's bytes, in blocks."""
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        for start in range(0, part.size_bytes, block_bytes):
            length = min(block_bytes, part.size_bytes - start)
            yield read_exactly(read_at, part.offset + start, length)
