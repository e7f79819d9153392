"""What models share: tensors, and the bytes that sharing them saves. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .manifest import Manifest


class TensorPair(NamedTuple):
    """A name as two models have it: digests and sizes; an empty digest where it is not."""

    name: str
    a_digest: bytes
    a_bytes: int
    b_digest: bytes
    b_bytes: int


class Difference(NamedTuple):
    """How two models differ.

    Attributes
    ----------
    same : list of TensorPair
        Names that stand for the same bytes in both.
    changed : list of TensorPair
        Names that stand for different bytes.
    only_a, only_b : list of TensorPair
        Names that one of them has, where the other has not even the bytes.
    renamed : list of TensorPair
        Names of one of them whose bytes the other has under another name.
    shared_bytes, a_bytes, b_bytes : int
        Bytes of tensors that both have, each counted once; of all tensors of either.
    """

    same: list[TensorPair]
    changed: list[TensorPair]
    only_a: list[TensorPair]
    only_b: list[TensorPair]
    renamed: list[TensorPair]
    shared_bytes: int
    a_bytes: int
    b_bytes: int


def tensors_by_name(manifest: Manifest) -> dict[str, tuple[bytes, int]]:
    """Return digest and size of each tensor; of one name in two files, the first."""
    found: dict[str, tuple[bytes, int]] = {}
    for file in manifest.files:
        for tensor in file.tensors:
            index = tensor.object_index
            found.setdefault(tensor.name, (manifest.digest_of(index), manifest.size_of(index)))
    return found


def tensor_sizes(manifest: Manifest) -> dict[bytes, int]:
    """Return the sizes of a model's distinct tensors, by digest."""
    indices = {tensor.object_index for file in manifest.files for tensor in file.tensors}
    return {manifest.digest_of(index): manifest.size_of(index) for index in indices}


def compare(a: Manifest, b: Manifest) -> Difference:
    """Return how two models differ, by tensors."""
    names_a, names_b = tensors_by_name(a), tensors_by_name(b)
    sizes_a, sizes_b = tensor_sizes(a), tensor_sizes(b)
    result = Difference(
        [],
        [],
        [],
        [],
        [],
        sum(size for digest, size in sizes_a.items() if digest in sizes_b),
        sum(sizes_a.values()),
        sum(sizes_b.values()),
    )
    for name in [*names_a, *(name for name in names_b if name not in names_a)]:
        pair = TensorPair(name, *names_a.get(name, (b"", 0)), *names_b.get(name, (b"", 0)))
        if pair.a_digest and pair.b_digest:
            (result.same if pair.a_digest == pair.b_digest else result.changed).append(pair)
        elif pair.a_digest:
            (result.renamed if pair.a_digest in sizes_b else result.only_a).append(pair)
        else:
            (result.renamed if pair.b_digest in sizes_a else result.only_b).append(pair)
    return result


class Share(NamedTuple):
    """One model among several.

    Attributes
    ----------
    total_bytes : int
        Bytes of its objects.
    own_bytes : int
        Bytes of those that no other of the models has.
    """

    total_bytes: int
    own_bytes: int


class Deduplication(NamedTuple):
    """What several models take together.

    Attributes
    ----------
    shares : list of Share
        Each model, in the order given.
    separate_bytes : int
        What they would take one by one.
    together_bytes : int
        What they take with each object kept once.
    overlap : list of list of int
        Bytes that two of them share, for each pair.
    """

    shares: list[Share]
    separate_bytes: int
    together_bytes: int
    overlap: list[list[int]]


def deduplicate(manifests: Sequence[Manifest]) -> Deduplication:
    """Return what models take together, and what sharing saves."""
    sizes = [{ref.digest: ref.size_bytes for ref in each.objects} for each in manifests]
    holders = Counter(digest for each in sizes for digest in each)
    together: dict[bytes, int] = {}
    for each in sizes:
        together |= each
    return Deduplication(
        [
            Share(
                sum(each.values()),
                sum(size for digest, size in each.items() if holders[digest] == 1),
            )
            for each in sizes
        ],
        sum(sum(each.values()) for each in sizes),
        sum(together.values()),
        [[sum(size for digest, size in a.items() if digest in b) for b in sizes] for a in sizes],
    )
