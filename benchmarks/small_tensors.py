"""Many small tensors beside one large one of the same size, in one run.

    python -m benchmarks.small_tensors [--tensors 20000] [--kib 4] [--rounds 5] [--json]

Both models are served by nodes of their own and fetched in turn, each by a fresh
process into an empty store. The clock runs from the wish for a model id to the last
tensor verified and in the store's index: finding the manifest, asking who holds what,
planning, bytes, verification, index.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

from .contenders import Measurement, Tensorswarm
from .model import write_model
from .one_source import measure

WANTED_RATIO = 1 / 3
"""Least rate of the small tensors, as a part of the single tensor's."""

ONE, MANY = "one tensor", "many tensors"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="many small tensors beside one large one")
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--kib", type=int, default=4, help="size of a small tensor in KiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    size_bytes = args.tensors * args.kib << 10
    shapes = {
        ONE: [("weight", size_bytes)],
        MANY: [(f"layers.{i}.weight", args.kib << 10) for i in range(args.tensors)],
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        contenders = []
        for number, (kind, sizes) in enumerate(shapes.items()):
            work = Path(name) / str(number)
            source = work / "model.safetensors"
            work.mkdir()
            write_model(source, sizes, seed=number)
            contender = Tensorswarm(source, work)
            contender.name = kind
            contenders.append(contender)
        try:
            for contender in contenders:
                contender.start()
            measured = measure(list(contenders), Path(name), args.rounds)
        finally:
            for contender in contenders:
                contender.stop()
    document = _document(measured, size_bytes, args.tensors, args.rounds)
    if args.json:
        print(json.dumps(document))
        return
    print(f"{args.tensors} x {args.kib} KiB, {args.rounds} rounds, {document['machine']}\n")
    print(f"{'':14}{'seconds':>9}{'MB/s':>7}{'CPU s: in':>11}{'out':>7}")
    for kind, row in document["kinds"].items():
        print(
            f"{kind:14}{row['seconds']:>9.3f}{row['mb_per_s']:>7.0f}"
            f"{row['cpu_receiver_s']:>11.2f}{row['cpu_server_s']:>7.2f}"
        )
    verdict = "reached" if document["ratio"] >= WANTED_RATIO else "NOT reached"
    print(f"\nratio {document['ratio']:.2f}, wanted {WANTED_RATIO:.2f}: {verdict}")


def _document(
    measured: dict[str, list[Measurement]], size_bytes: int, tensors: int, rounds: int
) -> dict[str, object]:
    """Return the medians, and the ratio of the two rates."""

    def median(kind: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in measured[kind])

    kinds = {
        kind: {
            "seconds": round(median(kind, "seconds"), 3),
            "mb_per_s": round(size_bytes / median(kind, "seconds") / 1e6, 1),
            "cpu_receiver_s": round(median(kind, "cpu_receiver_s"), 2),
            "cpu_server_s": round(median(kind, "cpu_server_s"), 2),
        }
        for kind in measured
    }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "tensors": tensors,
        "bytes": size_bytes,
        "rounds": rounds,
        "kinds": kinds,
        "ratio": round(median(ONE, "seconds") / median(MANY, "seconds"), 3),
    }


if __name__ == "__main__":
    main()
