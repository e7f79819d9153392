"""In which order a model's tensors are wanted."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from .errors import BadInput
from .manifest import Manifest, NamedTensor

MAX_LEVELS = 250
"""Levels of urgency told apart: the planner knows 256, and 250 steps of a model are
finer than the 16 MiB that are in flight at a time."""


def tensors_in_order(
    manifest: Manifest, chosen: Iterable[int], first: Sequence[str]
) -> list[NamedTensor]:
    """Return the tensors among `chosen` objects: those of `first`, then file order.

    Parameters
    ----------
    manifest : Manifest
        The model.
    chosen : iterable of int
        Indices of the objects wanted.
    first : sequence of str
        Patterns of tensor names or file paths; an earlier one goes first.

    Raises
    ------
    BadInput
        A pattern of `first` matches no tensor and no file of the model.
    """
    wanted = frozenset(chosen)
    every = [(file.path, tensor) for file in manifest.files for tensor in file.tensors]
    ordered: dict[NamedTensor, None] = {}
    for pattern in first:
        matches = [
            tensor
            for path, tensor in every
            if fnmatch.fnmatchcase(tensor.name, pattern) or fnmatch.fnmatchcase(path, pattern)
        ]
        if not matches and not any(fnmatch.fnmatchcase(f.path, pattern) for f in manifest.files):
            raise BadInput(f"--first {pattern!r} matches no file and no tensor of the model")
        ordered.update(dict.fromkeys(matches))
    ordered.update((tensor, None) for _, tensor in every)
    return [t for t in ordered if wanted.issuperset(manifest.objects_of([t.object_index]))]


def urgency(
    manifest: Manifest, chosen: Iterable[int], first: Sequence[str], *, in_order: bool
) -> dict[bytes, int]:
    """Return how urgent objects are, by digest: a lower number comes first.

    Parameters
    ----------
    manifest, chosen, first
        As for `tensors_in_order`; files that match `first` count as well.
    in_order : bool
        Whether everything is wanted in order; otherwise only `first` goes first, and
        the rest is left to the planner, which is faster with many sources.
    """
    found: dict[bytes, int] = {}
    if not (in_order or first):
        return found
    wanted = frozenset(chosen)
    if in_order:
        tensors = tensors_in_order(manifest, wanted, first)
        step = max(1, -(-len(tensors) // MAX_LEVELS))
        for rank, tensor in enumerate(tensors):
            for index in manifest.objects_of([tensor.object_index]):
                found.setdefault(manifest.objects[index].digest, rank // step - MAX_LEVELS)
        return found
    tensors_in_order(manifest, wanted, first)  # refuses a pattern that matches nothing
    for rank, pattern in enumerate(first[:MAX_LEVELS]):
        for file in manifest.files:
            in_file = fnmatch.fnmatchcase(file.path, pattern)
            indices = list(file.parts) if in_file else []
            indices += [
                tensor.object_index
                for tensor in file.tensors
                if in_file or fnmatch.fnmatchcase(tensor.name, pattern)
            ]
            for index in wanted & manifest.objects_of(indices):
                found.setdefault(manifest.objects[index].digest, rank - MAX_LEVELS)
    return found
