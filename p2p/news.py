"""What a download tells others while it runs: the objects of which more is proved.

An object is named once for all that came since the last time, with all that is proved of
it. That it is whole is news of its own, also to those whom a part by our chunk list does
not concern. What the store would not give out is not told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorswarm.store.incoming import Incoming

from .control import wire


class News:
    """The news of one download.

    Parameters
    ----------
    incoming : sequence of Incoming
        The objects; everywhere else an object is named by its index.
    """

    def __init__(self, incoming: Sequence[Incoming]) -> None:
        self._incoming = incoming
        self._changed: set[int] = set()
        self._finishing: set[int] = set()

    def note(self, indices: Iterable[int]) -> None:
        """Note objects of which more is proved."""
        self._changed.update(indices)

    def take(self) -> list[wire.HaveEntry]:
        """Return what is new since the last call."""
        changed, self._changed = self._changed, set()
        whole = {index for index in self._finishing if self._incoming[index].finished.done()}
        self._finishing -= whole
        entries = []
        for index in changed | whole:
            incoming = self._incoming[index]
            if incoming.missing_bytes() == 0 and not incoming.finished.done():
                self._finishing.add(index)
            entry = _entry(incoming)
            if entry is not None:
                entries.append(entry)
        return entries


def _entry(incoming: Incoming) -> wire.HaveEntry | None:
    """Return what to tell of an object; None if the store would not give it out."""
    if incoming.finished.done():
        if incoming.finished.exception() is not None:
            return None
        return wire.HaveEntry(incoming.digest, incoming.size_bytes, None, b"")
    if not incoming.is_shown:
        return None
    return wire.HaveEntry(
        incoming.digest, incoming.size_bytes, incoming.proved(), incoming.chunk_list_digest
    )
