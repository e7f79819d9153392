"""Several peers of unequal rates at once, and what part of their sum a fetch gets.

Every peer is a real node process on the loopback interface, slowed by its own
``--upload-limit``; the fetch is the command line's. The seconds are those that ``fetch``
tells: from the running node to the last verified byte, so they hold finding the peers,
the manifest and the chunk lists too. Beside all peers together, the fastest is measured
alone, which all together must never fall behind.

    scripts/bench many_sources [--mib 256] [--rates 2 4 8 16] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .model import tensor_sizes, write_model
from .processes import python, run_json
from .report import Target, at_least_one, document, emit, spread, table
from .seeds import Seed, start_seed

WANTED_SHARE = 0.95
"""Part of the sum of the rates that must be reached."""


def fetch(work: Path, seeds: Sequence[Seed]) -> dict[str, Any]:
    """Fetch into an empty store; return what the command tells."""
    store = work / "fetched"
    where = [part for seed in seeds for part in ("--bootstrap", seed.address)]
    command = ("tensorswarm", "fetch", seeds[0].model, "--store", str(store), "--json")
    try:
        return run_json(python(*command, *where))
    finally:
        shutil.rmtree(store, ignore_errors=True)


def measure(
    work: Path, seeds: Sequence[Seed], rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return, for each round, the result with all peers and that with the last alone."""
    together, alone = [], []
    for _ in range(rounds):
        together.append(fetch(work, seeds))
        alone.append(fetch(work, seeds[-1:]))
    return together, alone


def rate_of(result: dict[str, Any]) -> float:
    """Return the MB/s of a fetch."""
    return float(result["bytes_total"] / result["seconds"] / 1e6)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="several peers of unequal rates")
    parser.add_argument("--mib", type=at_least_one, default=256, help="size of the model in MiB")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2, 4, 8, 16], help="of the peers, in MB/s"
    )
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rates = sorted(args.rates)
    with tempfile.TemporaryDirectory(dir=args.folder) as name, ExitStack() as stack:
        work = Path(name)
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        seeds = []
        for number, rate in enumerate(rates):
            seed = start_seed(source, work / f"peer-{number}", "--upload-limit", f"{rate}MB/s")
            stack.callback(seed.server.stop)
            seeds.append(seed)
        together, alone = measure(work, seeds, args.rounds)
    _report(args, rates, seeds, together, alone)


def _report(
    args: argparse.Namespace,
    rates: list[float],
    seeds: Sequence[Seed],
    together: list[dict[str, Any]],
    alone: list[dict[str, Any]],
) -> None:
    total = sum(rates)
    all_rates, alone_rates = spread([*map(rate_of, together)]), spread([*map(rate_of, alone)])
    rows: list[tuple[object, ...]] = [
        ("all peers", total, all_rates.median, all_rates.span, all_rates.median / total),
        ("fastest alone", rates[-1], alone_rates.median, alone_rates.span,
         alone_rates.median / rates[-1]),
    ]  # fmt: skip
    for rate, seed in zip(rates, seeds, strict=True):
        given = spread(
            [
                sum(s["bytes"] for s in result["sources"] if s["id"] == seed.peer_id)
                / result["seconds"]
                / 1e6
                for result in together
            ]
        )
        rows.append((f"  of it from {rate:g} MB/s", rate, given.median, given.span,
                     given.median / rate))  # fmt: skip
    wasted = spread([result["bytes_wasted"] / result["bytes_total"] for result in together])
    emit(
        document(
            "many_sources",
            mib=args.mib,
            rounds=args.rounds,
            rates_mb_per_s=rates,
            together=asdict(all_rates),
            fastest_alone=asdict(alone_rates),
            wasted_share=asdict(wasted),
        ),
        table(("", "limit MB/s", "MB/s", "from-to", "share"), rows)
        + f"\n\nreceived in vain: {wasted.median:.2%} of the bytes",
        [
            Target("of the sum of the rates", all_rates.median / total, WANTED_SHARE),
            Target("x the fastest alone", all_rates.median / alone_rates.median, 1.0),
        ],
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
