"""Two messages of the control protocol: an upload offered, and an offer passed on.

They are part of `wire`, which reads and writes them with all others; a node of a version
without them skips them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import wire_limits as limits
from .wire_limits import Fields


@dataclass(frozen=True, slots=True)
class Offer:
    """The sender has an upload to spare for one request; it would give this chunk.

    To be answered by a request on the bulk plane, for this chunk or another, or by a pass.
    """

    kind: ClassVar[int] = 13
    digest: bytes
    chunk: int

    @classmethod
    def _parse(cls, raw: Fields) -> Offer:
        digest, chunk = limits.take_fields(raw, 2, "offer")
        return cls(
            limits.take_digest(digest, "offer.digest"),
            limits.take_int(chunk, "offer.chunk", 0, limits.MAX_CHUNK),
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """The sender does not take up an offer of these bytes."""

    kind: ClassVar[int] = 14
    digest: bytes

    @classmethod
    def _parse(cls, raw: Fields) -> Pass:
        (digest,) = limits.take_fields(raw, 1, "pass")
        return cls(limits.take_digest(digest, "pass.digest"))
