"""What callers hand over, put into one shape."""

from __future__ import annotations

from collections.abc import Sequence


def one_or_more(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text, or several, as several.

    A text is a sequence of its letters as well, so ``first="embed*"`` in place of
    ``first=["embed*"]`` would ask for an ``e``.
    """
    return (given,) if isinstance(given, str) else tuple(given)
