"""Limits of the control protocol, what its fields are made of, and their checks.

Each ``take_*`` function receives one value as msgpack gave it and returns it with
its type known, or raises ProtocolError naming the field. Types are exact: a bool
is no integer, a subclass of ``str`` no text. Nothing is repaired or cut, and no
message of an error repeats what the peer sent.

All text is printable ASCII, because every language agrees on what that is and no
terminal is harmed by it. ``printable`` makes such text of anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import NamedTuple, TypeVar

from tensorswarm.store.digest import (
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_OBJECT_SIZE,
    chunk_count,
)
from tensorswarm.store.errors import ProtocolError

PROTOCOL_ID = "/tensorswarm/1"
"""What libp2p negotiates for the control stream."""

PROTOCOL_VERSION = 1
"""The version this code says in hello."""

HELLO_TIMEOUT_S = 5.0
"""Time from the opening of the stream to the peer's hello, in seconds: a handshake
and one round trip take well under one second on any link worth having."""

ANSWER_TIMEOUT_S = 10.0
"""Time from a request to the first frame of its answer, and from each frame to the
next, in seconds: 512 KiB in that time is a link of 0.5 Mbit/s."""

MAX_FRAME_BYTES = 1 << 20
"""Longest frame without its length: what one neighbour can make us hold. 250
neighbours (libp2p's inbound limit) then hold 250 MiB at the very worst."""

MAX_BUFFERED_BYTES = 2 * (MAX_FRAME_BYTES + 4)
"""Most bytes a FrameReader keeps: one incomplete frame, and as much again in one read."""

MAX_ARRAY_ITEMS = 8192
"""Longest array anywhere in a frame. A msgpack reader allots an array when it reads
its header, and headers nest: without this limit 5 KiB of them claim gigabytes."""

MAX_MAP_ITEMS = 1024
"""Longest map anywhere in a frame; version 1 sends none, a later one may."""

MAX_INT = (1 << 63) - 1
"""Largest integer: what every language's signed 64 bits can hold."""

MAX_KIND = 0xFFFF
"""Largest kind of message; ours are below 32."""

MAX_CODE = 0xFFFF
"""Largest code of a refusal or bye."""

MAX_WANT_DIGESTS = 8192
"""Digests in one want or unwant: 278 KiB, and all tensors of most models."""

MAX_SUBSCRIPTIONS = 1 << 17
"""Digests one neighbour may be subscribed to (the shell counts them): the largest
models have about 100,000 tensors; held in memory they take some 12 MiB."""

MAX_MODEL_SUBSCRIPTIONS = 64
"""Models one neighbour may be subscribed to as such (the shell counts them): their tables of
objects are shared by all neighbours, and a node fetches a few at a time."""

MAX_HAVE_ENTRIES = 8192
"""Entries in one have: as many as one want can ask for."""

MAX_BITMAP_BYTES = 512 << 10
"""Longest bitmap: 4 Mi chunks, an object of 4 TiB. A larger object can be told of
only once it is whole."""

MAX_CHUNK = (MAX_OBJECT_SIZE - 1) // CHUNK_SIZE
"""Highest number of a chunk: the last one of the largest object."""

MAX_BLOB_ITEMS = 1024
"""Blobs in one request, and pieces in one answering frame."""

MAX_BLOB_DATA_PER_FRAME = 512 << 10
"""Bytes of blob data in one frame, all pieces together: half a frame, so that other
messages get their turn between two of them."""

MAX_PEERS = 64
"""Peers in one answer: three times what a DHT provider list keeps (20)."""

MAX_PEER_ADDRS = 8
"""Addresses of one peer in an answer."""

MAX_PEER_ID_CHARS = 128
"""Longest peer id as text: an Ed25519 one has 52 characters."""

MAX_HELLO_ADDRS = 32
"""Addresses in hello, of either plane: several interfaces times several transports."""

MAX_ADDR_CHARS = 512
"""Longest address: a DNS name (253) and two peer ids of a relayed multiaddr fit."""

MAX_FEATURES = 32
"""Features in hello."""

MAX_FEATURE_CHARS = 64
"""Longest name of a feature."""

MAX_AGENT_CHARS = 128
"""Longest agent text."""

MAX_REASON_CHARS = 256
"""Longest text of a refusal or bye."""

MAX_OPEN_REQUESTS = 64
"""Requests one side may have open; the next is refused with CODE_TOO_MANY."""

CODE_LEAVING = 0
"""Bye: the sender closes in good order."""
CODE_BUSY = 1
"""Refusal, bye: not now; ask again later."""
CODE_NOT_ALLOWED = 2
"""Refusal, bye: the network's rules forbid it."""
CODE_BAD_REQUEST = 3
"""Refusal: understood, but it cannot be answered; bye: the protocol was broken."""
CODE_TOO_MANY = 4
"""Refusal, bye: a limit on requests, subscriptions or neighbours is reached."""
CODE_UNKNOWN_MODEL = 5
"""Refusal of a want_model: the manifest is not here; ask by digests."""

Fields = tuple[object, ...]
"""A msgpack array as it was read."""

_T = TypeVar("_T")
_WORDS = re.compile(r"[\x20-\x7e]*")
_NAME = re.compile(r"[\x21-\x7e]+")
_PEER_ID = re.compile(r"[0-9A-Za-z]+")
_MULTIADDR = re.compile(r"/[\x21-\x7e]+")
_BULK_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z._-]{0,253})):([1-9][0-9]{0,4})")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


class HaveEntry(NamedTuple):
    """What the sender holds of one object.

    Attributes
    ----------
    digest : bytes
        The object's digest.
    size_bytes : int
        Its size in bytes, as far as the sender knows it.
    bitmap : bytes or None
        Bit ``i % 8`` (least significant first) of byte ``i // 8`` tells whether
        chunk ``i`` is proved; None when the sender holds the whole.
    chunk_list : bytes
        Digest of the chunk list that the chunks of `bitmap` were proved against;
        empty when the sender holds the whole, which its own digest proves.
    """

    digest: bytes
    size_bytes: int
    bitmap: bytes | None
    chunk_list: bytes


class BlobItem(NamedTuple):
    """A blob asked for, from `offset` (in bytes) to its end."""

    digest: bytes
    offset: int


class BlobPiece(NamedTuple):
    """Bytes of a blob of `size_bytes` bytes, from `offset` on."""

    digest: bytes
    size_bytes: int
    offset: int
    data: bytes


class PeerEntry(NamedTuple):
    """A peer by its id, and the libp2p addresses it was last known at."""

    peer_id: str
    addrs: tuple[str, ...]


def printable(text: str, max_chars: int) -> str:
    """Return `text` as printable ASCII of at most `max_chars` characters."""
    return _UNPRINTABLE.sub("?", text[:max_chars])


def split_bulk_address(text: str) -> tuple[str, int]:
    """Split a bulk-plane address into host and port.

    Parameters
    ----------
    text : str
        ``"host:port"``, ``"[v6]:port"`` or ``":port"``.

    Returns
    -------
    tuple[str, int]
        The host without brackets, empty for "the address you see me at", and the port.

    Raises
    ------
    ProtocolError
        The text is none of these.
    """
    match = _BULK_ADDRESS.fullmatch(text)
    if match is None or int(match[3]) > 0xFFFF:
        raise ProtocolError("bulk address: not host:port")
    if match[1] is None:
        return match[2], int(match[3])
    try:
        IPv6Address(match[1])
    except ValueError as error:
        raise ProtocolError("bulk address: not an IPv6 address in brackets") from error
    return match[1], int(match[3])


def take_fields(fields: object, count: int, what: str) -> Fields:
    """Return the first `count` fields of an array; later versions may append more."""
    if not isinstance(fields, tuple) or len(fields) < count:
        raise ProtocolError(f"{what}: not an array of {count} fields or more")
    return fields[:count]


def take_array(value: object, what: str, max_items: int) -> Fields:
    """Return an array of at most `max_items` items."""
    if not isinstance(value, tuple):
        raise ProtocolError(f"{what}: not an array")
    if len(value) > max_items:
        raise ProtocolError(f"{what}: {len(value)} items, at most {max_items}")
    return value


def take_items(
    value: object, what: str, max_items: int, take: Callable[[object, str], _T]
) -> tuple[_T, ...]:
    """Return an array of at most `max_items` items, each of them checked by `take`."""
    return tuple([take(item, what) for item in take_array(value, what, max_items)])


def take_int(value: object, what: str, low: int = 0, high: int = MAX_INT) -> int:
    """Return an integer from `low` to `high`, both included."""
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{what}: not an integer from {low} to {high}")
    return value


def take_request_id(value: object, what: str) -> int:
    """Return the id of a request: 1 or more, as 0 means "no request"."""
    return take_int(value, f"{what}.request_id", low=1)


def take_size(value: object, what: str) -> int:
    """Return the size of an object, or an offset in it, in bytes."""
    return take_int(value, what, 0, MAX_OBJECT_SIZE)


def take_bool(value: object, what: str) -> bool:
    """Return a boolean."""
    if type(value) is not bool:
        raise ProtocolError(f"{what}: not a boolean")
    return value


def take_bytes(value: object, what: str, max_bytes: int) -> bytes:
    """Return at most `max_bytes` bytes."""
    if type(value) is not bytes or len(value) > max_bytes:
        raise ProtocolError(f"{what}: not binary of at most {max_bytes} bytes")
    return value


def take_digest(value: object, what: str) -> bytes:
    """Return a digest."""
    if type(value) is not bytes or len(value) != DIGEST_SIZE:
        raise ProtocolError(f"{what}: not a digest of {DIGEST_SIZE} bytes")
    return value


def take_digest_or_empty(value: object, what: str) -> bytes:
    """Return a digest, or no bytes at all."""
    return b"" if type(value) is bytes and not value else take_digest(value, what)


def take_bitmap(value: object, what: str, size_bytes: int) -> bytes | None:
    """Return the bitmap of an object's proved chunks; None stands for all of them."""
    if value is None:
        return None
    chunks = chunk_count(size_bytes)
    bitmap = take_bytes(value, what, MAX_BITMAP_BYTES)
    if len(bitmap) != -(-chunks // 8):
        raise ProtocolError(f"{what}: {len(bitmap)} bytes for {chunks} chunks")
    if chunks % 8 and bitmap[-1] >> (chunks % 8):
        raise ProtocolError(f"{what}: bits set after the last chunk")
    return bitmap


def take_chunk_list_digest(value: object, what: str, size_bytes: int) -> bytes:
    """Return a chunk list's digest: none for an object of one chunk or unknown size."""
    digest = take_digest_or_empty(value, what)
    if bool(digest) != (size_bytes > CHUNK_SIZE):
        raise ProtocolError(f"{what}: present only for objects of more than one chunk")
    return digest


def take_words(value: object, what: str, max_chars: int) -> str:
    """Return text for people: printable ASCII with spaces, perhaps empty."""
    return _take_text(value, what, max_chars, _WORDS)


def take_feature(value: object, what: str) -> str:
    """Return the name of a feature."""
    return _take_text(value, what, MAX_FEATURE_CHARS, _NAME)


def take_peer_id(value: object, what: str) -> str:
    """Return a peer id's text; whether it is one is for libp2p to say."""
    return _take_text(value, what, MAX_PEER_ID_CHARS, _PEER_ID)


def take_multiaddr(value: object, what: str) -> str:
    """Return the text of a multiaddr; its parts are for libp2p to read."""
    return _take_text(value, what, MAX_ADDR_CHARS, _MULTIADDR)


def take_bulk_address(value: object, what: str) -> str:
    """Return a bulk-plane address, which `split_bulk_address` then takes."""
    text = _take_text(value, what, MAX_ADDR_CHARS, _NAME)
    split_bulk_address(text)
    return text


def take_have_entry(value: object, what: str) -> HaveEntry:
    """Return an entry of have: whole, or a part together with the list that proves it."""
    digest, raw_size, raw_bitmap, raw_list = take_fields(value, 4, what)
    if (  # the usual cases, 100,000 times over: one look instead of a call for each field
        type(digest) is bytes
        and len(digest) == DIGEST_SIZE
        and type(raw_size) is int
        and 0 <= raw_size <= MAX_OBJECT_SIZE
        and type(raw_list) is bytes
    ):
        if raw_bitmap is None and not raw_list:
            return HaveEntry(digest, raw_size, None, b"")
        if raw_size > CHUNK_SIZE and type(raw_bitmap) is bytes and len(raw_list) == DIGEST_SIZE:
            bitmap = take_bitmap(raw_bitmap, what, raw_size)
            return HaveEntry(digest, raw_size, bitmap, raw_list)
    size_bytes = take_size(raw_size, what)
    bitmap = take_bitmap(raw_bitmap, what, size_bytes)
    chunk_list = take_digest_or_empty(raw_list, what)
    if bitmap is not None and size_bytes <= CHUNK_SIZE:
        raise ProtocolError(f"{what}: a part of an object of one chunk")
    if bool(chunk_list) != (bitmap is not None):
        raise ProtocolError(f"{what}: a chunk list goes with a bitmap, and only with one")
    return HaveEntry(take_digest(digest, what), size_bytes, bitmap, chunk_list)


def take_blob_item(value: object, what: str) -> BlobItem:
    """Return an item of get_blobs."""
    digest, offset = take_fields(value, 2, what)
    return BlobItem(take_digest(digest, what), take_size(offset, what))


def take_blob_piece(value: object, what: str) -> BlobPiece:
    """Return a piece of a blob, which lies inside it and moves it on."""
    digest, size_bytes, offset, data = take_fields(value, 4, what)
    piece = BlobPiece(
        take_digest(digest, what),
        take_size(size_bytes, what),
        take_size(offset, what),
        take_bytes(data, what, MAX_BLOB_DATA_PER_FRAME),
    )
    if piece.offset + len(piece.data) > piece.size_bytes:
        raise ProtocolError(f"{what}: reaches beyond the end of the blob")
    if not piece.data and piece.offset < piece.size_bytes:
        raise ProtocolError(f"{what}: no data, though the blob is not at its end")
    return piece


def take_peer_entry(value: object, what: str) -> PeerEntry:
    """Return an entry of peers."""
    if isinstance(value, tuple) and len(value) > 1:
        peer_id, addrs = value[:2]
        if (  # the usual case, 64 to an answer: one look instead of a call for each field
            type(peer_id) is str
            and len(peer_id) <= MAX_PEER_ID_CHARS
            and peer_id.isascii()
            and peer_id.isalnum()
            and type(addrs) is tuple
            and len(addrs) <= MAX_PEER_ADDRS
        ):
            for addr in addrs:
                if not _is_multiaddr(addr):
                    break
            else:
                return value if type(value) is PeerEntry else PeerEntry(peer_id, addrs)
    peer_id, addrs = take_fields(value, 2, what)
    return PeerEntry(
        take_peer_id(peer_id, what),
        take_items(addrs, what, MAX_PEER_ADDRS, take_multiaddr),
    )


def _is_multiaddr(value: object) -> bool:
    """Tell what `take_multiaddr` tells, in half the time."""
    return (
        type(value) is str
        and 1 < len(value) <= MAX_ADDR_CHARS
        and value[0] == "/"
        and value.isascii()
        and value.isprintable()
        and " " not in value
    )


def _take_text(value: object, what: str, max_chars: int, pattern: re.Pattern[str]) -> str:
    if type(value) is not str or len(value) > max_chars or not pattern.fullmatch(value):
        raise ProtocolError(f"{what}: not text of at most {max_chars} characters of its kind")
    return value
