"""The sources of a download by name: those present, and what is remembered of others."""

from __future__ import annotations

from .chunk_map import ChunkMap
from .source import Failure
from .source_state import SourceRecord, SourceState, statistics_of
from .types import PlannerLimits, SourceKind, SourceStatistics


class SourceTable:
    """Who is here and who was.

    Attributes
    ----------
    present : dict of str to SourceState
        Sources that can be asked.
    """

    def __init__(self, chunks: ChunkMap, limits: PlannerLimits) -> None:
        self.present: dict[str, SourceState] = {}
        self._records: dict[str, SourceRecord] = {}
        self._chunks = chunks
        self._limits = limits

    def admit(self, name: str, kind: SourceKind) -> tuple[Failure, str] | None:
        """Add a source that is not present, or return why not."""
        record = self._records.get(name)
        if record is not None and record.is_liar:
            return Failure.BAD_BYTES, "has lied before"
        if len(self.present) >= self._limits.max_sources:
            return Failure.LOCAL, "there are enough sources"
        if record is None:
            record = self._records[name] = SourceRecord(kind)
        record.dropped = None
        self.present[name] = SourceState(name, record, self._chunks)
        self._forget_somebody()
        return None

    def _forget_somebody(self) -> None:
        """Keep the number of remembered names within its limit, liars the longest."""
        if len(self._records) - len(self.present) > self._limits.max_past_sources:
            past = [name for name in self._records if name not in self.present]
            honest = (name for name in past if not self._records[name].is_liar)
            del self._records[next(honest, past[0])]

    def origins(self) -> list[SourceState]:
        """Return the origins that are present."""
        return [state for state in self.present.values() if state.kind is SourceKind.ORIGIN]

    def who(self, name: str | None) -> tuple[SourceRecord | None, SourceState | None]:
        """Return what is remembered of a name, and its state if it is present."""
        if name is None:
            return None, None
        return self._records.get(name), self.present.get(name)

    def statistics(self) -> tuple[SourceStatistics, ...]:
        """Return the public view of all sources, in the order they first came."""
        return tuple(
            statistics_of(name, record, self.present.get(name))
            for name, record in self._records.items()
        )
