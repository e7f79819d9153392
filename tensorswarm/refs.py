"""References: what a person may write to mean a model or a tensor."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from tensorswarm.store.cid import MODEL_CODEC, parse_reference
from tensorswarm.store.errors import BadInput, NotFound

MAX_REF_TEXT = 4096
"""Longest reference read: as long as a path may be."""

_RELEASE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^/\s]+)?")


class RefKind(Enum):
    """What a reference stands for."""

    MODEL = "model"
    TENSOR = "tensor"
    PATH = "path"


class Ref(NamedTuple):
    """A parsed reference; `digest` is empty for a path."""

    kind: RefKind
    digest: bytes
    path: Path


def is_url(text: str) -> bool:
    """Tell whether a reference is the URL of a file."""
    return text.startswith(("http://", "https://"))


def parse_ref(text: str) -> Ref:
    """Read a reference.

    Parameters
    ----------
    text : str
        A model id, a tensor's CID or 64-digit digest, the path of a local file or
        folder, or ``publisher/name@range``.

    Raises
    ------
    BadInput
        It is none of these.
    NotFound
        It names a release, and no catalog of that publisher is known here.
    """
    if not text or len(text) > MAX_REF_TEXT or "\0" in text:
        raise BadInput("not a reference: give a model id, a tensor digest or a path")
    try:
        reference = parse_reference(text)
    except BadInput as error:
        return _not_an_id(text, error)
    kind = RefKind.MODEL if reference.codec == MODEL_CODEC else RefKind.TENSOR
    return Ref(kind, reference.digest, Path())


def _not_an_id(text: str, error: BadInput) -> Ref:
    path = Path(text)
    try:
        if path.exists():
            return Ref(RefKind.PATH, b"", path)
    except OSError as os_error:
        raise BadInput(f"{text!r}: {os_error.strerror}") from os_error
    if _RELEASE.fullmatch(text) and not text.startswith(("./", "../")):
        raise NotFound(f"{text}: no catalog of {text.split('/')[0]!r} is known here") from error
    if "://" in text:
        raise BadInput(f"{text!r}: a URL must begin with http:// or https://") from error
    raise BadInput(
        f"{text!r} is no model id, no tensor digest, and no file or folder of that name exists"
    ) from error
