"""Multiformats names of digests: what people and other tools see.

A tensor or blob is ``CIDv1(raw, blake3)``, a model ``CIDv1(messagepack, blake3)``,
both in base32; the key of either on the DHT is the bare multihash. So ``b3sum``
on the raw bytes, iroh and IPFS tools agree with us on what a tensor is called.
"""

from __future__ import annotations

from typing import NamedTuple

from multiformats import CID, multihash

from .digest import DIGEST_SIZE
from .errors import BadInput

MAX_CID_TEXT = 128
"""Longest text taken for a CID: ours have 59 or 61 characters."""

OBJECT_CODEC = "raw"
MODEL_CODEC = "messagepack"


class Reference(NamedTuple):
    """A parsed identifier.

    Attributes
    ----------
    codec : str
        ``"raw"`` for a tensor or blob, ``"messagepack"`` for a model.
    digest : bytes
        The 32-byte BLAKE3 digest.
    """

    codec: str
    digest: bytes


def object_cid(digest: bytes) -> str:
    """Return the CID of a tensor or blob."""
    return str(CID("base32", 1, OBJECT_CODEC, ("blake3", digest)))


def model_cid(digest: bytes) -> str:
    """Return the model id whose manifest has this digest."""
    return str(CID("base32", 1, MODEL_CODEC, ("blake3", digest)))


def dht_key(digest: bytes) -> bytes:
    """Return the multihash under which a digest is announced (34 bytes)."""
    return bytes(multihash.wrap(digest, "blake3"))


def parse_reference(text: str) -> Reference:
    """Read a CID or a bare hexadecimal digest.

    Parameters
    ----------
    text : str
        A CIDv1 in any multibase, or 64 hexadecimal digits (a tensor digest).

    Raises
    ------
    BadInput
        The text is neither, or names another hash, size or content type.
    """
    if len(text) > MAX_CID_TEXT:
        raise BadInput(f"not an id: {len(text)} characters, at most {MAX_CID_TEXT}")
    if len(text) == 2 * DIGEST_SIZE:
        try:
            return Reference(OBJECT_CODEC, bytes.fromhex(text))
        except ValueError:
            pass  # not hexadecimal: it may still be a CID of this length
    try:
        cid = CID.decode(text)
    except Exception as error:  # the library raises many kinds; all mean "not a CID"
        raise BadInput(f"not an id: {text!r} is neither a CID nor a 64-digit digest") from error
    if cid.version != 1 or cid.hashfun.name != "blake3" or len(cid.raw_digest) != DIGEST_SIZE:
        raise BadInput(f"not an id of ours: {text!r} is not a CIDv1 with a BLAKE3-256 digest")
    if cid.codec.name not in (OBJECT_CODEC, MODEL_CODEC):
        raise BadInput(f"not an id of ours: {text!r} has content type {cid.codec.name!r}")
    return Reference(cid.codec.name, bytes(cid.raw_digest))
