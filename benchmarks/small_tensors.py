"""Many small tensors beside one large one of the same size, in one run.

    python -m benchmarks.small_tensors [--tensors 20000] [--kib 4] [--rounds 5] [--json]

Both models are served by nodes of their own and fetched in turn, each by a fresh
process into an empty store. The clock runs from the wish for a model id to the last
tensor verified and in the store's index: finding the manifest, asking who holds what,
planning, bytes, verification, index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from .contenders import Measurement, Tensorswarm
from .model import write_model
from .report import Target, at_least_one, document, emit, spread, table

WANTED_RATIO = 1 / 3
"""Least rate of the small tensors, as a part of the single tensor's."""

ONE, MANY = "one tensor", "many tensors"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="many small tensors beside one large one")
    parser.add_argument("--tensors", type=at_least_one, default=20_000)
    parser.add_argument("--kib", type=at_least_one, default=4, help="size of a small tensor in KiB")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    size_bytes = args.tensors * args.kib << 10
    shapes = {
        ONE: [("weight", size_bytes)],
        MANY: [(f"layers.{i}.weight", args.kib << 10) for i in range(args.tensors)],
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        runs = measure(shapes, Path(name), args.rounds)
    seconds = {kind: spread([run.seconds for run in each]) for kind, each in runs.items()}
    ratio = seconds[ONE].median / seconds[MANY].median
    emit(
        document(
            "small_tensors",
            tensors=args.tensors,
            bytes=size_bytes,
            rounds=args.rounds,
            seconds={kind: asdict(each) for kind, each in seconds.items()},
            ratio=ratio,
        ),
        table(
            ("", "seconds", "from-to", "MB/s", "CPU s: in", "out"),
            [
                (
                    kind,
                    each.median,
                    each.span,
                    size_bytes / each.median / 1e6,
                    spread([run.cpu_receiver_s for run in runs[kind]]).median,
                    spread([run.cpu_server_s for run in runs[kind]]).median,
                )
                for kind, each in seconds.items()
            ],
        ),
        [Target("of one tensor's rate", ratio, WANTED_RATIO)],
        as_json=args.json,
    )


def measure(
    shapes: dict[str, list[tuple[str, int]]], work: Path, rounds: int
) -> dict[str, list[Measurement]]:
    """Return what each round came to, by kind of model; one round more goes before."""
    contenders = {}
    for number, (kind, sizes) in enumerate(shapes.items()):
        folder = work / str(number)
        folder.mkdir()
        write_model(folder / "model.safetensors", sizes, seed=number)
        contenders[kind] = Tensorswarm(folder / "model.safetensors", folder)
        contenders[kind].prepare()
    runs: dict[str, list[Measurement]] = {kind: [] for kind in contenders}
    try:
        for contender in contenders.values():
            contender.start()
        for number in range(-1, rounds):
            for kind, contender in contenders.items():
                target = work / "target"
                target.mkdir()
                os.sync()
                one = contender.run(target)
                shutil.rmtree(target)
                if number >= 0:
                    runs[kind].append(one)
    finally:
        for contender in contenders.values():
            contender.stop()
    return runs


if __name__ == "__main__":
    main()
