"""What every benchmark here prints: medians with their spread, tables, targets, one JSON shape.

Purpose: let a benchmark say what it measured in a few lines, and all of them the same way:

    rates = [...]                                   # MB/s, one per round
    targets = [Target("of the wire", spread(rates).median / wire, 0.9)]
    emit(
        document("long_wire", rounds=5, rate=asdict(spread(rates))),
        table(("rounds", "MB/s", "from-to"), [(5, spread(rates).median, spread(rates).span)]),
        targets,
        as_json=args.json,
    )

Rules
- With ``--json`` standard output has exactly one JSON document; `document` begins it with
  the benchmark's name, the date (UTC) and the machine. Otherwise a table for people.
- A target is printed with the figure reached, whether it was reached or not.

Not here: measuring (`processes`), and what a contender is (`contenders`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SIGNIFICANT_DIGITS = 3
"""Digits of a printed figure. More would be noise on every machine measured so far."""


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of one thing came to, in their own unit."""

    median: float
    lowest: float
    highest: float
    runs: int

    @property
    def span(self) -> str:
        """Lowest and highest, for a table."""
        return f"{figure(self.lowest)}-{figure(self.highest)}"

    @property
    def relative(self) -> float:
        """Highest minus lowest, as a fraction of the median."""
        return (self.highest - self.lowest) / self.median if self.median else 0.0


def at_least_one(text: str) -> int:
    """Read a number of things for argparse: at least one."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def spread(values: Sequence[float]) -> Spread:
    """Return median, lowest and highest of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Target:
    """A figure that was promised, and what it came to.

    Attributes
    ----------
    what : str
        What is measured, such as ``"x libtorrent"``; printed behind the figure.
    value : float
        The figure reached.
    wanted : float
        The figure promised.
    at_most : bool
        True when smaller is better; otherwise `value` has to be at least `wanted`.
    """

    what: str
    value: float
    wanted: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Tell whether the promise is kept, by the figure itself and not as printed."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        limit = "at most" if self.at_most else "at least"
        verdict = "reached" if self.reached else "NOT reached"
        return f"{figure(self.value)} {self.what}, wanted {limit} {self.wanted:g}: {verdict}"


def figure(value: float) -> str:
    """Return a number with three significant digits, thousands set apart by commas."""
    if not value:
        return "0"
    rounded = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if abs(rounded) >= 10 ** (SIGNIFICANT_DIGITS - 1):
        return f"{rounded:,.0f}"
    if abs(rounded) < 1:
        return f"{rounded:g}"
    whole_digits = len(str(int(abs(rounded))))
    return f"{rounded:,.{SIGNIFICANT_DIGITS - whole_digits}f}"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, markdown: bool = False
) -> str:
    """Return rows as aligned text: the first column to the left, figures to the right.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : sequence of sequences
        As many cells each as there are columns. Floats are printed by `figure`, None as a
        dash, everything else by `str`.
    markdown : bool, optional
        Draw it as a Markdown table, for docs/benchmarks.md.
    """
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return figure(value) if isinstance(value, float) else str(value)


def machine() -> str:
    """Return one line on this machine: what a figure may be compared on."""
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{_processor()}, {os.cpu_count()} CPUs, {memory_gib:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def document(benchmark: str, **fields: Any) -> dict[str, Any]:
    """Return the JSON document of one benchmark: name, date, machine, then its fields."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": now, "machine": machine(), **fields}


def emit(
    document: dict[str, Any], text: str, targets: Sequence[Target] = (), *, as_json: bool
) -> None:
    """Print a benchmark's result: the document with its targets, or the text for people."""
    if as_json:
        listed = [{**asdict(target), "reached": target.reached} for target in targets]
        print(json.dumps({**document, "targets": listed}))
        return
    print(f"{document['benchmark']}: {document['date']}, {document['machine']}\n")
    print(text)
    if targets:
        print()
    for target in targets:
        print(target)
