"""What a download knows of its sources: where an origin has what, who failed and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tensorswarm.store.errors import (
    HashMismatch,
    NoSource,
    NotFound,
    Refused,
    TensorswarmError,
)

from .control.holdings import Holdings
from .origins.origin import Place, display_url
from .results import SourceReport
from .routes import Via
from .swarm.planner import SourceKind
from .swarm.source import Failure, SourceWorker
from .swarm.types import SourceStatistics

PASSING = frozenset({Failure.STALLED, Failure.CLOSED, Failure.UNREACHABLE})


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


def reports_of(
    counted: Iterable[SourceStatistics], sources: Mapping[str, KnownSource]
) -> list[SourceReport]:
    """Return what each source gave, and those that were dropped.

    An origin that had nothing of what was asked of it counts as dropped: whoever named it
    wants to know that its files are not there, or are others.
    """
    reports = []
    for each in counted:
        known = sources.get(each.source)
        dropped = known is not None and known.dropped
        if known is not None and known.kind is SourceKind.ORIGIN and not each.proved_bytes:
            dropped |= bool(known.reason)
        if each.proved_bytes or dropped:
            reports.append(
                SourceReport(
                    each.kind.value,
                    display_url(each.source),
                    each.proved_bytes,
                    dropped,
                    known.reason if known is not None else "",
                    known.via.value if known is not None and known.via else None,
                )
            )
    return reports


def given_up(sources: Mapping[str, KnownSource]) -> set[str]:
    """Return who failed for good or for now; who stalled may only be busy."""
    return {
        name
        for name, source in sources.items()
        if source.dropped and source.failure is not Failure.STALLED
    }


def why_stuck(
    sources: Mapping[str, KnownSource], missing_bytes: int, waited_s: float, *, has_looked: bool
) -> TensorswarmError:
    """Return the error with which a download ends that gets nothing any more.

    `has_looked` says that neighbours were asked, and that the search for others is over.
    """
    tail = f"; {missing_bytes} bytes are missing"
    liars = [name for name, each in sources.items() if each.failure is Failure.BAD_BYTES]
    if liars:
        names = ", ".join(display_url(name) for name in liars)
        return HashMismatch(
            f"{names} sent bytes that do not match their hash and no good source is left{tail}"
        )
    reasons = "; ".join(
        f"{display_url(name)}: {each.reason}" for name, each in sources.items() if each.reason
    )
    if any(each.failure is Failure.REFUSED_ACCESS for each in sources.values()):
        return Refused(f"who has it refused us access: {reasons}{tail}")
    if has_looked:
        return NotFound(f"no source that can be reached has all of it{tail}. {reasons}".rstrip())
    return NoSource(f"no source gave anything for {waited_s:.0f} s{tail}. {reasons}".rstrip())
