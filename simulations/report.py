"""Writes what a run gave into a folder: JSON, CSV and plots.

Plots need matplotlib (``pip install tensorswarm[sim]``); without it the figures are
written all the same, and the caller is told what is missing.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from .scenario import Outcome, Plot, Row


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Write the summary and every table; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    summary.write_text(json.dumps(outcome.summary, indent=2) + "\n", encoding="utf-8")
    files = [summary]
    for name, rows in outcome.tables.items():
        files.append(folder / f"{name}.csv")
        _write_table(files[-1], rows)
    return files


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Draw the plots as PNG files; return them.

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for plot in plots:
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for curve in plot.curves:
            style = "--" if curve.is_dashed else "-"
            marker = "o" if len(curve.points) <= 20 and not curve.is_dashed else ""
            xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
            steps = "steps-post" if plot.is_stepped and not curve.is_dashed else "default"
            axes.plot(xs, ys, linestyle=style, drawstyle=steps, marker=marker, label=curve.label)
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        axes.set_xscale("log" if plot.is_log_x else "linear")
        highest = max((y for curve in plot.curves for _, y in curve.points), default=0.0)
        axes.set_ylim(0, 1.05 * highest if 0 < highest < math.inf else None)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        files.append(folder / f"{plot.name}.png")
        figure.savefig(files[-1], dpi=120)
    return files
