"""Counts what an object's tables hold, however deep: for bounds on memory."""

from __future__ import annotations

from array import array
from collections import deque

_TABLES = (list, tuple, set, frozenset, deque)


def count_entries(root: object) -> int:
    """Return the number of entries in all containers that an object of ours reaches.

    Each container counts once. Strings, numbers and bytes count nothing by themselves, but
    a bytearray or array does, by its length.
    """
    seen: set[int] = set()
    todo: list[object] = [root]
    count = 0
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            count += len(each)
            todo += each.keys()
            todo += each.values()
        elif isinstance(each, _TABLES):
            count += len(each)
            todo += each
        elif isinstance(each, array | bytearray):
            count += len(each)
        elif type(each).__module__.startswith("tensorswarm."):
            todo += getattr(each, "__dict__", {}).values()
            for kind in type(each).__mro__:
                names = getattr(kind, "__slots__", ())
                todo += [getattr(each, name) for name in names if hasattr(each, name)]
    return count
