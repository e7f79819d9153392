"""Digests, chunk lists and identifiers: against vectors, and against base32 by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorswarm.store import digest
from tensorswarm.store.cid import (
    MAX_CID_TEXT,
    Reference,
    dht_key,
    model_cid,
    object_cid,
    parse_reference,
)
from tensorswarm.store.errors import BadInput

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "digests.json").read_text("utf-8")
)
FOREIGN_CIDS = {
    "version 0, SHA-256": "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
    "raw, SHA-256": "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
}


def counting_bytes(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["length"]))
def test_digest_and_chunk_list_of_vector(vector: dict[str, Any]) -> None:
    data = counting_bytes(vector["length"])
    chunk_list = digest.chunk_list_of(data)
    assert digest.digest_of(data).hex() == vector["digest"]
    assert [part.hex() for part in digest.split_chunk_list(chunk_list)] == vector["chunk_list"]
    assert (digest.digest_of(chunk_list).hex() if chunk_list else "") == vector["chunk_list_digest"]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_digest_of_any_buffer(kind: type) -> None:
    data = counting_bytes(1025)
    assert digest.digest_of(kind(data)) == digest.digest_of(data)
    assert digest.chunk_list_of(kind(data)) == b""


@pytest.mark.parametrize(
    ("size_bytes", "lengths"),
    [
        (0, []),
        (1, [1]),
        (digest.CHUNK_SIZE, [digest.CHUNK_SIZE]),
        (digest.CHUNK_SIZE + 1, [digest.CHUNK_SIZE, 1]),
        (2 * digest.CHUNK_SIZE, [digest.CHUNK_SIZE] * 2),
    ],
)
def test_chunk_lengths(size_bytes: int, lengths: list[int]) -> None:
    count = digest.chunk_count(size_bytes)
    assert [digest.chunk_length(size_bytes, i) for i in range(count)] == lengths


def test_empty_digest_names_no_bytes() -> None:
    assert digest.EMPTY_DIGEST.hex() == VECTORS[0]["digest"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["length"]))
def test_identifiers_of_vector(vector: dict[str, Any]) -> None:
    value = bytes.fromhex(vector["digest"])
    assert object_cid(value) == vector["object_cid"]
    assert model_cid(value) == vector["model_cid"]
    assert dht_key(value).hex() == vector["dht_key"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["length"]))
def test_identifiers_are_read_back(vector: dict[str, Any]) -> None:
    value = bytes.fromhex(vector["digest"])
    assert parse_reference(vector["object_cid"]) == Reference("raw", value)
    assert parse_reference(vector["model_cid"]) == Reference("messagepack", value)
    assert parse_reference(vector["digest"]) == Reference("raw", value)
    assert parse_reference(vector["digest"].upper()) == Reference("raw", value)


def test_other_multibases_are_read() -> None:
    value = digest.EMPTY_DIGEST
    base16 = "f" + (b"\x01\x55\x1e\x20" + value).hex()
    assert parse_reference(base16) == Reference("raw", value)
    base32upper = object_cid(value).upper()
    assert parse_reference(base32upper) == Reference("raw", value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "minilm",
        "acme/minilm@1.3.*",
        "g" * 64,
        "0" * 63,
        VECTORS[0]["object_cid"][:-1],
        VECTORS[0]["object_cid"] + "a",
        "b" + "a" * MAX_CID_TEXT,
        "\ud800" * 59,
        "f0155" + "1e10" + "00" * 16,  # a digest of 16 bytes
        "f0171" + "1e20" + "00" * 32,  # content type dag-cbor
        *FOREIGN_CIDS.values(),
    ],
)
def test_what_is_no_id_of_ours_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not an id"):
        parse_reference(text)
