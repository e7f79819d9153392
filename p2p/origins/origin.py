"""Where an object's bytes lie at an HTTP origin, and how to ask for them.

An *origin* is a web server that holds a model's files as anyone would put them
there. It knows nothing of tensors: an object is a range of bytes in one of the
files that the manifest names, asked for with a plain ``Range`` header
(RFC 9110, section 14). An object that was cut, as TensorFlow.js cuts tensors where a
shard ends, is several such ranges.

This module turns objects into file ranges, file ranges into as few requests as
possible, origin URLs into file URLs, and reads the two answer headers that need
more than a comparison. Text that came from outside is checked here: URLs that a
person or a release names raise `BadInput`, answers that make no sense are None.

It does no I/O; `origins.http` talks to one server, `origins.source` is the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from tensorswarm.store.digest import CHUNK_SIZE, chunk_count, chunk_length
from tensorswarm.store.errors import BadInput

from ..swarm.source import Span

if TYPE_CHECKING:
    from tensorswarm.store.manifest import Manifest

MAX_ORIGIN_URL = 4096
"""Longest origin URL in characters: signed object-store links have up to 2,000."""

MAX_RANGE_BYTES = 64 << 20
"""Most bytes asked in one request: a round trip weighs nothing beside them, and the
other connections still find work when a large tensor is shared among them."""

MAX_RETRY_AFTER_TEXT = 64
"""Longest ``Retry-After`` value read: a date in the header's form has 29 characters."""

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_SECONDS = re.compile(r"[0-9]{1,9}")
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\]")


class FileRange(NamedTuple):
    """Where an object lies in a file.

    Attributes
    ----------
    path : str
        The file's path in the model, relative, with forward slashes.
    file_size : int
        Size of the whole file in bytes.
    offset : int
        The object's first byte in the file.
    """

    path: str
    file_size: int
    offset: int


class JoinedRanges(NamedTuple):
    """Where an object lies that was cut: runs of files, each with its size, in order."""

    runs: tuple[tuple[FileRange, int], ...]


Place = FileRange | JoinedRanges


class Piece(NamedTuple):
    """One chunk, or a part of one, as `length` bytes from `offset` of a file.

    Of a chunk that lies in several files each part is a piece: `at` of its bytes come
    before it, and `rest` after it.
    """

    place: FileRange
    object_index: int
    chunk: int
    offset: int
    length: int
    at: int = 0
    rest: int = 0

    @property
    def stop(self) -> int:
        """First byte in the file after the piece."""
        return self.offset + self.length

    @property
    def is_part(self) -> bool:
        """Whether there is more of the chunk elsewhere."""
        return bool(self.at or self.rest)


class ContentRange(NamedTuple):
    """A ``Content-Range`` header: bytes `start` to `stop` (exclusive) of `total`."""

    start: int
    stop: int
    total: int


def locate_objects(manifest: Manifest) -> dict[int, Place]:
    """Find the first place of every object in the model's files.

    Parameters
    ----------
    manifest : Manifest
        A checked manifest.

    Returns
    -------
    dict[int, FileRange or JoinedRanges]
        By index in ``manifest.objects``. An object that is in no file, or only in a
        form that it would have to be decoded from, is absent.
    """
    places: dict[int, Place] = {}
    slices: dict[int, dict[int, tuple[FileRange, int]]] = {}
    count = len(manifest.objects)
    for entry in manifest.files:
        offset = 0
        for index in entry.parts:
            place = FileRange(entry.path, entry.size_bytes, offset)
            if index < count:
                places.setdefault(index, place)
                offset += manifest.objects[index].size_bytes
                continue
            recipe = manifest.recipes[index - count]
            if recipe.kind == "slice":
                found = slices.setdefault(recipe.inputs[0], {})
                found.setdefault(recipe.parameters[0], (place, recipe.size_bytes))
            offset += recipe.size_bytes
    for index, found in slices.items():
        if index not in places:
            joined = _joined(found, manifest.objects[index].size_bytes)
            if joined is not None:
                places[index] = joined
    return places


def _joined(slices: Mapping[int, tuple[FileRange, int]], size_bytes: int) -> JoinedRanges | None:
    """Return an object put together from slices of it, by their starts, if they suffice."""
    runs: list[tuple[FileRange, int]] = []
    end = 0
    while end < size_bytes:
        if end not in slices:
            return None
        runs.append(slices[end])
        end += slices[end][1]
    return JoinedRanges(tuple(runs)) if end == size_bytes else None


def runs_of(place: Place) -> tuple[FileRange, ...]:
    """Return the runs of files that an object is."""
    return (place,) if isinstance(place, FileRange) else tuple(run for run, _ in place.runs)


def pieces_of_span(span: Span, place: Place, size_bytes: int) -> Iterator[Piece]:
    """Yield the chunks of a span of an object of `size_bytes` bytes, in order.

    Raises
    ------
    BadInput
        The span has no chunks, or some that the object has not.
    """
    stop = span.first_chunk + span.count
    if span.count < 1 or span.first_chunk < 0 or stop > chunk_count(size_bytes):
        raise BadInput(f"{span} is not in an object of {size_bytes} bytes")
    runs = ((place, size_bytes),) if isinstance(place, FileRange) else place.runs
    first = span.first_chunk * CHUNK_SIZE
    end = min(stop * CHUNK_SIZE, size_bytes)
    run_start = 0
    for run, run_bytes in runs:
        position, run_stop = max(first, run_start), min(end, run_start + run_bytes)
        while position < run_stop:
            chunk, at = divmod(position, CHUNK_SIZE)
            whole = chunk_length(size_bytes, chunk)
            length = min(whole - at, run_stop - position)
            offset = run.offset + position - run_start
            yield Piece(run, span.object_index, chunk, offset, length, at, whole - at - length)
            position += length
        run_start += run_bytes


def pieces_of_file(
    path: str, places: Mapping[int, Place], sizes: Mapping[int, int]
) -> Iterator[Piece]:
    """Yield every chunk that lies in a file as a whole, in the file's order.

    Parameters
    ----------
    path : str
        The file.
    places : Mapping[int, FileRange or JoinedRanges]
        Where each object lies, by its index.
    sizes : Mapping[int, int]
        The size of each object in bytes, by its index.
    """
    inside = sorted(
        (run.offset, index)
        for index, place in places.items()
        if sizes[index] > 0
        for run in runs_of(place)
        if run.path == path
    )
    for offset, index in inside:
        span = Span(index, 0, chunk_count(sizes[index]))
        for piece in pieces_of_span(span, places[index], sizes[index]):
            if piece.place.path == path and piece.place.offset == offset and not piece.is_part:
                yield piece


def continues_run(run: Sequence[Piece], piece: Piece, max_bytes: int = MAX_RANGE_BYTES) -> bool:
    """Tell whether one range request can fetch `piece` together with `run`.

    It can if it follows the run's last piece in the same file without a gap, and
    all have at most `max_bytes` bytes together. Anything continues an empty run.
    """
    if not run:
        return True
    return (
        piece.place.path == run[-1].place.path
        and piece.offset == run[-1].stop
        and piece.stop - run[0].offset <= max_bytes
    )


def check_origin_url(url: str) -> None:
    """Check that a URL can be an origin.

    Raises
    ------
    BadInput
        It is too long, holds spaces, control characters or backslashes, is not
        http or https, or names no host or an impossible port.
    """
    _split_origin_url(url)


def file_url(origin: str, path: str, all_paths: Sequence[str]) -> str:
    """Return the URL of one of the model's files at an origin.

    An origin that ends in ``/`` is a folder. One that ends in the path of one of
    the model's files, or in the name of one, points at that file; the model's
    folder is what stands before it. Any other is a folder too. A query string and
    user information are kept, a fragment is dropped.

    Parameters
    ----------
    origin : str
        The origin's URL.
    path : str
        The file's path in the model.
    all_paths : Sequence[str]
        The paths of all files of the model.

    Raises
    ------
    BadInput
        The URL cannot be an origin, or the path is not a plain relative one.
    """
    parts = _split_origin_url(origin)
    components = path.split("/")
    if any(component in ("", ".", "..") for component in components):
        raise BadInput(f"not a plain relative path: {path!r}")
    target = _folder(parts.path, all_paths) + "/".join(quote(name, safe="") for name in components)
    return urlunsplit((parts.scheme, parts.netloc, target, parts.query, ""))


def display_url(url: str) -> str:
    """Return a URL without user information and query, which often hold secrets."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def parse_content_range(text: str) -> ContentRange | None:
    """Read a ``Content-Range`` header (RFC 9110, section 14.4).

    Returns
    -------
    ContentRange or None
        None for anything but a range of bytes of a known total.
    """
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, total = (int(digits) for digits in match.groups())
    if not first <= last < total:
        return None
    return ContentRange(first, last + 1, total)


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Read a ``Retry-After`` header (RFC 9110, section 10.2.3).

    Parameters
    ----------
    text : str
        Seconds, or a date.
    now : datetime
        The time of day, with a time zone, that a date is compared with.

    Returns
    -------
    float or None
        Seconds to wait, at least 0; None when the text is neither form.
    """
    if _SECONDS.fullmatch(text):
        return float(text)
    if len(text) > MAX_RETRY_AFTER_TEXT:
        return None
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None  # "-0000": the sender does not say in which zone it counts
    return max(0.0, (moment - now).total_seconds())


def _split_origin_url(url: str) -> SplitResult:
    if len(url) > MAX_ORIGIN_URL:
        raise BadInput(f"not an origin: {len(url)} characters, at most {MAX_ORIGIN_URL}")
    if _FORBIDDEN.search(url):
        raise BadInput("not an origin: the URL holds spaces, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # its text may quote a password
        raise BadInput("not an origin: the URL has an impossible host or port") from None
    if parts.scheme not in ("http", "https"):
        raise BadInput(f"not an origin: {display_url(url)!r} is neither http nor https")
    if not host or port == 0:
        raise BadInput(f"not an origin: {display_url(url)!r} names no host, or port 0")
    return parts


def _folder(url_path: str, all_paths: Sequence[str]) -> str:
    """Return the path of the model's folder at the server, with a slash at its end."""
    if url_path.endswith("/") or not url_path:
        return url_path or "/"
    components = url_path.split("/")
    plain = [unquote(component) for component in components]
    # The longest match wins: of "a/b.bin" and "b.bin" the first says more.
    for model_path in sorted(all_paths, key=len, reverse=True):
        names = model_path.split("/")
        if plain[-len(names) :] == names:
            return "/".join(components[: -len(names)]) + "/"
    if any(plain[-1] == model_path.rsplit("/", 1)[-1] for model_path in all_paths):
        return "/".join(components[:-1]) + "/"
    return url_path + "/"
