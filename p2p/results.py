"""What a fetch tells of itself: plain data, and its JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorswarm.store.cid import model_cid, object_cid
from tensorswarm.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What one source gave.

    Attributes
    ----------
    kind : str
        ``"peer"`` or ``"origin"``.
    id : str
        Peer id, or the origin's URL without any password.
    bytes : int
        Verified bytes that it gave first.
    dropped : bool
        Whether it was given up because of what it did.
    reason : str
        Why, or empty.
    via : str or None
        The way a peer's bytes took last: ``"bulk"``, ``"stream"`` or ``"relay"``; None
        for an origin.
    """

    kind: str
    id: str
    bytes: int
    dropped: bool
    reason: str = ""
    via: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the report as the command line prints it."""
        return {
            "kind": self.kind,
            "via": self.via,
            "id": self.id,
            "bytes": self.bytes,
            "dropped": self.dropped,
            "reason": self.reason or None,
        }


@dataclass(slots=True)
class FetchResult:
    """What a fetch did. Only verified bytes are counted, each once.

    Attributes
    ----------
    digest : bytes
        Of the manifest, or of the tensor that was asked for.
    manifest : Manifest or None
        The model; None for a bare tensor.
    bytes_total : int
        Bytes wanted: objects, manifest and chunk lists.
    bytes_local, bytes_peers, bytes_origin : int
        Where they were or came from; they add up to `bytes_total`.
    bytes_wasted : int
        Received in vain: refused, or received twice.
    seconds : float
        From the start to the last verified byte.
    sources : list of SourceReport
        Everybody who gave something or was dropped.
    path : Path or None
        The folder the files were exported to.
    """

    digest: bytes
    manifest: Manifest | None = None
    bytes_total: int = 0
    bytes_local: int = 0
    bytes_peers: int = 0
    bytes_origin: int = 0
    bytes_wasted: int = 0
    seconds: float = 0.0
    sources: list[SourceReport] = field(default_factory=list)
    path: Path | None = None

    @property
    def id(self) -> str:
        """The model id, or the tensor's CID."""
        return model_cid(self.digest) if self.manifest is not None else object_cid(self.digest)

    def as_json(self) -> dict[str, Any]:
        """Return the result as the command line prints it."""
        return {
            "model": self.id,
            "bytes_total": self.bytes_total,
            "bytes_local": self.bytes_local,
            "bytes_peers": self.bytes_peers,
            "bytes_origin": self.bytes_origin,
            "bytes_wasted": self.bytes_wasted,
            "seconds": round(self.seconds, 3),
            "sources": [source.as_json() for source in self.sources],
            "path": str(self.path) if self.path is not None else None,
        }
