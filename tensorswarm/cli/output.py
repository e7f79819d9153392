"""What a person or a program sees: JSON, tables, notes and progress bars.

Names of tensors, files and programs come from strangers, and some could steer a terminal.
What is printed for people shows control and direction marks as escapes (`printable`);
JSON has escaped them anyway.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

REFRESH_PER_S = 5.0
"""How often a progress bar is drawn."""


def human_bytes(count: float) -> str:
    """Return a number of bytes as people write it, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def count_of(number: int, noun: str) -> str:
    """Return a number of things as people write it: ``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def human_rate(byte_count: float, seconds: float) -> str:
    """Return a rate as people write it; a dash when nothing was moved."""
    if byte_count <= 0 or seconds <= 0:
        return "-"
    return f"{human_bytes(byte_count / seconds)}/s"


def printable(text: str) -> str:
    """Return a text with everything that is no visible character written as an escape."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


class Output:
    """Where a command's words go.

    Parameters
    ----------
    as_json : bool
        Whether standard output is one JSON document.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, document: dict[str, Any], text: Callable[[], None]) -> None:
        """Give a command's result: the document, or what `text` prints for people."""
        if self.as_json:
            print(json.dumps(document), flush=True)
        else:
            text()

    def say(self, line: str = "") -> None:
        """Print a line of the result for people."""
        print(printable(line), flush=True)

    def note(self, line: str) -> None:
        """Print a line beside the result, on standard error."""
        print(printable(f"tensorswarm: {line}"), file=sys.stderr, flush=True)

    def error(self, line: str, exit_code: int) -> None:
        """Report why a command failed, in one line."""
        line = " ".join(line.split())
        if self.as_json:
            print(json.dumps({"error": line, "exit_code": exit_code}), flush=True)
        print(printable(f"tensorswarm: error: {line}"), file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; columns whose name ends in a blank are aligned to the right."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            right = column.endswith(" ")
            table.add_column(column.strip(), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        console = Console(highlight=False, soft_wrap=False, markup=False)
        if not console.is_terminal:
            # Whoever reads a pipe wants whole lines.
            console = Console(highlight=False, markup=False, width=10_000)
        console.print(table)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Show a progress bar on standard error while a person waits there.

        Yields
        ------
        callable
            Takes the bytes done and the bytes in all.
        """
        if not sys.stderr.isatty():
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(
            *columns, console=console, transient=True, refresh_per_second=REFRESH_PER_S
        ) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)
