"""What a scenario is, how it is found, and what a run of it gives.

A scenario is a module with a docstring (its first line is what it shows), a mapping
`PARAMETERS` of names to default values, and a function::

    def run(parameters: Parameters, seed: int) -> Outcome: ...

The files in ``simulations/scenarios`` are found by name; a file of one's own is named by
its path. Everything random comes from the seed and everything timed from virtual time, so
that the same seed and parameters give the same outcome, byte for byte.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pkgutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from tensorswarm.store.errors import BadInput

from . import scenarios

Value: TypeAlias = int | float | str | bool
Row: TypeAlias = dict[str, object]

MAX_NODES = 2_000_000
"""Most nodes of one run: above it a table of nodes alone is gigabytes."""

MAX_INTEGER = MAX_NODES
"""Largest whole number: chunks and keys are counted like nodes."""

MAX_NODE_CHUNKS = 100_000_000
"""Most nodes times chunks in one swarm: above it a run takes a day."""

MAY_BE_ZERO = frozenset(
    {"ahead", "forgets", "latency_s", "passing", "random_first", "share", "shared", "start_s",
     "stays_s", "parts_at_s"}
)  # fmt: skip
"""Parameters of which 0 makes sense though it is not their default."""

COUNTS = ("nodes", "chunks")
"""Parameters that are whole numbers in any scenario: they are held against the bounds above."""

ALWAYS_REPORTED = (
    "nodes", "chunks", "optimum_s", "last_s", "ratio", "origin_copies", "wasted_bytes",
    "trace_digest",
)  # fmt: skip
"""Figures that every summary has, so that runs of any scenario fit one table; None where
a scenario knows no such thing."""


class Parameters(Mapping[str, Value]):
    """Values by name, read with the type that the scenario expects.

    Parameters
    ----------
    values : mapping of str to int, float, str or bool
        The defaults, with what the caller set.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        """Return a value as it was set."""
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of values."""
        return len(self._values)

    def integer(self, name: str) -> int:
        """Return a value as a whole number."""
        return int(self._values[name])

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a value as a number.

        Raises
        ------
        BadInput
            It is not from `least` to `most`.
        """
        value = float(self._values[name])
        if not least <= value <= most:
            wanted = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            raise BadInput(f"{name}: {wanted}")
        return value

    def flag(self, name: str) -> bool:
        """Return a value as a switch."""
        return bool(self._values[name])

    def text(self, name: str) -> str:
        """Return a value as text."""
        return str(self._values[name])

    def but(self, **changes: Value) -> Parameters:
        """Return the same with some values changed."""
        return Parameters({**self._values, **changes})


@dataclass(frozen=True)
class Curve:
    """One line of a plot: points (x, y), and what they are."""

    label: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot as data; `report` draws it.

    Attributes
    ----------
    name : str
        Name of the file, without ending.
    title, x_label, y_label : str
        Its words, units included.
    curves : sequence of Curve
        Its lines.
    is_log_x : bool
        Whether x is drawn in powers of ten.
    is_stepped : bool
        Whether y stays as it is until the next x: a count, not a quantity that grows.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    is_log_x: bool = False
    is_stepped: bool = False


@dataclass
class Outcome:
    """What one run gave.

    Attributes
    ----------
    summary : dict
        One row of figures; printed, and the JSON document of the command.
    tables : dict of str to list of dict
        Further rows by name; each becomes a CSV file.
    plots : list of Plot
        Become PNG files.
    failures : list of str
        Rules that the checkers saw broken. A run with any has failed.
    """

    summary: Row
    tables: dict[str, list[Row]] = field(default_factory=dict)
    plots: list[Plot] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scenario:
    """A scenario, found and checked; `path` is empty for those that come with the project."""

    name: str
    module: ModuleType
    path: str = ""

    @property
    def defaults(self) -> dict[str, Value]:
        """Its parameters and their default values."""
        return dict(self.module.PARAMETERS)

    @property
    def headline(self) -> str:
        """The first line of its docstring."""
        return (self.module.__doc__ or "").strip().splitlines()[0]

    def run(self, seed: int, settings: Mapping[str, str], nodes: int | None = None) -> Outcome:
        """Run it.

        Parameters
        ----------
        seed : int
            Replays the run.
        settings : mapping of str to str
            Values for some parameters, as text.
        nodes : int, optional
            Value for the parameter `nodes`.

        Raises
        ------
        BadInput
            No such parameter, or not a value for it; or a file of one's own failed.
        """
        values = self.defaults
        for name, text in settings.items():
            if name not in values:
                known = ", ".join(sorted(values))
                raise BadInput(f"scenario {self.name} has no parameter {name!r} (it has: {known})")
            values[name] = _read(name, text, values[name])
        if nodes is not None:
            if "nodes" not in values:
                raise BadInput(f"scenario {self.name} has no parameter nodes")
            values["nodes"] = nodes
        if not 0 < int(values.get("nodes", 1)) <= MAX_NODES:
            raise BadInput(f"nodes: from 1 to {MAX_NODES}")
        if int(values.get("nodes", 1)) * int(values.get("chunks", 1)) > MAX_NODE_CHUNKS:
            raise BadInput(f"nodes times chunks: at most {MAX_NODE_CHUNKS}")
        with _blaming(self.path):
            outcome: Outcome = self.module.run(Parameters(values), seed)
        if not isinstance(outcome, Outcome):
            raise BadInput(f"{self.path}: run() gave {type(outcome).__name__}, not an Outcome")
        with _blaming(self.path):
            figures = {name: _told(value) for name, value in outcome.summary.items()}
            json.dumps(figures, allow_nan=False)
        outcome.summary = {
            "scenario": self.name, "seed": seed, **dict.fromkeys(ALWAYS_REPORTED), **figures
        }  # fmt: skip
        return outcome


def _told(value: object) -> object:
    """Return a figure as JSON knows it: what never happened took no time that one can tell."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Name the line of a file of one's own where it fails; let the project's own faults pass."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if not path:
            raise
        if isinstance(error, SyntaxError):
            line, told = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((each.lineno for each in reversed(frames) if each.filename == path), None)
            told = str(error)
        where = path if line is None else f"{path}, line {line}"
        raise BadInput(f"{where}: {type(error).__name__}: {told}") from error


def _read(name: str, text: str, default: Value) -> Value:
    """Read a value in the type of its default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = type(default)(text)
    except (ValueError, KeyError):
        kind = type(default).__name__
        raise BadInput(f"{name}: {text!r} is not of the type {kind}") from None
    if isinstance(value, float) and not abs(value) < 1e18:
        raise BadInput(f"{name}: {text!r} is not a finite number")
    if isinstance(value, int | float) and value < 0:
        raise BadInput(f"{name}: {text!r} is negative")
    if not value and default and name not in MAY_BE_ZERO:
        raise BadInput(f"{name}: it cannot be 0")
    if isinstance(value, int) and not isinstance(value, bool) and value > MAX_INTEGER:
        raise BadInput(f"{name}: at most {MAX_INTEGER}")
    return value


def names() -> list[str]:
    """Return the names of the scenarios that come with the project."""
    return sorted(
        info.name
        for info in pkgutil.iter_modules(scenarios.__path__)
        if not info.name.startswith("_")
    )


def find(name: str) -> Scenario:
    """Return a scenario by its name, or by the path of its file.

    Raises
    ------
    BadInput
        There is none, or the file is none.
    """
    path = ""
    if name in names():
        module = importlib.import_module(f"{scenarios.__name__}.{name}")
    elif name.endswith(".py") and Path(name).is_file():
        # As a member of the package: so a copy's relative imports go on to work.
        spec = importlib.util.spec_from_file_location(f"{scenarios.__name__}._own", name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses look their own module up there
        path = name
        with _blaming(path):
            spec.loader.exec_module(module)
    else:
        raise BadInput(f"no scenario {name!r} (see `tensorswarm sim list`)")
    parameters = getattr(module, "PARAMETERS", None)
    is_whole = (module.__doc__ or "").strip() and callable(getattr(module, "run", None))
    if not is_whole or not isinstance(parameters, Mapping):
        raise BadInput(f"{name} is no scenario: it needs a docstring, PARAMETERS and run()")
    for each, default in parameters.items():
        is_count = isinstance(default, int) or each not in COUNTS
        if not (isinstance(each, str) and isinstance(default, Value) and is_count):
            kind = type(default).__name__
            raise BadInput(f"{name}: PARAMETERS: {each!r} cannot be of the type {kind}")
    return Scenario(Path(name).stem, module, path)
