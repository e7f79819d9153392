"""Adding a model in place: how fast its bytes are hashed, beside BLAKE3 alone.

    python -m benchmarks.adding [--gb 4] [--rounds 5] [--folder DIR] [--json]

The model is one safetensors file of 64 tensors, sparse but for the first bytes of each, so
that no two are equal; it is read into the page cache, where reading it costs what reading
written bytes does. In each round, each in another order, fresh processes

- add it with ``--no-copy`` to an empty store: the whole of each tensor and each of its
  chunks are hashed, and the index is written and synced;
- read it and give it to BLAKE3, once, with one thread;
- do that with as many threads as there are processors, each with its part of the file.

Timed without the processes' start; a first round is not counted. That the second and third
hash each byte once, and we twice, is not taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blake3 import blake3

from . import page_cache
from .processes import memory_bytes, python, run_json
from .report import Spread, Target, at_least_one, document, emit, spread, table

TENSORS = 64
BLOCK_BYTES = 1 << 20

ADD, ONE_THREAD, ALL_THREADS = "add --no-copy", "BLAKE3, 1 thread", "BLAKE3, all threads"
NAMES = (ADD, ONE_THREAD, ALL_THREADS)

LEAST_SHARE = 0.8
"""Of BLAKE3's rate (issue 6)."""

MOST_MEMORY_MB = 200.0
"""Of the process that adds (issue 6)."""


def write_sparse_model(path: Path, size_bytes: int) -> None:
    """Write a safetensors file of equal tensors with nothing but their first bytes."""
    each = size_bytes // TENSORS
    entries = {
        f"layers.{number}.weight": {
            "dtype": "U8",
            "shape": [each],
            "data_offsets": [number * each, (number + 1) * each],
        }
        for number in range(TENSORS)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for number in range(TENSORS):
            file.seek(start + number * each)
            file.write((number + 1).to_bytes(8, "little"))
        file.truncate(start + TENSORS * each)


def add(path: Path) -> dict[str, float]:
    """Add a file in place to an empty store; seconds, and this process's most memory."""
    from tensorswarm.store.ingest import add_paths
    from tensorswarm.store.store import Store

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        begun = time.perf_counter()
        with Store(Path(folder)) as store:
            add_paths(store, [path], copy=False)
            store.sync()
            seconds = time.perf_counter() - begun
    return {"seconds": seconds, "memory_mb": memory_bytes(os.getpid(), "VmHWM") / 1e6}


def hash_alone(path: Path, threads: int) -> dict[str, float]:
    """Read a file and hash it, each thread a part of it."""
    size = path.stat().st_size
    part = -(-size // threads)
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(threads) as pool:
        parts = [(start, min(start + part, size)) for start in range(0, size, part)]
        list(pool.map(lambda each: _hash_part(file.fileno(), *each), parts))
    return {"seconds": time.perf_counter() - begun, "memory_mb": 0.0}


def _hash_part(descriptor: int, start: int, stop: int) -> bytes:
    hasher = blake3()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while start < stop:
        count = os.preadv(descriptor, [buffer[: min(BLOCK_BYTES, stop - start)]], start)
        if not count:
            raise OSError("the file ended early")
        hasher.update(buffer[:count])
        start += count
    return hasher.digest()


def run_one(name: str, path: Path) -> dict[str, float]:
    """Do one of the three in this process."""
    if name == ADD:
        return add(path)
    return hash_alone(path, 1 if name == ONE_THREAD else os.cpu_count() or 1)


def measure(path: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Return what each round of each of the three gave."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for number in range(-1, rounds):
        turn = number % len(NAMES)
        for name in (*NAMES[turn:], *NAMES[:turn]):
            page_cache.warm(path)
            one = run_json(python("benchmarks.adding", "--one", name, "--file", str(path)))
            if number >= 0:
                measured[name].append(one)
    return measured


def shares(rates: dict[str, list[float]], of: str) -> Spread:
    """Return the rate of adding as a share of another's, round by round."""
    return spread([own / other for own, other in zip(rates[ADD], rates[of], strict=True)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="hashing a model in place, beside BLAKE3 alone")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model in 10^9 bytes")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds that are counted")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.file)))
        return
    if args.rounds < 1 or args.gb <= 0:
        parser.error("there is at least one round, and the model has bytes")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write_sparse_model(path, int(args.gb * 1e9))
        size_gb = path.stat().st_size / 1e9
        measured = measure(path, args.rounds)
    rates = {name: [size_gb / run["seconds"] for run in runs] for name, runs in measured.items()}
    memory_mb = max(run["memory_mb"] for run in measured[ADD])
    found = {name: spread(values) for name, values in rates.items()}
    ratios = {name: shares(rates, name) for name in NAMES}
    rows = [
        (name, found[name].median, found[name].span, ratios[name].median, ratios[name].span)
        for name in NAMES
    ]
    targets = [
        *(Target(f"x {name}", ratios[name].median, LEAST_SHARE) for name in NAMES[1:]),
        Target("MB of memory while adding", memory_mb, MOST_MEMORY_MB, at_most=True),
    ]
    result = document(
        "adding",
        gb=args.gb,
        rounds=args.rounds,
        gb_per_s={name: asdict(each) for name, each in found.items()},
        add_as_share_of={name: asdict(each) for name, each in ratios.items()},
        memory_mb=memory_mb,
    )
    columns = (f"{args.gb:g} GB in {TENSORS} tensors", "GB/s", "from-to", "add is, x", "from-to")
    emit(result, table(columns, rows), targets, as_json=args.json)


if __name__ == "__main__":
    main()
