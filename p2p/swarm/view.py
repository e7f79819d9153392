"""What can be read of a planner: how far the download is, and what came from where.

Reading changes nothing. No I/O.
"""

from __future__ import annotations

from .chunk_map import ChunkMap
from .crowd import Crowd
from .picker import Picker
from .source_state import SourceState
from .source_table import SourceTable
from .types import Action, Statistics


class PlannerView:
    """The part of a planner that only tells."""

    _chunks: ChunkMap
    _crowd: Crowd
    _picker: Picker
    _table: SourceTable
    _sources: dict[str, SourceState]
    _hungry: dict[str, None]
    _outbox: list[Action]
    _proved_bytes: int
    _duplicate_bytes: int
    _refused_bytes: int

    def is_done(self) -> bool:
        """Tell whether every chunk is proved."""
        return not self._chunks.missing_chunks

    @property
    def has_news(self) -> bool:
        """Whether something has happened since `actions` that may call for a decision."""
        return bool(self._hungry or self._outbox)

    @property
    def missing_bytes(self) -> int:
        """Bytes of the chunks that are not proved yet."""
        return self._chunks.missing_bytes

    @property
    def missing_chunks(self) -> int:
        """Number of chunks that are not proved yet."""
        return self._chunks.missing_chunks

    @property
    def decision_steps(self) -> int:
        """Elementary steps of all decisions so far: what they cost, on any machine."""
        return self._picker.steps + self._crowd.steps

    def unobtainable(self) -> list[int]:
        """Return the objects with a missing chunk that no present source holds."""
        if any(state.holds_all for state in self._sources.values()):
            return []
        return self._chunks.unheld_objects()

    def statistics(self) -> Statistics:
        """Return what came from where, also from sources that have gone."""
        return Statistics(
            self._proved_bytes,
            self._duplicate_bytes,
            self._refused_bytes,
            self._table.statistics(),
        )
