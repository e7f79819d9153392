"""Files that are kept as they are: configurations, tokenizers, unknown formats.

The whole file is one blob. It is still shared between models by its digest, but
no tensor inside it can be seen.
"""

from __future__ import annotations

from .layout import Layout, Piece, ReadAt

FORMAT = "verbatim"


def parse(size_bytes: int, read_at: ReadAt) -> Layout:
    """Return a layout of one piece, or of none for an empty file."""
    pieces = (Piece(0, size_bytes, is_tensor=False),) if size_bytes else ()
    return Layout(FORMAT, pieces, ())
