"""Mutated model files, many a second: what is fuzzed, and what has to hold.

Seeds are small valid files, made by hand or by numpy, so that no library has to be there.
A mutation flips, replaces, removes, repeats or inserts bytes; numbers that parsers trip
over are put in more often than others. Everything follows from the seed of a generator,
so an input that fails can be made again.

The invariant: a file is refused with ``BadInput``, whose message is one short printable
line, or its layout covers every byte exactly once (`check_layout`, which ends every
parser, is held against an independent count here). Nothing else is raised, reads stay
inside the file, and what is read stays within a bound that follows from the format. So
does what is allocated (``tracemalloc``, when `fuzz` is asked to watch it), and no input
takes more than a second of a processor (in long runs; a test may not ask the time).

Run by itself it fuzzes for as many inputs as asked, and prints one line a format::

    python -m tests.support.format_fuzz 1000000

`guided_fuzz` tries the same things with inputs that Atheris makes by coverage.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tensorswarm.store.errors import BadInput
from tensorswarm.store.formats import Layout, layouts_of
from tensorswarm.store.formats.companions import MAX_COMPANIONS, companions

Files = dict[str, bytes]

MEMORY_BYTES = 2 << 20
"""What parsing any small file may take."""

MEMORY_FACTOR = 256
"""And as many bytes for each of its own: Python's objects are larger than what they say."""

MAX_INPUT_S = 1.0
"""Most processor time for one input, in runs that watch it: they take some 0.1 ms."""

TOKENS = [
    *(struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**44)),
    *(struct.pack("<I", n) for n in (0, 1, 2**16, 2**31, 2**32 - 1)),
    *(b"\xff\xff", b"\x00\x00", b"\xff" * 10 + b"\x01", b"\x80" * 12, b"(", b"R.", b"]", b"}"),
    *(b"PK\x05\x06", b"PK\x01\x02", b"'shape': (", b"-1", b"9" * 25, b"[[", b'"shape":'),
    *(b"cos\nsystem\n", b"c__builtin__\neval\n", b"\x94", b"b", b"\x81", b"q\x00", b"h\x00"),
]


def seed_gguf() -> list[Files]:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    keys = text(b"general.name") + struct.pack("<I", 8) + text(b"x")
    keys += text(b"general.alignment") + struct.pack("<II", 4, 32)
    keys += text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc")
    keys += text(b"scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8)
    table = text(b"a") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    table += text(b"q") + struct.pack("<IQIQ", 1, 32, 2, 32)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 4) + keys + table
    body = bytes(range(24)) + bytes(8) + bytes(range(18)) + bytes(14)
    return [{"m.gguf": header + bytes(-len(header) % 32) + body}]


def field(number: int, data: bytes) -> bytes:
    size = len(data)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bytes([number << 3 | 2]) + length + data


def seed_onnx() -> list[Files]:
    raw = b"\x08\x02\x10\x01" + field(8, b"w") + field(9, bytes(range(8)))
    minus_one = b"\xff" * 9 + b"\x01"
    typed = b"\x08\x02\x10\x07" + field(8, b"i") + field(7, b"\x05" + minus_one)
    loose = b"\x08\x02\x10\x01" + field(8, b"f") + (b"\x25" + bytes(4)) * 2
    pairs = field(13, field(1, b"location") + field(2, b"d.bin"))
    pairs += field(13, field(1, b"offset") + field(2, b"4"))
    outside = b"\x08\x02\x10\x01" + field(8, b"e") + pairs + b"\x70\x01"
    node = field(2, b"out") + field(5, field(1, b"value") + field(5, raw))
    graph = field(5, raw) + field(5, typed) + field(5, loose) + field(5, outside) + field(1, node)
    return [{"m.onnx": b"\x08\x08" + field(7, graph), "d.bin": bytes(range(16))}]


def seed_npy() -> list[Files]:
    seeds: list[Files] = []
    for array in (np.zeros((2, 3), "<f4"), np.asfortranarray(np.ones((2, 3), ">f8"))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        seeds.append({"a.npy": buffer.getvalue()})
    return seeds


def seed_npz() -> list[Files]:
    seeds: list[Files] = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, a=np.zeros((2, 3), "<f4"), b=np.arange(9, dtype="i8"))  # type: ignore[operator]
        seeds.append({"a.npz": buffer.getvalue()})
    turned = io.BytesIO()
    np.savez_compressed(turned, f=np.asfortranarray(np.ones((2, 3), ">f4")))
    seeds.append({"a.npz": turned.getvalue()})
    return seeds


class _Storage:
    """Stands for a storage while a checkpoint is pickled by hand."""


class _Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    def persistent_id(self, value: object) -> object:
        kind = _Global("torch", "FloatStorage")
        return ("storage", kind, "0", "cpu", 12) if isinstance(value, _Storage) else None


class _Global:
    """Pickles as the name of something that is not there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Tensor:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


def _save_global(pickler: Any, value: _Global) -> None:
    pickler.write(b"c" + f"{value.module}\n{value.name}\n".encode())


def _save_tensor(pickler: Any, value: _Tensor) -> None:
    _save_global(pickler, _Global("torch._utils", "_rebuild_tensor_v2"))
    pickler.save(value.arguments)
    pickler.write(b"R")


_Pickler.dispatch = {
    **pickle._Pickler.dispatch,  # type: ignore[attr-defined]
    _Global: _save_global,
    _Tensor: _save_tensor,
}


def seed_torch() -> list[Files]:
    storage = _Storage()
    value = {
        "a": _Tensor(storage, 0, (3, 4), (4, 1), False, {}),
        "t": _Tensor(storage, 0, (4, 3), (1, 4), False, {}),
        "v": _Tensor(storage, 2, (2, 2), (4, 2), False, {}),
        "n": {"x": [1, 2.5, None, True, "s", (1,)], 3: 1 << 70},
    }
    seeds: list[Files] = []
    for protocol in (2, 4):
        pickled = io.BytesIO()
        _Pickler(pickled, protocol).dump(value)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("m/data.pkl", pickled.getvalue())
            archive.writestr("m/byteorder", b"little")
            archive.writestr("m/data/0", bytes(48))
        seeds.append({"m.pt": buffer.getvalue()})
    return seeds


def seed_pickle() -> list[Files]:
    """Return the pickles of checkpoints, which `prepared` puts into an archive again."""
    return [{"data.pkl": _stored(files["m.pt"], "m/data.pkl")} for files in seed_torch()]


def _stored(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(name)


def seed_sharded() -> list[Files]:
    shard = seed_safetensors()[0]["m.safetensors"]
    names = {"a": "1.safetensors", "b": "1.safetensors", "c": "s/2.safetensors"}
    index = json.dumps({"metadata": {"total_size": 22}, "weight_map": names}).encode()
    return [{"m.index.json": index, "1.safetensors": shard, "s/2.safetensors": shard}]


def seed_tfjs() -> list[Files]:
    weights = [
        {"name": "a", "shape": [3, 2], "dtype": "float32"},
        {"name": "b", "shape": [5], "dtype": "float32", "quantization": {"dtype": "uint8"}},
        {"name": "e", "shape": [0], "dtype": "int32"},
    ]
    manifest = [{"paths": ["1.bin", "2.bin"], "weights": weights}]
    document = json.dumps({"weightsManifest": manifest}).encode()
    return [{"model.json": document, "1.bin": bytes(17), "2.bin": bytes(12)}]


def seed_safetensors() -> list[Files]:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
        }
    ).encode()
    return [{"m.safetensors": struct.pack("<Q", len(header)) + header + bytes(11)}]


SEEDS: dict[str, Callable[[], list[Files]]] = {
    name.removeprefix("seed_"): value
    for name, value in sorted(globals().items())
    if name.startswith("seed_")
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return a file with a few changes."""
    changed = bytearray(data)
    for _ in range(1 + (rng.random() < 0.5) + (rng.random() < 0.2)):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(7)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif action == 2:
            del changed[at : at + rng.randrange(1, 9)]
        elif action == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        elif action == 4:
            token = rng.choice(TOKENS)
            changed[at : at + len(token)] = token
        elif action == 5:
            changed[at:at] = rng.choice(TOKENS)
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def prepared(files: Files) -> Files:
    """Return the files to parse: a pickle by itself goes into a sound archive.

    So what is changed in it is not refused for the archive's sake before it is read.
    """
    if "data.pkl" not in files:
        return files
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", files["data.pkl"])
        archive.writestr("m/data/0", bytes(48))
    return {"m.pt": buffer.getvalue()}


def check(files: Files) -> bool:
    """Parse files, hold the invariant, and tell whether they were accepted."""
    files = prepared(files)
    read = {name: 0 for name in files}

    def reader(name: str) -> Callable[[int, int], bytes]:
        data = files[name]

        def read_at(offset: int, length: int) -> bytes:
            assert 0 <= offset <= offset + length <= len(data), "read outside the file"
            read[name] += length
            return data[offset : offset + length]

        return read_at

    try:
        layouts = layouts_of({name: (len(data), reader(name)) for name, data in files.items()})
        for name, data in files.items():
            named = companions(name, len(data), reader(name))
            assert len(named) <= MAX_COMPANIONS and name not in named
    except BadInput as error:
        assert str(error).isprintable(), ascii(str(error))
        assert len(str(error)) < 1500
        return False
    for name, data in files.items():
        covers(layouts[name], len(data))
        assert read[name] <= 64 * len(data) + 4096, "read far more than there is"
    return True


def covers(layout: Layout, size_bytes: int) -> None:
    """Assert that the pieces are the file, each byte once, and tensors are where they say."""
    ends = [0]
    for piece in layout.pieces:
        assert piece.offset == ends[-1]
        assert piece.size_bytes > 0
        ends.append(piece.offset + piece.size_bytes)
    assert ends[-1] == size_bytes
    pieces = {piece[:2] for piece in layout.pieces if piece.is_tensor}
    assert {t[3:] for t in layout.tensors if t.size_bytes} == pieces
    for held in layout.held:
        for extent in held.content.extents:
            assert extent.offset >= 0 and extent.size_bytes > 0
            assert extent.path or extent.offset + extent.size_bytes <= size_bytes


def fuzz(name: str, count: int, seed: int = 0, *, watch_memory: bool = False) -> int:
    """Try `count` mutated inputs of a format; return how many were accepted."""
    seeds = SEEDS[name]()
    for files in seeds:
        assert check(files), f"the seed of {name} is not accepted"
    accepted = 0
    with memory_watched(watch_memory):
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            files = dict(rng.choice(seeds))
            victim = rng.choice(sorted(files)) if rng.random() < 0.2 else next(iter(files))
            files[victim] = mutate(files[victim], rng)
            try:
                with memory_bounded(MEMORY_BYTES + MEMORY_FACTOR * sum(map(len, files.values()))):
                    accepted += check(files)
            except BaseException:
                print(f"{name}: input {number} of seed {seed} fails: {files!r}", file=sys.stderr)
                raise
    return accepted


@contextmanager
def memory_watched(on: bool) -> Iterator[None]:
    """Trace allocations while the block lasts."""
    if on:
        tracemalloc.start()
    try:
        yield
    finally:
        if on:
            tracemalloc.stop()


@contextmanager
def memory_bounded(byte_count: int) -> Iterator[None]:
    """Assert that the block allocates no more, if allocations are traced."""
    if not tracemalloc.is_tracing():
        yield
        return
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    yield
    grown = tracemalloc.get_traced_memory()[1] - before
    assert grown <= byte_count, f"{grown} bytes of memory, at most {byte_count}"


def report(kinds: Iterable[str], run: Callable[[str, int, int], int]) -> None:
    """Fuzz the kinds named on the command line, or all, and print what came of each.

    Arguments are the number of inputs, the seed, and names of kinds.
    """
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for name in sys.argv[3:] or kinds:
        begun = time.monotonic()
        accepted = run(name, count, seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{name}: {count} inputs, {accepted} accepted, the others refused with BadInput; "
            f"{time.monotonic() - begun:.0f} s, peak memory {peak} MiB, seed {seed}",
            flush=True,
        )


if __name__ == "__main__":
    report(SEEDS, fuzz)
