"""A set of objects, named by digest or by their place in a model.

What a neighbour wants to hear of, and what it said it holds, are such sets. A model of 100,000
objects takes a bit for each here; as digests they took ten megabytes. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensorswarm.store.object_table import ObjectTable

from .holdings import Holdings


class ObjectSet:
    """Objects named one by one, and parts of models."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._models: dict[bytes, tuple[ObjectTable, Holdings]] = {}

    def __contains__(self, digest: bytes) -> bool:
        if digest in self._digests or digest in self._models:
            return True
        return any(
            (index := table.find(digest)) >= 0 and index in chosen
            for table, chosen in self._models.values()
        )

    def __len__(self) -> int:
        """Return how many there are; those that are named twice count twice."""
        chosen = sum(1 + len(chosen) for _, chosen in self._models.values())
        return len(self._digests) + chosen

    def has_objects(self) -> bool:
        """Tell whether there is any object, and not only a model without one."""
        return bool(self._digests) or any(len(chosen) for _, chosen in self._models.values())

    def names(self, digest: bytes) -> bool:
        """Tell whether an object is named by its digest itself."""
        return digest in self._digests

    def add(self, digests: Iterable[bytes]) -> None:
        """Add objects by their digests."""
        self._digests.update(digests)

    def count_with(self, digests: Iterable[bytes]) -> int:
        """Return how many would be named by digest after `add`."""
        return len(self._digests.union(digests))

    def discard(self, digests: Iterable[bytes]) -> None:
        """Take out objects that were named by digest, and models by theirs."""
        for digest in digests:
            self._digests.discard(digest)
            self._models.pop(digest, None)

    # ---- by model

    @property
    def model_count(self) -> int:
        """How many models it has parts of."""
        return len(self._models)

    def models(self) -> Iterator[tuple[bytes, ObjectTable, Holdings]]:
        """Yield the models: digest, objects, and which of them are in the set."""
        for model, (table, chosen) in self._models.items():
            yield model, table, chosen

    def of_model(self, model: bytes) -> Holdings | None:
        """Return which objects of a model are in the set by their place; None for none."""
        known = self._models.get(model)
        return None if known is None else known[1]

    def part_of(self, model: bytes, table: ObjectTable) -> Holdings:
        """Return the part of a model that is in the set, to be added to; empty at first."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = table, Holdings(len(table))
        return known[1]

    def forget_oldest(self, most_models: int) -> None:
        """Keep no more than so many models; those that came first go first."""
        while len(self._models) > most_models:
            del self._models[next(iter(self._models))]
