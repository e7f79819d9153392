"""How the demo looks: numbered steps with their times, lines under them, tables."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence

INDENT = " " * 12
WIDTH = 90


def human_bytes(count: float) -> str:
    """Return a number of bytes as people write it, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Screen:
    """Prints the demo; counts its steps and its time."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._steps = 0
        self._in_line = False

    def seconds(self) -> float:
        """Return the time since the start, in seconds."""
        return time.monotonic() - self._begun

    def step(self, text: str) -> None:
        """Begin a step: say what happens, and why."""
        self._steps += 1
        self.line()
        lead = f"{self.seconds():6.1f} s  {self._steps}  "
        self._print(textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=INDENT))

    def line(self, text: str = "") -> None:
        """Print a line under the present step."""
        self._print(f"{INDENT}{text}".rstrip())

    def command(self, *words: object) -> None:
        """Show a command line that is run."""
        self.line("$ " + " ".join(map(str, words)))

    def more(self, text: str) -> None:
        """Go on in the same line, at once; the next other line ends it."""
        sys.stdout.write(text if self._in_line else INDENT + text)
        sys.stdout.flush()
        self._in_line = True

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; columns whose name ends in a blank are aligned to the right."""
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for cells in (columns, *rows):
            parts = [
                cell.strip().rjust(width) if column.endswith(" ") else cell.ljust(width)
                for column, cell, width in zip(columns, cells, widths, strict=True)
            ]
            self.line("  ".join(parts))

    def _print(self, text: str) -> None:
        if self._in_line:
            sys.stdout.write("\n")
            self._in_line = False
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
