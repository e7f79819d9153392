"""Four messages of the control protocol whose answers are hints: chunk lists, and peers.

They are part of `wire`, which reads and writes them with all others. Nobody vouches for what
they say; it serves to find what is then proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tensorswarm.store.digest import MAX_OBJECT_SIZE

from . import wire_limits as limits
from .wire_limits import Fields, PeerEntry


@dataclass(frozen=True, slots=True)
class GetChunkList:
    """Asks for the size and the chunk list's digest of an object."""

    kind: ClassVar[int] = 9
    request_id: int
    digest: bytes

    @classmethod
    def _parse(cls, raw: Fields) -> GetChunkList:
        request_id, digest = limits.take_fields(raw, 2, "get_chunk_list")
        return cls(
            limits.take_request_id(request_id, "get_chunk_list"),
            limits.take_digest(digest, "get_chunk_list.digest"),
        )


@dataclass(frozen=True, slots=True)
class ChunkListIs:
    """Answers get_chunk_list: a hint, which only the whole object's digest proves.

    `size_bytes` is -1 when the sender does not know the object; `chunk_list` is the
    chunk list's digest, or empty for an object of one chunk at most.
    """

    kind: ClassVar[int] = 10
    request_id: int
    digest: bytes
    size_bytes: int
    chunk_list: bytes

    @classmethod
    def _parse(cls, raw: Fields) -> ChunkListIs:
        request_id, digest, raw_size, chunk_list = limits.take_fields(raw, 4, "chunk_list_is")
        size_bytes = limits.take_int(raw_size, "chunk_list_is.size_bytes", -1, MAX_OBJECT_SIZE)
        return cls(
            limits.take_request_id(request_id, "chunk_list_is"),
            limits.take_digest(digest, "chunk_list_is.digest"),
            size_bytes,
            limits.take_chunk_list_digest(chunk_list, "chunk_list_is.chunk_list", size_bytes),
        )


@dataclass(frozen=True, slots=True)
class GetPeers:
    """Asks for peers that hold something of an object; of anyone if `digest` is empty."""

    kind: ClassVar[int] = 11
    request_id: int
    digest: bytes

    @classmethod
    def _parse(cls, raw: Fields) -> GetPeers:
        request_id, digest = limits.take_fields(raw, 2, "get_peers")
        return cls(
            limits.take_request_id(request_id, "get_peers"),
            limits.take_digest_or_empty(digest, "get_peers.digest"),
        )


@dataclass(frozen=True, slots=True)
class Peers:
    """Answers get_peers: a hint, as nobody vouches for the addresses."""

    kind: ClassVar[int] = 12
    request_id: int
    entries: tuple[PeerEntry, ...]

    @classmethod
    def _parse(cls, raw: Fields) -> Peers:
        request_id, entries = limits.take_fields(raw, 2, "peers")
        return cls(
            limits.take_request_id(request_id, "peers"),
            limits.take_items(entries, "peers.entry", limits.MAX_PEERS, limits.take_peer_entry),
        )
