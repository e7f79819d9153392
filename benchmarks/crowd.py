"""A crowd that fetches at once from one node: nobody refused, nobody starved.

Each node of the crowd is a real process. All of them start, say that they are ready, and
begin at the same word; each measures from the word to its last verified byte. They find
each other, as nodes do, and give each other what they have got.

    scripts/bench crowd [--nodes 24] [--mib 64] [--upload-limit RATE] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from .model import tensor_sizes, write_model
from .processes import ROOT, cpu_seconds, python, read_line
from .report import Target, at_least_one, document, emit, spread, table
from .seeds import Seed, start_seed

START_TIMEOUT_S = 120.0
"""Seconds for all processes to import libp2p, on few processors."""

FETCH_TIMEOUT_S = 300.0

WANTED_LEAST = 0.5
"""What the slowest must have of the mean rate."""


def receive(store: str, model: str, address: str) -> None:
    """Be one node of the crowd: wait for the word, fetch, and tell how it went."""
    import trio

    from tensorswarm.p2p.node import Node

    async def main() -> None:
        async with Node(Path(store), bootstrap=[address], server=False) as node:
            print("ready", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            begun = time.perf_counter()
            result = await node.fetch(model)
            told = {
                "seconds": time.perf_counter() - begun,
                "bytes": result.bytes_total,
                "dropped": sum(source.dropped for source in result.sources),
                "from": {source.id: source.bytes for source in result.sources},
            }
            print(json.dumps(told), flush=True)
            # Stay until everybody is through, as a node would.
            await trio.to_thread.run_sync(sys.stdin.readline)

    trio.run(main)


def run_crowd(work: Path, seed: Seed, nodes: int) -> tuple[list[dict[str, Any]], int]:
    """Let a crowd fetch; return what each told, and the number of those that failed."""
    crowd = [_start(work / f"node-{number}", seed) for number in range(nodes)]
    told: list[dict[str, Any]] = []
    failed = 0
    try:
        for process in crowd:
            read_line(_pipe(process.stdout), START_TIMEOUT_S)
        for process in crowd:
            _say(process, "go")
        for process in crowd:
            try:
                told.append(json.loads(read_line(_pipe(process.stdout), FETCH_TIMEOUT_S)))
            except (RuntimeError, TimeoutError):
                failed += 1
    finally:
        for process in crowd:
            process.kill()
            process.wait()
        for number in range(nodes):
            shutil.rmtree(work / f"node-{number}", ignore_errors=True)
    return told, failed


def _start(store: Path, seed: Seed) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        python("benchmarks.crowd", "--receive", str(store), seed.model, seed.address),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _say(process: subprocess.Popen[bytes], word: str) -> None:
    stream = _pipe(process.stdin)
    stream.write(f"{word}\n".encode())
    stream.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="a crowd fetches at once from one node")
    parser.add_argument("--nodes", type=at_least_one, default=24)
    parser.add_argument("--mib", type=at_least_one, default=64, help="size of the model in MiB")
    parser.add_argument("--upload-limit", metavar="RATE", help="of the one node (default: none)")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--receive", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.receive:
        receive(*args.receive)
        return
    limit = ("--upload-limit", args.upload_limit) if args.upload_limit else ()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        seed = start_seed(source, work / "seed", *limit)
        try:
            rounds = [run_crowd(work, seed, args.nodes) for _ in range(args.rounds)]
            seed_cpu_s = cpu_seconds(seed.server.pid)
        finally:
            seed.server.stop()
    _report(args, seed, rounds, seed_cpu_s)


def _report(
    args: argparse.Namespace,
    seed: Seed,
    rounds: list[tuple[list[dict[str, Any]], int]],
    seed_cpu_s: float,
) -> None:
    failed = sum(count for _, count in rounds)
    rows: list[tuple[object, ...]] = []
    least, means, copies = [], [], []
    for number, (told, count) in enumerate(rounds, 1):
        if not told:
            rows.append((str(number), count, None, None, None, None, None))
            continue
        rates = [one["bytes"] / one["seconds"] / 1e6 for one in told]
        mean = statistics.mean(rates)
        given = sum(one["from"].get(seed.peer_id, 0) for one in told) / told[0]["bytes"]
        rows.append((str(number), count, mean, min(rates), max(rates), min(rates) / mean, given))
        means.append(mean)
        least.append(min(rates) / mean)
        copies.append(given)
    emit(
        document(
            "crowd",
            nodes=args.nodes,
            processes=args.nodes + 1,
            mib=args.mib,
            upload_limit=args.upload_limit,
            rounds=args.rounds,
            failed=failed,
            mean_mb_per_s=asdict(spread(means)) if means else None,
            slowest_to_mean=asdict(spread(least)) if least else None,
            copies_from_the_one=asdict(spread(copies)) if copies else None,
            cpu_of_the_one_s=round(seed_cpu_s, 2),
        ),
        table(
            ("round", "failed", "mean MB/s", "slowest", "fastest", "slowest/mean", "copies given"),
            rows,
        ),
        [
            Target("nodes failed", failed, 0, at_most=True),
            Target(
                "of the mean is the slowest's", spread(least).median if least else 0.0, WANTED_LEAST
            ),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
