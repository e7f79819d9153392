"""What a download tells others while it runs: the objects of which more is proved.

An object is named once for all that came since the last time, with all that is proved of
it. That it is whole is news of its own, also to those whom a part by our chunk list does
not concern. What the store would not give out is not told.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from tensorswarm.store.wanted import Wanted

from .control import wire

TELL_INTERVAL_S = 0.5
"""How often neighbours hear of newly proved chunks."""

TELL_CROWD_INTERVAL_S = 0.03
"""The same while others fetch the same: what they do not know of they ask the origin for."""


class News:
    """The news of one download.

    Parameters
    ----------
    wanted : Wanted
        The objects; everywhere else an object is named by its index.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._changed: set[int] = set()
        self._finishing: set[int] = set()
        self._came = trio.Event()

    def note(self, indices: Iterable[int]) -> None:
        """Note objects of which more is proved."""
        self._changed.update(indices)
        self._came.set()

    async def wait(self) -> None:
        """Wait until there may be something new."""
        if not self._changed and not self._finishing:
            self._came = trio.Event()
            await self._came.wait()

    def skip(self) -> None:
        """Forget what is new: nobody listens, and who asks later is told what there is then.

        What is not in the index yet cannot be told then, so it stays news.
        """
        changed, self._changed = self._changed, set()
        self._finishing = {
            index for index in self._finishing | changed if not self._wanted.has_ended(index)
        }

    def take(self) -> list[wire.HaveEntry]:
        """Return what is new since the last call."""
        wanted = self._wanted
        changed, self._changed = self._changed, set()
        whole = {index for index in self._finishing if wanted.has_ended(index)}
        self._finishing -= whole
        entries = []
        for index in changed | whole:
            if wanted.missing_bytes(index) == 0 and not wanted.has_ended(index):
                self._finishing.add(index)
            held = wanted.holding(index)
            if held is not None:
                entries.append(wire.HaveEntry(wanted.digest(index), *held))
        return entries
