"""One source, one receiver, loopback: this project beside what a user would pick instead.

    python -m benchmarks.one_source [--mib 1024] [--rounds 5] [--json]

Contenders take turns in each round. Every receiver is a fresh process that writes
into an empty folder on the same disk; what earlier rounds left to write is put on
the disk first, untimed. "Done" means in files and, where the contender verifies at
all, verified; nobody waits for the disk's own cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from .contenders import Contender, Copy, Curl, Libtorrent, Measurement, Tensorswarm
from .model import MIB, tensor_sizes, write_model

TARGETS = {"libtorrent": 1.5, "curl from nginx": 0.8}
"""Least ratio of our rate to a contender's."""


def measure(contenders: list[Contender], work: Path, rounds: int) -> dict[str, list[Measurement]]:
    """Run all contenders in turn, `rounds` times, and return what was measured."""
    measured: dict[str, list[Measurement]] = {each.name: [] for each in contenders}
    for number in range(rounds):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            target = work / "target"
            target.mkdir()
            os.sync()
            measured[contender.name].append(contender.run(target))
            shutil.rmtree(target)
    return measured


def summary(measured: dict[str, list[Measurement]], size_bytes: int) -> list[dict[str, Any]]:
    """Return one row per contender: medians, and our rate as a ratio to its."""
    gigabytes = size_bytes / 1e9
    own = statistics.median(m.seconds for m in measured["tensorswarm"])
    rows = []
    for name, runs in measured.items():
        seconds = statistics.median(run.seconds for run in runs)
        receiver = statistics.median(run.cpu_receiver_s for run in runs) / gigabytes
        server = statistics.median(run.cpu_server_s for run in runs) / gigabytes
        rows.append(
            {
                "name": name,
                "mb_per_s": round(size_bytes / seconds / 1e6),
                "fastest": round(size_bytes / min(run.seconds for run in runs) / 1e6),
                "slowest": round(size_bytes / max(run.seconds for run in runs) / 1e6),
                "ratio": round(seconds / own, 2),
                "cpu_receiver_s_per_gb": round(receiver, 2),
                "cpu_server_s_per_gb": round(server, 2),
                "memory_receiver": max(run.memory_receiver for run in runs),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows for people."""
    print(f"{'':18}{'MB/s':>7}{'from-to':>14}{'we are':>9}{'CPU s/GB: in':>14}{'out':>7}")
    for row in rows:
        span = f"{row['slowest']}-{row['fastest']}"
        print(
            f"{row['name']:18}{row['mb_per_s']:>7}{span:>14}{row['ratio']:>8}x"
            f"{row['cpu_receiver_s_per_gb']:>14}{row['cpu_server_s_per_gb']:>7}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="one source, one receiver, on loopback")
    parser.add_argument("--mib", type=int, default=1024, help="size of the model in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        work.chmod(0o755)  # nginx serves as a user of its own
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        ours = Tensorswarm(source, work)
        contenders: list[Contender] = [
            ours,
            Libtorrent(source, work),
            Curl(source, work),
            Copy(source, work),
        ]
        try:
            for contender in contenders:
                contender.start()
            measured = measure(contenders, work, args.rounds)
        finally:
            for contender in contenders:
                contender.stop()
        rows = summary(measured, source.stat().st_size)
    document = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "mib": args.mib,
        "rounds": args.rounds,
        "contenders": rows,
        "memory_serving_node": ours.memory_server,
    }
    if args.json:
        print(json.dumps(document))
        return
    print(f"{args.mib} MiB, {args.rounds} rounds, medians; {document['machine']}\n")
    print_table(rows)
    receiver = next(row for row in rows if row["name"] == "tensorswarm")["memory_receiver"]
    print(
        f"\nmemory growth of our nodes: fetching {receiver / MIB:.0f} MiB, "
        f"serving {ours.memory_server / MIB:.0f} MiB"
    )
    for row in rows:
        target = TARGETS.get(row["name"])
        if target is not None:
            verdict = "reached" if row["ratio"] >= target else "NOT reached"
            print(f"{row['ratio']:.2f} x {row['name']}, wanted {target}: {verdict}")


if __name__ == "__main__":
    main()
