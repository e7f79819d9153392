"""Where requests for bytes wait for their turn: what the bulk server wants of a gate."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol


class Gate(Protocol):
    """Lets few requests be answered at a time; called from the connections' threads."""

    def concerns(self, peer_id: str, digest: bytes) -> bool:
        """Tell, without waiting, whether a peer's requests for an object wait here at all."""
        ...

    def ask(self, peer_id: str, digest: bytes, offset: int) -> Hashable | None:
        """Wait until a request may be answered, not for long; returns what to `end` with."""
        ...

    def end(self, ticket: Any) -> None:
        """Note that a request has been answered."""
        ...

    def gave(self, peer_id: str, digests: Sequence[bytes]) -> None:
        """Note small objects given together, which need not wait."""
        ...
