"""What a download knows of its sources: where an origin has what, who failed and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .holdings import Holdings
from .origins.origin import Place
from .routes import Via
from .swarm.planner import SourceKind
from .swarm.source import Failure, SourceWorker

PASSING = frozenset({Failure.STALLED, Failure.CLOSED, Failure.UNREACHABLE})


@dataclass
class OriginSpec:
    """An origin, ready to be asked.

    Attributes
    ----------
    url : str
        As the user gave it.
    places : mapping of bytes to FileRange or JoinedRanges
        Where each wanted object lies, by its digest.
    urls : mapping of str to str
        The URL of each file.
    """

    url: str
    places: Mapping[bytes, Place]
    urls: Mapping[str, str]


@dataclass
class KnownSource:
    """What the shell remembers of a source."""

    kind: SourceKind
    worker: SourceWorker | None = None
    via: Via | None = None
    failures: int = 0
    failure: Failure | None = None
    reason: str = ""
    dropped: bool = False
    retry_at: float | None = None
    holds: Holdings = field(default_factory=lambda: Holdings(0))

    @property
    def banned(self) -> bool:
        """Whether it is never asked again in this download."""
        return self.dropped and self.failure not in PASSING
