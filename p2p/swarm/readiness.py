"""Which objects are to be made ready next, and when: chunks nobody can be asked for yet.

An object of several chunks can be asked for only when its chunk list is at hand. A model
of a million chunks has lists of 32 MB, so a download begins with some, and gets the others
while it runs, a portion at a time.

Rules
- Another portion is due while fewer than `WINDOW_CHUNKS` chunks are ready and missing, or
  when a source has nothing to do and holds some that are not ready.
- Of what is not ready the most urgent goes first; among those, what such a source holds;
  then what the fewest hold, as far as a sample shows; what nobody holds comes last.
- A portion is bounded by the number of its objects and of their chunks.

No I/O; the random generator is the caller's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .chunk_map import BLOCK_CHUNKS, ChunkMap
from .picker import Picker, zeros
from .source_state import SourceState

WINDOW_CHUNKS = 1 << 14
"""Chunks that should be ready: 16 GiB, ten seconds of the fastest download, in which
another portion comes over any wire."""

PORTION_OBJECTS = 1024
"""Objects in a portion: one request for their lists."""

PORTION_CHUNKS = 1 << 16
"""Chunks in a portion, unless one object has more: 2 MiB of lists."""

SAMPLE_BLOCKS = 512
"""Blocks compared for a portion, of which a model of 100,000 chunks has fewer."""


class Readiness:
    """Chooses what to make ready.

    Parameters
    ----------
    chunks : ChunkMap
        The download.
    sources : mapping of str to SourceState
        The present sources.
    picker : Picker
        Tells who has something free.
    rng : random.Random
        Takes the sample, and breaks ties.
    """

    def __init__(
        self,
        chunks: ChunkMap,
        sources: Mapping[str, SourceState],
        picker: Picker,
        rng: random.Random,
    ) -> None:
        self._chunks = chunks
        self._sources = sources
        self._picker = picker
        self._rng = rng

    @property
    def is_unready(self) -> bool:
        """Whether anything cannot be asked for yet."""
        return bool(self._chunks.unready)

    def is_due(self) -> bool:
        """Tell whether another portion should be made ready."""
        chunks = self._chunks
        if not chunks.unready:
            return False
        ready_chunks = chunks.missing_chunks - chunks.unready_chunks
        return ready_chunks < WINDOW_CHUNKS or bool(self._idle())

    def _idle(self) -> list[SourceState]:
        """Return the sources without work that hold something unready."""
        return [
            state
            for state in self._sources.values()
            if not state.requests
            and not self._picker.has_free(state)
            and any(state.held[block] & mask for block, mask in self._chunks.unready.items())
        ]

    def next_portion(self) -> list[int]:
        """Return the objects to be made ready next, none if all are."""
        chunks = self._chunks
        level = min((chunks.level_of[block] for block in chunks.unready), default=0)
        blocks = [block for block in chunks.unready if chunks.level_of[block] == level]
        idle = self._idle()
        wanted = [b for b in blocks if any(s.held[b] & chunks.unready[b] for s in idle)] or blocks
        if len(wanted) > SAMPLE_BLOCKS:
            wanted = self._rng.sample(wanted, SAMPLE_BLOCKS)
        else:
            self._rng.shuffle(wanted)
        somebody_has_all = any(state.holds_all for state in self._sources.values())
        found: dict[int, None] = {}
        count = 0

        def rarity(block: int) -> int:
            mask = chunks.unready[block]
            if not somebody_has_all:
                mask &= chunks.held_by(block, 1)
            return chunks.rarest(block, mask)[0] if mask else 1 << 30

        for block in sorted(wanted, key=rarity):
            mask = chunks.unready[block]
            while mask:
                position = block * BLOCK_CHUNKS + zeros(mask)
                object_index, width = chunks.extent(position)
                if found and (len(found) >= PORTION_OBJECTS or count + width > PORTION_CHUNKS):
                    return list(found)
                if object_index not in found:
                    found[object_index] = None
                    count += width
                stop = position - block * BLOCK_CHUNKS + width
                mask = mask >> stop << stop
        return list(found)
