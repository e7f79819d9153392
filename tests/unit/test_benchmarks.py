"""The plain functions of the benchmarks: a wrong median would be believed for ever."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import Measurement
from benchmarks.one_source import summary, targets_of
from benchmarks.profile_one_source import parse_samples
from benchmarks.report import Target, at_least_one, document, emit, figure, spread, table
from tests.support.store_world import DEADLINE_S


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    result = spread([4.0, 1.0, 2.0, 30.0])
    assert (result.median, result.lowest, result.highest, result.runs) == (3.0, 1.0, 30.0, 4)
    assert result.relative == pytest.approx(29 / 3)


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        (0, "0"),
        (0.04123, "0.0412"),
        (1.499, "1.50"),
        (47.26, "47.3"),
        (1083.4, "1,080"),
        (9.999, "10.0"),
    ],
)
def test_figures_have_three_digits(value: float, printed: str) -> None:
    assert figure(value) == printed


def test_a_target_is_judged_before_it_is_rounded() -> None:
    assert not Target("x curl", 1.499, 1.5).reached
    assert Target("x curl", 1.5, 1.5).reached
    assert Target("s until planning starts", 1.9, 2, at_most=True).reached
    assert not Target("s until planning starts", 2.1, 2, at_most=True).reached
    assert str(Target("x curl", 0.56, 0.8)) == "0.56 x curl, wanted at least 0.8: NOT reached"


def test_a_table_lines_its_columns_up() -> None:
    rows = [("tensorswarm", 461.2, "a"), ("cp", None, 12)]
    assert table(("", "MB/s", "x"), rows).splitlines() == [
        "             MB/s   x",
        "tensorswarm   461   a",
        "cp              -  12",
    ]
    assert table(("", "MB/s", "x"), rows, markdown=True).splitlines()[1:] == [
        "|---|---|---|",
        "| tensorswarm | 461 | a |",
        "| cp | - | 12 |",
    ]


def test_the_document_is_one_line_of_json_with_date_and_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    emit(document("crowd", nodes=24), "text", [Target("x", 2.0, 1.0)], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {"benchmark", "date", "machine", "nodes", "targets"} == printed.keys()
    assert printed["targets"][0]["reached"] is True


def test_a_summary_gives_rates_ratios_and_cpu_per_gigabyte() -> None:
    measured = {
        "tensorswarm": [Measurement(s, 1.0, 0.5) for s in (2.0, 1.0, 4.0)],
        "libtorrent": [Measurement(s, 4.0, 2.0) for s in (3.0, 5.0, 4.0)],
    }
    own, other = summary(measured, 2_000_000_000)
    assert own["mb_per_s"] == {"median": 1000, "lowest": 500, "highest": 2000, "runs": 3}
    assert (own["ratio"], other["ratio"]) == (1.0, 2.0)
    assert (other["cpu_receiver_s_per_gb"], other["cpu_server_s_per_gb"]) == (2.0, 1.0)
    assert [(target.value, target.reached) for target in targets_of([own, other])] == [
        (2.0, True),
        (2.0, False),
    ]


def test_samples_are_counted_by_library_and_function() -> None:
    text = """
     77/78  ffffffff81a2b3c4 rep_movs_alternative+0x10 ([kernel.kallsyms])
     77/79  ffffffff81a2b3d4 rep_movs_alternative ([kernel.kallsyms])
     77/77  ffffffff81a2b3d4 rep_movs_alternative ([kernel.kallsyms])
     77/78      7f00deadbeef blake3_hash_many (/x/blake3/blake3.cpython-311-x86_64-linux-gnu.so)
     77/78      7f00deadbee0 [unknown] (/usr/lib/libcrypto.so.3)
    """
    assert parse_samples(text) == {
        ("kernel", "rep_movs_alternative"): 2,
        ("blake3", "blake3_hash_many"): 1,
        ("libcrypto", "[unknown]"): 1,
    }


def test_the_scale_benchmark_still_drives_a_fetch(tmp_path: Path) -> None:
    """Its made-up neighbour stands in for real ones, and has to know what they know."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", "3000", "--folder", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    figures = json.loads(done.stdout)
    assert all(figures[name] > 0 for name in ("start_s", "chunk_us", "memory_bytes"))


def test_less_than_one_of_anything_is_refused() -> None:
    assert at_least_one("3") == 3
    for text in ("0", "-4", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a whole number above 0"):
            at_least_one(text)
