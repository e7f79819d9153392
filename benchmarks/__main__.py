"""Run one benchmark by name: ``python -m benchmarks [NAME] [ARGUMENTS]``, or ``--list``.

A benchmark is a module of this folder whose ``main()`` reads its own arguments, knows
``--json``, and prints through `report.emit`. To add one, write its name below.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

NAMES = (
    "one_source",
    "profile_one_source",
    "many_sources",
    "small_tensors",
    "long_wire",
    "crowd",
    "scale",
    "discovery",
    "adding",
    "adopted",
    "swarm",
)
"""The first is what runs without a name."""


def available() -> dict[str, str]:
    """Return the benchmarks that are there, each with the first line of its header."""
    found = {}
    for name in NAMES:
        path = Path(__file__).with_name(f"{name}.py")
        if path.exists():
            header = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[name] = header.partition("\n")[0]
    return found


def main() -> None:
    """Run the benchmark that the first argument names, with the arguments behind it."""
    arguments = sys.argv[1:]
    names = available()
    if arguments[:1] == ["--list"]:
        width = max(map(len, names)) + 2
        for name, line in names.items():
            print(f"{name:{width}}{line}")
        return
    name = NAMES[0]
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
    if name not in names:
        sys.exit(f"error: no benchmark is called {name!r}; there are: {', '.join(names)}")
    sys.argv = [f"scripts/bench {name}", *arguments]
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
