"""One source, one receiver, loopback: this project beside what a user would pick instead.

    python -m benchmarks.one_source [--mib 1024] [--rounds 5] [--cache warm,cold]
                                    [--only NAMES] [--json]

Contenders take turns in each round, each round in another order. Every receiver is a
fresh process that writes into an empty folder on the same disk. What is served is in the
page cache and the servers keep running (warm), or the server is started anew and what it
serves is taken out of the page cache (cold). Memory is kept warm for everyone (see
`warm_memory`), and everyone has one round that is not counted. "Done" means in files and,
where the contender verifies at all, verified; nobody waits for the disk's own cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import page_cache
from .contenders import CONTENDERS, Contender, Measurement, Tensorswarm
from .model import MIB, tensor_sizes, write_model
from .report import Target, at_least_one, document, emit, spread, table
from .warm_memory import warm_memory

WARM, COLD = "warm", "cold"

TARGETS = (
    ("libtorrent", 1.5, "issue 2"),
    ("curl from nginx", 0.8, "issue 2"),
    ("libtorrent", 2.5, "issue 3"),
    ("iroh 0.35", 10.0, "issue 3"),
    ("curl from nginx", 1.3, "issue 3"),
    ("cp", 1.0, "issue 3"),
)
"""Least ratio of our rate to a contender's, and who asked for it."""

Measured = dict[str, list[Measurement]]


def measure(contenders: Sequence[Contender], work: Path, rounds: int, cache: str) -> Measured:
    """Run all contenders in turn, and return what was measured.

    What is served is in the page cache and all servers keep running (warm), or each server
    is started anew and what it serves is then taken out of the page cache (cold).
    """
    measured: Measured = {contender.name: [] for contender in contenders}
    with ExitStack() as stack:
        for contender in contenders:
            contender.start()
            stack.callback(contender.stop)
        for number in range(-1, rounds):  # the first round is not counted
            turn = number % len(contenders)
            for contender in [*contenders[turn:], *contenders[:turn]]:
                if cache == COLD:
                    contender.stop()  # a file that is mapped would stay in the cache
                    contender.start()
                    page_cache.evict(contender.served)
                else:
                    page_cache.warm(contender.served)
                target = work / "target"
                target.mkdir()
                os.sync()
                one = contender.run(target)
                shutil.rmtree(target)
                if number >= 0:
                    measured[contender.name].append(one)
    return measured


def summary(measured: Measured, size_bytes: int) -> list[dict[str, Any]]:
    """Return one row per contender: rates with their spread, our rate as a ratio to its.

    Rates are in MB/s and CPU in seconds per GB, of 10^6 and 10^9 bytes.
    """
    gigabytes = size_bytes / 1e9
    rates = {
        name: spread([size_bytes / run.seconds / 1e6 for run in runs])
        for name, runs in measured.items()
    }
    own = rates.get(Tensorswarm.name)
    return [
        {
            "name": name,
            "mb_per_s": asdict(rates[name]),
            "ratio": own.median / rates[name].median if own else None,
            "cpu_receiver_s_per_gb": spread([r.cpu_receiver_s / gigabytes for r in runs]).median,
            "cpu_server_s_per_gb": spread([r.cpu_server_s / gigabytes for r in runs]).median,
            "memory_receiver": max(run.memory_receiver for run in runs),
            "memory_server": max(run.memory_server for run in runs),
        }
        for name, runs in measured.items()
    ]


def text_of(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """Return the rows as a table for people."""
    columns = ("", "MB/s", "lowest", "highest", "we are, x", "CPU s/GB: in", "out")
    cells = [
        (
            row["name"],
            *(row["mb_per_s"][key] for key in ("median", "lowest", "highest")),
            row["ratio"],
            row["cpu_receiver_s_per_gb"],
            row["cpu_server_s_per_gb"],
        )
        for row in rows
    ]
    return table(columns, cells, markdown=markdown)


def targets_of(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """Return what was asked for, of the contenders that took part."""
    ratios = {row["name"]: row["ratio"] for row in rows}
    return [
        Target(f"x {name} ({issue})", ratios[name], wanted)
        for name, wanted, issue in TARGETS
        if ratios.get(name)
    ]


def chosen(only: str | None, source: Path, work: Path) -> list[Contender]:
    """Return the contenders that can take part; a line on stderr says who cannot."""
    wanted = only.split(",") if only else None
    found = []
    for number, kind in enumerate(CONTENDERS):
        if wanted is not None and not any(kind.name.startswith(name) for name in wanted):
            continue
        lacking = kind.missing()
        if lacking:
            print(f"{kind.name} is left out: {lacking} is not installed", file=sys.stderr)
            continue
        folder = work / str(number)
        folder.mkdir()
        found.append(kind(source, folder))
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="one source, one receiver, on loopback")
    parser.add_argument("--mib", type=at_least_one, default=1024, help="size of the model in MiB")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds that are counted")
    parser.add_argument(
        "--cache", default=f"{WARM},{COLD}", help="state of the page cache: warm, cold, or both"
    )
    parser.add_argument("--only", help="names of contenders, or how they begin, by commas")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--markdown", action="store_true", help="tables for docs/benchmarks.md")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.caches = args.cache.split(",")
    if not set(args.caches) <= {WARM, COLD} or args.rounds < 1:
        parser.error("--cache takes warm, cold or warm,cold, and there is at least one round")
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        size_bytes = source.stat().st_size
        contenders = chosen(args.only, source, work)
        for contender in contenders:
            contender.prepare()
        with warm_memory(size_bytes):
            measured = {
                cache: measure(contenders, work, args.rounds, cache) for cache in args.caches
            }
    rows = {cache: summary(measured[cache], size_bytes) for cache in args.caches}
    text = "\n\n".join(
        f"{args.mib} MiB, {args.rounds} rounds, what is served is {cache}\n"
        + text_of(rows[cache], markdown=args.markdown)
        for cache in args.caches
    )
    targets = targets_of(rows[WARM]) if WARM in rows else []
    result = document("one_source", mib=args.mib, rounds=args.rounds, caches=rows)
    emit(result, text + _memory(rows[args.caches[0]]), targets, as_json=args.json)


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    for row in rows:
        if row["name"] == Tensorswarm.name:
            grown = [round(row[key] / MIB) for key in ("memory_receiver", "memory_server")]
            return "\n\nour memory grew by {} MiB fetching, {} MiB serving".format(*grown)
    return ""


if __name__ == "__main__":
    main()
