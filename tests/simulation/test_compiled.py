"""The compiled copy of the simulator does, event by event, what the Python it is made from does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import require_module, require_tool

ROOT = Path(__file__).resolve().parents[2]

RUNS = (
    ("broadcast", "--nodes", "12", "--set", "chunks=24", "--seed", "5"),
    ("churn", "--nodes", "12", "--set", "chunks=24", "--seed", "5"),
    ("liars", "--nodes", "12", "--set", "chunks=24", "--seed", "5"),
)
"""A plain swarm, one whose nodes come and go, and one whose bytes are not what they should be."""

WHERE = "import tensorswarm.simulations.peer as s, tensorswarm.p2p.swarm.planner as p;" + (
    "print(s.__file__, p.__file__)"
)


def output_of(package: Path, *arguments: str) -> str:
    """Return what Python prints when it finds the package in a folder."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={**os.environ, "PYTHONPATH": str(package)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    require_tool("cc")
    require_module("mypyc")
    copy = tmp_path / "compiled"
    subprocess.run(
        [ROOT / "scripts" / "_compile", sys.executable, copy],
        env={**os.environ, "MYPYC_OPT_LEVEL": "0"},  # the quickest to compile
        check=True,
    )
    made_of = output_of(copy, "-c", WHERE).split()
    assert all(each.startswith(str(copy)) and each.endswith((".so", ".pyd")) for each in made_of)
    assert not any(each.endswith(".so") for each in output_of(ROOT, "-c", WHERE).split())
    for run in RUNS:
        arguments = ("-m", "tensorswarm", "sim", *run, "--json")
        compiled = output_of(copy, *arguments)
        assert '"trace_digest": "' in compiled
        assert compiled == output_of(ROOT, *arguments)
