"""The scenario framework and its command: parameters, files, exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tensorswarm.cli.main import main
from tensorswarm.simulations import report, scenario
from tensorswarm.store.errors import BadInput

OWN = '''"""A scenario of one's own.

More words.
"""
import random
from tensorswarm.simulations.scenario import Curve, Outcome, Plot
PARAMETERS = {"nodes": 3, "share": 0.5, "shared": True, "rule": "rarest"}
def run(parameters, seed):
    rng = random.Random(seed)
    summary = {"nodes": parameters.integer("nodes"), "draw": rng.random(),
               "share": parameters.number("share"), "shared": parameters.flag("shared"),
               "rule": parameters.text("rule")}
    plot = Plot("line", "t", "x", "y", [Curve("a", [(0, 1), (1, 2)])])
    failures = ["nodes must not be 13"] if summary["nodes"] == 13 else []
    return Outcome(summary, {"rows": [{"a": 1}, {"b": 2}]}, [plot], failures)
'''

OUTCOME = """
from tensorswarm.simulations.scenario import Outcome
PARAMETERS = {}
def run(p, s):
    return """

WITH_A_CLASS = """'Copied.'
from __future__ import annotations
from dataclasses import dataclass
from ..scenario import Outcome
from .liars import SWEEP
PARAMETERS = {}
@dataclass
class Figures:
    share: float
def run(p, s):
    return Outcome({"share": Figures(SWEEP[1]).share})
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def test_values_are_read_in_the_type_of_their_default(own: str) -> None:
    found = scenario.find(own)
    assert found.headline == "A scenario of one's own."
    summary = found.run(7, {"share": "0.25", "shared": "false", "rule": "random"}, 5).summary
    assert summary["nodes"] == 5
    assert (summary["share"], summary["shared"], summary["rule"]) == (0.25, False, "random")
    assert (summary["scenario"], summary["seed"]) == ("own", 7)
    assert found.run(7, {}).summary["draw"] == summary["draw"]


@pytest.mark.parametrize(
    "settings",
    [{"gone": "1"}, {"share": "much"}, {"share": "nan"}, {"shared": "perhaps"}, {"nodes": "0"}],
)
def test_a_wrong_setting_is_named(own: str, settings: dict[str, str]) -> None:
    with pytest.raises(BadInput, match=next(iter(settings))):
        scenario.find(own).run(1, settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (", "own.py, line 1: SyntaxError"),
        ("import no_such_module", "own.py, line 1: ModuleNotFoundError"),
        ("'A docstring.'", "needs a docstring, PARAMETERS and run"),
        ("'A docstring.'\nPARAMETERS = 3\ndef run(p, s): ...", "needs a docstring, PARAMETERS"),
        ("'Fails.'\nPARAMETERS = {}\ndef run(p, s):\n    1 / 0", "line 4: ZeroDivisionError"),
        ("'Deep.'\nPARAMETERS = {}\ndef run(p, s):\n    p.integer('a')", "line 4: KeyError: 'a'"),
        ("'None.'\nPARAMETERS = {}\ndef run(p, s): ...", "gave NoneType, not an Outcome"),
        ("'Type.'\nPARAMETERS = {'a': None}\ndef run(p, s): ...", "'a' cannot be of the type None"),
        ("'Type.'\nPARAMETERS = {'chunks': 'a'}\ndef run(p, s): ...", "'chunks' cannot be of"),
        (f"'Sum.'{OUTCOME}Outcome(3)", "AttributeError"),
        (f"'Sum.'{OUTCOME}Outcome({{'a': object()}})", "TypeError: Object of type object"),
    ],
)
def test_a_file_that_fails_is_blamed_in_one_line_and_exit_2(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(text)
    assert main(["sim", str(tmp_path / "own.py")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_every_scenario_of_the_project_is_found_and_documented() -> None:
    for name in scenario.names():
        found = scenario.find(name)
        assert found.headline.endswith("."), name
        assert found.defaults, name


def test_the_command_prints_one_document_and_writes_the_files(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["sim", own, "--nodes", "4", "--seed", "2", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["nodes"] == 4
    assert json.loads((out / "summary.json").read_text()).items() <= document.items()
    assert list(csv.DictReader((out / "rows.csv").open())) == [
        {"a": "1", "b": ""},
        {"a": "", "b": "2"},
    ]
    assert (out / "line.png").read_bytes().startswith(b"\x89PNG")


def test_every_summary_has_the_same_first_figures(own: str) -> None:
    for name, parameters in ((own, {}), ("kademlia", {"nodes": "50", "lookups": "5"})):
        summary = scenario.find(name).run(1, parameters).summary
        assert set(scenario.ALWAYS_REPORTED) < set(summary)
        assert summary["ratio"] is None


def test_a_failed_run_prints_the_command_that_replays_it(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sim", own, "--nodes", "13", "--seed", "5", "--set", "share=0.1"]) == 1
    told = capsys.readouterr().err
    assert "nodes must not be 13" in told
    assert f"tensorswarm sim {own} --seed 5 --nodes 13 --set share=0.1" in told


def test_wrong_usage_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim", "no-such-scenario"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["sim", "list", "--json"]) == 0


def test_a_copy_of_a_scenario_imports_as_the_original_did(tmp_path: Path) -> None:
    (tmp_path / "copied.py").write_text(WITH_A_CLASS)
    assert scenario.find(str(tmp_path / "copied.py")).run(1, {}).summary["share"] == 0.1


def test_what_is_no_number_is_null_in_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(f"'Never.'{OUTCOME}Outcome({{'last_s': float('inf'), 'ratio': float('nan')}})")
    assert main(["sim", str(own), "--json", "--out", str(tmp_path)]) == 0
    for text in (capsys.readouterr().out, (tmp_path / "summary.json").read_text()):
        document = json.loads(text, parse_constant=pytest.fail)
        assert (document["last_s"], document["ratio"]) == (None, None)


def test_a_plot_has_room_above_its_highest_point(tmp_path: Path) -> None:
    for points in ([(0, 1.0), (1, 1.0)], [(0, 0.0)], [(0, float("inf"))], []):
        plot = scenario.Plot("p", "t", "x", "y", [scenario.Curve("a", points)], is_stepped=True)
        assert report.draw([plot], tmp_path)[0].read_bytes().startswith(b"\x89PNG")
