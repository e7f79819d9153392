"""The manifest as JSON beside a model's files, for people, web pages and origins.

A sidecar says the same as the manifest and can be read without our code: the files, each
tensor's name, dtype, shape and digest. It also has what a reader needs to fetch the model
from a plain web server: the manifest's own bytes and the chunk lists, in base64. Those
alone are believed, after their digests were checked; the readable part is for reading.

Beside one file it has that file's name and ``.tensorswarm.json``; in a folder it is
called ``tensorswarm.json``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from .cid import MODEL_CODEC, object_cid, parse_reference
from .digest import digest_of
from .errors import BadInput
from .formats.safetensors import load_header
from .manifest import Manifest

SUFFIX = ".tensorswarm.json"
FOLDER_NAME = "tensorswarm.json"
VERSION = 1

MAX_SIDECAR_BYTES = 256 << 20
"""Longest sidecar: manifest and chunk lists in base64, and 300 bytes for each tensor."""


def encode(manifest: Manifest, chunk_lists: Mapping[bytes, bytes]) -> str:
    """Return a sidecar.

    Parameters
    ----------
    manifest : Manifest
        The model.
    chunk_lists : mapping of bytes to bytes
        Its chunk lists, by their digests.
    """
    document = {
        "tensorswarm": VERSION,
        "model": manifest.model_id,
        "weights": manifest.weights_digest.hex(),
        "files": [
            {
                "path": file.path,
                "size": file.size_bytes,
                "format": file.format,
                "tensors": [
                    {
                        "name": tensor.name,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                        "size": manifest.size_of(tensor.object_index),
                        "digest": manifest.digest_of(tensor.object_index).hex(),
                        "cid": object_cid(manifest.digest_of(tensor.object_index)),
                    }
                    for tensor in file.tensors
                ],
            }
            for file in manifest.files
        ],
        "manifest": base64.b64encode(manifest.encode()).decode(),
        "chunk_lists": [base64.b64encode(data).decode() for _, data in sorted(chunk_lists.items())],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def decode(data: bytes) -> tuple[Manifest, dict[bytes, bytes]]:
    """Read a sidecar: the manifest, and the chunk lists by their digests.

    Raises
    ------
    BadInput
        It is none, contradicts its own model id, or lacks a chunk list.
    """
    if len(data) > MAX_SIDECAR_BYTES:
        raise BadInput(f"a sidecar of {len(data)} bytes, at most {MAX_SIDECAR_BYTES}")
    document = load_header(data.lstrip())
    if document.get("tensorswarm") != VERSION:
        raise BadInput("not a sidecar of a known version")
    reference = parse_reference(str(document.get("model", "")))
    manifest = Manifest.decode(_bytes(document.get("manifest")))
    if reference.codec != MODEL_CODEC or reference.digest != manifest.digest:
        raise BadInput("a sidecar whose manifest is not that of the model it names")
    entries = document.get("chunk_lists")
    if not isinstance(entries, list):
        raise BadInput("a sidecar without chunk lists")
    lists = {digest_of(each): each for each in map(_bytes, entries)}
    wanted = {ref.chunk_list for ref in manifest.objects if ref.chunk_list}
    if not wanted <= lists.keys():
        raise BadInput("a sidecar that lacks a list of chunks")
    return manifest, {digest: lists[digest] for digest in wanted}


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (ValueError, binascii.Error) as error:
        raise BadInput("a sidecar that is not proper base64") from error
