"""Names that come from outside: file paths and tensor names, checked before use.

A path in a manifest becomes a file on somebody's disk, so it must mean the same
file, inside the folder it is exported to, on every system: relative, POSIX
separators, no part that a system treats specially. Two paths of one model must
not fall together on a file system that ignores case or Unicode normalisation,
and no path may be both a file and a folder.

Tensor names never touch the disk. They are only bounded and kept valid Unicode.

Nothing here looks at a disk, and no name is repaired: it is good or it is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from .errors import BadInput

MAX_PATH_BYTES = 1024
"""Longest path, in UTF-8 bytes: macOS stops at 1,024, Linux at 4,096."""

MAX_PART_BYTES = 255
"""Longest part of a path, in UTF-8 bytes: the limit of ext4, XFS and APFS."""

MAX_TENSOR_NAME_BYTES = 1024
"""Longest tensor name, in UTF-8 bytes: names in published models stay under 200."""

_SHOWN_CHARACTERS = 80
"""Characters of a foreign name that an error message repeats."""

_FORBIDDEN_CHARACTERS = {
    "\\": "a backslash",
    ":": "a colon",  # a drive letter, or an alternate data stream on NTFS
    "\u2028": "a line separator",
    "\u2029": "a paragraph separator",
}

_DEVICE_NAMES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789\u00b9\u00b2\u00b3"]
)
"""Names that Windows takes for devices in every folder, whatever their extension.

Source: Microsoft, "Naming Files, Paths, and Namespaces"."""


def quoted(text: str) -> str:
    """Return `text` for an error message: printable, on one line, shortened."""
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    return repr(text)


def check_path(path: str) -> str:
    """Return `path` if it is safe to create below any folder on any system.

    Parameters
    ----------
    path : str
        A relative path with ``/`` between its parts.

    Raises
    ------
    BadInput
        The path is absolute, empty or too long, leads outside, or has a part
        that some system refuses or treats specially.
    """
    fault = _path_fault(path)
    if fault:
        raise BadInput(f"bad path {quoted(path)}: {fault}")
    return path


def check_paths(paths: Iterable[str]) -> None:
    """Check each path, and that no two of them fall together on any system.

    Raises
    ------
    BadInput
        A path is bad in itself, two are equal or differ only by case or Unicode
        normalisation, or one is a file and a folder at once.
    """
    files: dict[str, str] = {}
    for path in paths:
        key = _fold(check_path(path))
        if key in files:
            raise BadInput(f"paths {quoted(files[key])} and {quoted(path)} name one file")
        files[key] = path
    for key, path in files.items():
        end = key.find("/")
        while end >= 0:
            if key[:end] in files:
                other = files[key[:end]]
                raise BadInput(f"path {quoted(other)} is a file and the folder of {quoted(path)}")
            end = key.find("/", end + 1)


def check_tensor_name(name: str) -> str:
    """Return `name` if it is valid Unicode of bounded length; it may be empty.

    Raises
    ------
    BadInput
        The name is too long or holds a surrogate.
    """
    # Every character takes at most 4 bytes, so most names need no encoding.
    if len(name) * 4 > MAX_TENSOR_NAME_BYTES or not name.isascii():
        size_bytes = _utf8_size(name)
        if size_bytes is None:
            raise BadInput(f"tensor name {quoted(name)} is not valid Unicode")
        if size_bytes > MAX_TENSOR_NAME_BYTES:
            raise BadInput(
                f"tensor name {quoted(name)} is {size_bytes} bytes long, "
                f"at most {MAX_TENSOR_NAME_BYTES}"
            )
    return name


def _fold(path: str) -> str:
    """Return the same string for paths that a file system may hold for the same.

    Canonical caseless matching, Unicode Standard section 3.13, definition D145.
    """
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _utf8_size(text: str) -> int | None:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _path_fault(path: str) -> str | None:
    if not path:
        return "it is empty"
    size_bytes = _utf8_size(path)
    if size_bytes is None:
        return "it is not valid Unicode"
    if size_bytes > MAX_PATH_BYTES:
        return f"it is {size_bytes} bytes long, at most {MAX_PATH_BYTES}"
    for character in path:
        if character in _FORBIDDEN_CHARACTERS:
            return f"it holds {_FORBIDDEN_CHARACTERS[character]}"
        if unicodedata.category(character) == "Cc":
            return "it holds a control character"
    if path.startswith("/"):
        return "it is absolute"
    for part in path.split("/"):
        fault = _part_fault(part)
        if fault:
            return fault
    return None


def _part_fault(part: str) -> str | None:
    if not part:
        return "a part of it is empty"
    if part in (".", ".."):
        return f"a part of it is {part!r}"
    if part[-1] in ". ":
        return "a part of it ends with a dot or a space"
    if len(part.encode()) > MAX_PART_BYTES:
        return f"a part of it is longer than {MAX_PART_BYTES} bytes"
    # Windows looks at the name before the first dot, without trailing spaces.
    if part.split(".", 1)[0].rstrip(" ").lower() in _DEVICE_NAMES:
        return "a part of it is a device name"
    return None
