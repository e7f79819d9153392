"""What a download knows of one source: where an origin has what, whether it failed and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .control.holdings import Holdings
from .origins.origin import Place
from .routes import Via
from .swarm.planner import SourceKind
from .swarm.source import Failure, SourceWorker

PASSING = frozenset({Failure.STALLED, Failure.CLOSED, Failure.UNREACHABLE})
"""Failures after which a source is tried again."""

RETRY_PAUSES_S = (1.0, 3.0, 10.0, 20.0, 40.0, 60.0)
"""Pauses before a source that failed for a passing reason is tried again; then the last one
repeats."""

HOPEFUL_FAILURES = 3
"""After so many failures in a row a download does not wait for a source that is all it has
left, though the source may still come back while others give."""


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

    @property
    def is_hoped_for(self) -> bool:
        """Whether it is to be tried again, and likely to give something then."""
        return self.retry_at is not None and self.failures <= HOPEFUL_FAILURES

    def give_up(self, now: float, failure: Failure, detail: str) -> None:
        """Note that it failed as a whole, and when to try it again if ever."""
        self.dropped = True
        self.failure = failure
        self.reason = detail or failure.value
        if not self.banned:
            pause_s = RETRY_PAUSES_S[min(self.failures, len(RETRY_PAUSES_S) - 1)]
            self.retry_at = now + pause_s
        self.failures += 1

    def came_back(self) -> None:
        """Note that it gives again, though it was given up perhaps."""
        self.dropped = False
        self.failures = 0
