"""The command `sim`: run a scenario on a simulated network."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from tensorswarm.store.errors import BadInput, NoRoom

from .output import Output

FAILED = 1
"""Exit code of a run in which a checker saw a rule broken: a fault of ours."""


def simulate(args: argparse.Namespace, output: Output) -> int:
    """Run a scenario, or list them."""
    from tensorswarm.simulations import scenario

    if args.scenario == "list":
        return _list(output)
    chosen = scenario.find(args.scenario)
    settings = dict(_setting(text) for text in args.set)
    outcome = chosen.run(args.seed, settings, args.nodes)
    if args.out is not None:
        _write(outcome, args, output)
    document: dict[str, Any] = {**outcome.summary, "failures": outcome.failures}

    def text() -> None:
        known = {name: value for name, value in outcome.summary.items() if value is not None}
        width = max(map(len, known))
        for name, value in known.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            output.say(f"{name:<{width}}  {shown}")
        for rows in outcome.tables.values():
            if 0 < len(rows) <= 40:
                columns = [f"{column} " for column in rows[0]]
                cells = [[_cell(row.get(column)) for column in rows[0]] for row in rows]
                output.table(columns, cells)

    output.result(document, text)
    for failure in outcome.failures:
        output.note(f"broken rule: {failure}")
    if outcome.failures:
        output.note(f"this run again: {_command(args)}")
        return FAILED
    return 0


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _list(output: Output) -> int:
    from tensorswarm.simulations import scenario

    found = [scenario.find(name) for name in scenario.names()]
    document = {
        "scenarios": [
            {"name": each.name, "shows": each.headline, "parameters": each.defaults}
            for each in found
        ]
    }
    output.result(
        document,
        lambda: output.table(
            ["scenario", "what it shows"], [[each.name, each.headline] for each in found]
        ),
    )
    return 0


def _setting(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise BadInput(f"--set {text}: not of the form key=value")
    return name, value


def _write(outcome: Any, args: argparse.Namespace, output: Output) -> None:
    from tensorswarm.simulations import report

    try:
        files = report.write(outcome, args.out)
        try:
            files += report.draw(outcome.plots, args.out)
        except ImportError:
            output.note("no plots: they need matplotlib (pip install 'tensorswarm[sim]')")
    except OSError as error:
        kind = NoRoom if error.errno == 28 else BadInput
        raise kind(f"--out {args.out}: {error.strerror}") from error
    for path in files:
        output.note(f"wrote {path}")


def _command(args: argparse.Namespace) -> str:
    """Return the command line that replays a run."""
    words = ["tensorswarm", "sim", args.scenario, "--seed", str(args.seed)]
    if args.nodes is not None:
        words += ["--nodes", str(args.nodes)]
    for text in args.set:
        words += ["--set", text]
    return shlex.join(words)
