"""File formats: one module each, picked by the end of a file's name.

To add a format, write a module with a ``parse`` function that obeys
``layout.py``, and enter it below. A suffix is compared without regard to case;
what no suffix matches is kept verbatim.
"""

from __future__ import annotations

from collections.abc import Callable

from ..digest import MAX_OBJECT_SIZE
from ..errors import BadInput
from . import safetensors, verbatim
from .layout import Layout, Piece, ReadAt, TensorRange, check_layout

__all__ = ["Layout", "Piece", "ReadAt", "TensorRange", "layout_of"]

_PARSERS: dict[str, Callable[[int, ReadAt], Layout]] = {
    ".safetensors": safetensors.parse,
}


def layout_of(name: str, size_bytes: int, read_at: ReadAt) -> Layout:
    """Parse a file by the format that its name says it has.

    Parameters
    ----------
    name : str
        The file's name or path.
    size_bytes : int
        The file's length in bytes.
    read_at : ReadAt
        Reads bytes of the file; asked only for headers.

    Returns
    -------
    Layout
        Pieces that cover the file exactly, and the named tensors.

    Raises
    ------
    BadInput
        The file breaks the rules of its format, or is too large. The message
        does not repeat the name.
    """
    suffix = next((end for end in _PARSERS if name.lower().endswith(end)), "")
    parse = _PARSERS.get(suffix, verbatim.parse)
    if not 0 <= size_bytes <= MAX_OBJECT_SIZE:
        raise BadInput(f"a file of {size_bytes} bytes, at most {MAX_OBJECT_SIZE}")
    return check_layout(parse(size_bytes, read_at), size_bytes)
