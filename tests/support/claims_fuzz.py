"""Mutated claims about models: recipes, stamps and sidecars, as a stranger may send them.

The same seeded mutator as for the formats (`format_fuzz`), on what stands beside a file's
own bytes. The invariant: a claim is refused with ``BadInput``, whose message is one short
printable line, or what came of it is consistent:

- a *recipe* that was checked reads inside its inputs, and makes no more than its kind can;
- a *stamp* has digests and chunk lists of the right lengths, and the stamped copy of a file
  has the very bytes that were to be kept;
- *remote* files with stamps, false ones too, are described by a manifest of those files, or
  not at all, and each byte of them is read at most once;
- a *sidecar*'s manifest is that of the model it names, and its lists are those it needs.

Nothing else is raised, and memory stays within a bound that follows from the claim's size
(``tracemalloc``, when `fuzz` is asked to watch it, which takes three times as long).

    python -m tests.support.claims_fuzz 1000000 1
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import sys
import tempfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from tensorswarm.store import sidecar
from tensorswarm.store.cid import model_cid
from tensorswarm.store.digest import DIGEST_SIZE, EMPTY_DIGEST, digest_of
from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats import stamps
from tensorswarm.store.ingest import describe_paths
from tensorswarm.store.recipes import Input, check_recipe, make
from tensorswarm.store.remote_model import RemoteCopy, describe_remote
from tensorswarm.store.store import Store
from tests.support.format_fuzz import (
    mutate,
    report,
    seed_gguf,
    seed_onnx,
    seed_safetensors,
    seed_sharded,
    seed_tfjs,
)

MIB = 1 << 20

MEMORY_BYTES = 16 * MIB
"""What any claim may take: recipes work in blocks of 1 MiB, and a varint's block grows."""

MEMORY_FACTOR = 64
"""And as many bytes for each of its own, or of those that a recipe reads and makes."""

MAX_MADE_BYTES = 256 << 10
"""Recipes for more are checked, but not followed, to save time."""


class Outcome(NamedTuple):
    """Whether a claim was accepted, and how many bytes it was about."""

    accepted: bool
    size_bytes: int


def _refusal(error: BadInput) -> None:
    assert str(error).isprintable(), ascii(str(error))
    assert len(str(error)) < 1500


# ---- recipes

_EDGES = (0, 1, -1, 2, 7, 8, 9, 10, 16, 255, 1 << 20, 1 << 30, 1 << 45, (1 << 45) + 1, 1 << 64)


def _noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _packed(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


class _Recipe(NamedTuple):
    kind: str
    parameters: tuple[int, ...]
    inputs: tuple[bytes, ...]
    size_bytes: int


_TEXT = b"weights " * 40

RECIPES = [
    _Recipe("slice", (3,), (_noise(50),), 20),
    _Recipe("strided", (4, 0, 2, 5, 3, 4, 20), (_noise(60),), 60),
    _Recipe("strided", (1, 3, 3, 2, 3, 4, 12, 4, -1), (_noise(24),), 24),
    _Recipe("strided", (2, 4, 2, 6, 3, 0, 2), (_noise(40),), 36),
    _Recipe("deflate", (6,), (_TEXT[:80], _TEXT[80:]), len(_packed(_TEXT))),
    _Recipe("inflate", (16,), (_packed(_TEXT),), 200),
    _Recipe("varint", (8, 1), (struct.pack("<4q", 1, -1, 300, 1 << 40),), 20),
    _Recipe("varint", (4, 0), (struct.pack("<5I", 0, 1, 127, 128, 1 << 31),), 10),
    _Recipe("unvarint", (8, 1), (b"\x05" + b"\xff" * 9 + b"\x01\x07",), 24),
    _Recipe("unvarint", (2, 0), (b"\x05\x80\x01\x07",), 6),
]


def _changed_number(value: int, rng: random.Random) -> int:
    if rng.random() < 0.5:
        return value + rng.choice((-8, -4, -1, 1, 2, 4))
    return rng.choice(_EDGES) * rng.choice((1, 1, -1))


def _changed_recipe(recipe: _Recipe, rng: random.Random) -> _Recipe:
    kind, parameters, inputs, size_bytes = recipe
    for _ in range(rng.choice((1, 1, 2, 3))):
        action = rng.randrange(6)
        numbers = list(parameters)
        if action == 0 and numbers:
            at = rng.randrange(len(numbers))
            numbers[at] = _changed_number(numbers[at], rng)
        elif action == 1 and numbers:
            del numbers[rng.randrange(len(numbers))]
        elif action == 2:
            numbers.insert(rng.randrange(len(numbers) + 1), rng.choice(_EDGES))
        elif action == 3:
            size_bytes = _changed_number(size_bytes, rng)
        elif action == 4:
            at = rng.randrange(len(inputs) or 1)
            changed = tuple(mutate(data, rng) if i == at else data for i, data in enumerate(inputs))
            inputs = rng.choice((changed, changed, changed, inputs * 2, inputs[1:]))
        else:
            kind = rng.choice((*(each.kind for each in RECIPES), "", "eval"))
        parameters = tuple(numbers)
    return _Recipe(kind, parameters, inputs, size_bytes)


def try_recipe(rng: random.Random) -> Outcome:
    """Check a changed recipe, follow it if it is accepted, and hold the invariant."""
    kind, parameters, inputs, size_bytes = _changed_recipe(rng.choice(RECIPES), rng)
    total = sum(map(len, inputs))
    about = total + min(max(size_bytes, 0), MAX_MADE_BYTES)
    try:
        check_recipe(kind, parameters, list(map(len, inputs)), size_bytes)
        if size_bytes > MAX_MADE_BYTES:
            return Outcome(True, about)
        made = 0
        for block in make(kind, parameters, list(map(_input, inputs)), size_bytes):
            made += len(block)
            assert made <= max(size_bytes, 10 * total + 64), "it makes more than it could"
    except BadInput as error:
        _refusal(error)
        return Outcome(False, about)
    if kind in ("slice", "strided"):
        assert made == size_bytes
    return Outcome(True, about)


def _input(data: bytes) -> Input:
    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data), "read outside the input"
        return data[offset : offset + length]

    return Input(len(data), read_at)


# ---- stamps


def _stamp_text() -> str:
    small, large = digest_of(b"a"), digest_of(b"b")
    chunks = digest_of(b"c") + digest_of(b"d")
    told = {"a": stamps.Stamped(small, b"", (large, small)), "w": stamps.Stamped(large, chunks)}
    return stamps.text_of(told)


def _stamped_files() -> list[tuple[str, bytes]]:
    """Return a small file of each format that can be stamped: as it is, and stamped."""
    found = []
    for seed in (seed_safetensors, seed_gguf, seed_onnx, seed_tfjs):
        name, data = next(iter(seed()[0].items()))
        item = _input(data)
        read_at = lambda at, length, item=item: bytes(item.read_at(at, length))  # noqa: E731
        parts = stamps.stamped(name, len(data), read_at, _stamp_text())
        found += [(name, data), (name, b"".join(stamps.bytes_of(parts, read_at, 1 << 16)))]
    return found


STAMPED = _stamped_files()


def try_stamp(rng: random.Random) -> Outcome:
    """Read a changed file's stamp, or a changed stamp by itself, and stamp the file anew."""
    text = mutate(_stamp_text().encode(), rng).decode("utf-8", "replace")
    if rng.random() < 0.3:
        return _parsed(lambda: stamps.parse_text(text), len(text))
    name, data = rng.choice(STAMPED)
    changed = mutate(data, rng)
    item = _input(changed)

    def read_at(offset: int, length: int) -> bytes:
        return bytes(item.read_at(offset, length))

    if rng.random() < 0.7:
        return _parsed(lambda: stamps.read_stamp(name, len(changed), read_at), len(changed))
    try:
        parts = stamps.stamped(name, len(changed), read_at, _stamp_text())
        made = b"".join(stamps.bytes_of(parts, read_at, 1 << 16))
    except BadInput as error:
        _refusal(error)
        return Outcome(False, len(changed))
    assert sum(p.size_bytes if isinstance(p, stamps.Run) else len(p) for p in parts) == len(made)
    return Outcome(True, len(changed))


def _parsed(parse: Callable[[], dict[str, stamps.Stamped] | None], size_bytes: int) -> Outcome:
    try:
        entries = parse() or {}
        for name, entry in entries.items():
            assert len(entry.digest) == DIGEST_SIZE
            assert len(entry.chunk_list) % DIGEST_SIZE == 0
            assert all(len(part) == DIGEST_SIZE for part in entry.parts)
            listed = stamps.check_entry(name, entry, 2 * MIB if entry.chunk_list else 100)
            assert len(listed) in (0, DIGEST_SIZE)
    except BadInput as error:
        _refusal(error)
        return Outcome(False, size_bytes)
    return Outcome(True, size_bytes)


# ---- files elsewhere, described by their stamps


class _NoStore:
    """Stands in for a store that takes everything and keeps nothing."""

    def __init__(self, folder: Path) -> None:
        self.place = self
        self._folder = folder

    def temporary(self) -> Path:
        return self._folder / "scratch"

    def put_blob(self, data: bytes) -> bytes:
        return digest_of(data)

    def has(self, digest: bytes) -> bool:
        return False


def _sites() -> list[dict[str, bytes]]:
    """Return stamped models, the digests in the stamps those of other bytes."""
    found = []
    for seed in (seed_safetensors, seed_gguf, seed_onnx, seed_tfjs, seed_sharded):
        files = dict(seed()[0])
        name, data = next(iter(files.items()))
        item = _input(data)
        read_at = lambda at, length, item=item: bytes(item.read_at(at, length))  # noqa: E731
        told = {
            each: stamps.Stamped(digest_of(each.encode()), b"", parts)
            for each, parts in (("a", ()), ("w", ()), ("q", ()), ("b", (EMPTY_DIGEST,) * 2))
        }
        parts = stamps.stamped(name, len(data), read_at, stamps.text_of(told | {"e": told["a"]}))
        files[name] = b"".join(stamps.bytes_of(parts, read_at, 1 << 16))
        found.append(files)
    return found


SITES = _sites()


def try_remote(rng: random.Random) -> Outcome:
    """Describe a changed model by its stamps."""
    files = dict(rng.choice(SITES))
    victim = rng.choice(sorted(files)) if rng.random() < 0.2 else next(iter(files))
    if rng.random() < 0.95:
        files[victim] = mutate(files[victim], rng)
    total = sum(map(len, files.values()))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        read: Counter[tuple[str, int]] = Counter()

        def read_at(name: str, offset: int, length: int) -> bytes:
            read.update((name, at) for at in range(offset, offset + length))
            return bytes(_input(files[name]).read_at(offset, length))

        copies = [
            stack.enter_context(
                closing(RemoteCopy(name, len(data), partial(read_at, name), folder / name))
            )
            for name, data in files.items()
        ]
        try:
            found = describe_remote(cast(Store, _NoStore(folder)), copies)
        except BadInput as error:
            _refusal(error)
            return Outcome(False, total)
        assert not read or max(read.values()) == 1
        if found is not None:
            sizes = {file.path: file.size_bytes for file in found[0].files}
            assert sizes == {name: len(data) for name, data in files.items()}
        return Outcome(found is not None, total)


# ---- sidecars


def _sidecars() -> list[bytes]:
    """Return sidecars of small models, one of them with recipes and a chunk list."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, a=np.zeros((9, 40), "<f4"), b=np.arange(5, dtype=">i4"))
        plain = seed_safetensors()[0]["m.safetensors"]
        large = np.zeros(MIB + 5, np.uint8)
        for number, files in enumerate(
            ({"m.safetensors": plain}, {"a.npz": buffer.getvalue(), "large.bin": large.tobytes()})
        ):
            model = Path(folder) / str(number)
            model.mkdir()
            for name, data in files.items():
                (model / name).write_bytes(data)
            manifest = describe_paths([model])
            lists = {
                ref.chunk_list: digest_of(large[:MIB].tobytes()) + digest_of(large[MIB:].tobytes())
                for ref in manifest.objects
                if ref.chunk_list
            }
            found.append(sidecar.encode(manifest, lists).encode())
    return found


SIDECARS = _sidecars()


def try_sidecar(rng: random.Random) -> Outcome:
    """Read a changed sidecar; sometimes its manifest is changed, and named as it is then."""
    data = rng.choice(SIDECARS)
    if rng.random() < 0.5:
        data = mutate(data, rng)
    else:
        document = json.loads(data)
        if rng.random() < 0.7:
            manifest = mutate(base64.b64decode(document["manifest"]), rng)
            document["manifest"] = base64.b64encode(manifest).decode()
            document["model"] = model_cid(digest_of(manifest))
        else:
            lists = [mutate(base64.b64decode(each), rng) for each in document["chunk_lists"]]
            document["chunk_lists"] = [base64.b64encode(each).decode() for each in lists]
        data = json.dumps(document).encode()
    try:
        manifest_read, lists_read = sidecar.decode(data)
    except BadInput as error:
        _refusal(error)
        return Outcome(False, len(data))
    assert {ref.chunk_list for ref in manifest_read.objects if ref.chunk_list} == set(lists_read)
    assert all(digest_of(each) == digest for digest, each in lists_read.items())
    return Outcome(True, len(data))


CLAIMS: dict[str, Callable[[random.Random], Outcome]] = {
    "recipe": try_recipe,
    "remote": try_remote,
    "sidecar": try_sidecar,
    "stamp": try_stamp,
}


def fuzz(name: str, count: int, seed: int = 0, *, watch_memory: bool = False) -> int:
    """Try `count` mutated claims of a kind; return how many were accepted."""
    accepted = 0
    if watch_memory:
        tracemalloc.start()
    try:
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                outcome = CLAIMS[name](rng)
            except BaseException:
                print(f"{name}: input {number} of seed {seed} fails", file=sys.stderr)
                raise
            grown = tracemalloc.get_traced_memory()[1] - before
            assert grown <= MEMORY_BYTES + MEMORY_FACTOR * outcome.size_bytes, (name, seed, number)
            accepted += outcome.accepted
    finally:
        if watch_memory:
            tracemalloc.stop()
    return accepted


if __name__ == "__main__":
    report(CLAIMS, fuzz)
