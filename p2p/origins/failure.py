"""What goes wrong with an origin, in the planner's words and in people's.

httpx's errors, and answers that mean a failure, become an `OriginFailure` here and nowhere
else. It does no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import httpx

from tensorswarm.store.errors import RemoteError

from ..swarm.source import Failure
from .origin import FileRange, parse_retry_after

MAX_DETAIL = 200
"""Most characters kept of an error's text, which may quote what the server sent."""

DEFAULT_PAUSE_S = 1.0
"""Seconds to leave a server alone that is overloaded and does not say for how long."""

HTTPX_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.CookieConflict)
"""What httpx raises for a server's fault; everything else is a fault of ours."""

_BUSY = (408, 429, 500, 502, 503, 504)


class OriginFailure(RemoteError):
    """An exchange with an origin that came to nothing.

    Attributes
    ----------
    failure : Failure
        The kind, for the planner.
    detail : str
        What happened, for people.
    file_only : bool
        It says something about one file only; other files may be fine.
    pause_s : float
        Seconds for which the server asks to be left alone.
    """

    def __init__(
        self, failure: Failure, detail: str, *, file_only: bool = False, pause_s: float = 0.0
    ) -> None:
        super().__init__(f"{failure.value}: {detail}")
        self.failure = failure
        self.detail = detail
        self.file_only = file_only
        self.pause_s = pause_s


def translate(error: Exception) -> OriginFailure:
    """Return the failure that an httpx error means."""
    text = (str(error) or type(error).__name__)[:MAX_DETAIL]
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError() | httpx.ProxyError():
            return OriginFailure(Failure.UNREACHABLE, text)
        case httpx.TimeoutException():
            return OriginFailure(Failure.STALLED, "no bytes for too long")
        case httpx.NetworkError():
            return OriginFailure(Failure.CLOSED, text)
        case httpx.RemoteProtocolError() if "closed" in text or "disconnected" in text:
            return OriginFailure(Failure.CLOSED, text)
        case httpx.RemoteProtocolError() if "buffer too long" in text:
            return OriginFailure(Failure.PROTOCOL, "sent headers without end")
        case httpx.LocalProtocolError():
            return OriginFailure(Failure.LOCAL, f"our request is malformed: {text}")
        case _:
            return OriginFailure(Failure.PROTOCOL, text)


def failure_of_status(status: int, headers: Mapping[str, str], place: FileRange) -> OriginFailure:
    """Return what an answer of another status than the one wanted means."""
    if status in (404, 410):
        return OriginFailure(Failure.LACKS, f"{place.path}: not there ({status})", file_only=True)
    if status in (401, 403, 407, 451):
        detail = f"{place.path}: access refused ({status})"
        return OriginFailure(Failure.REFUSED_ACCESS, detail, file_only=True)
    if status == 416:
        return other_size(place)
    if status in _BUSY:
        pause_s = parse_retry_after(headers.get("Retry-After", ""), datetime.now(UTC))
        if pause_s is None:
            return OriginFailure(Failure.STALLED, f"busy ({status})", pause_s=DEFAULT_PAUSE_S)
        detail = f"busy ({status}), asks to wait {pause_s:.0f} s"
        return OriginFailure(Failure.STALLED, detail, pause_s=pause_s)
    return OriginFailure(Failure.PROTOCOL, f"{place.path}: answered {status}")


def other_size(place: FileRange) -> OriginFailure:
    """Return the failure of a file that is not the one the manifest names."""
    detail = f"{place.path}: the file there has another size"
    return OriginFailure(Failure.LACKS, detail, file_only=True)
