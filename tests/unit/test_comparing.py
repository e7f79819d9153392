"""diff and dedup: what models share, as numbers, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensorswarm.cli.main import main
from tests.support.store_world import random_bytes, write_safetensors

A, B, C = (random_bytes(1000, seed) for seed in range(3))


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    first = write_safetensors(
        tmp_path / "first.safetensors",
        {"same": ("U8", [1000], A), "old": ("U8", [1000], B), "mine": ("U8", [3], b"abc")},
    )
    second = write_safetensors(
        tmp_path / "second.safetensors",
        {
            "same": ("U8", [1000], A),
            "new": ("U8", [1000], B),
            "mine": ("U8", [3], b"xyz"),
            "more": ("U8", [1000], C),
        },
    )
    return str(first), str(second)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_diff(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, "diff", *models, "--store", str(tmp_path / "store"))
    assert document["same"] == ["same"]
    assert document["changed"] == ["mine"]
    assert document["renamed"] == ["old", "new"]
    assert document["only_b"] == ["more"]
    assert document["only_a"] == []
    assert document["shared_bytes"] == 2000
    assert (document["a_bytes"], document["b_bytes"]) == (2003, 3003)
    assert not document["equal_weights"]
    same = run(capsys, "diff", models[0], models[0], "--store", str(tmp_path / "store"))
    assert same["equal_weights"]
    assert same["shared_bytes"] == same["a_bytes"]


def test_dedup(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "store")]
    for model in models:
        run(capsys, "add", model, *store)
    for refs in (list(models), []):
        document = run(capsys, "dedup", *refs, *store)
        assert document["bytes_saved"] == 2000
        assert document["bytes_separate"] - document["bytes_together"] == 2000
        assert document["overlap"][0][1] == document["overlap"][1][0] == 2000
        assert len(document["models"]) == 2


@pytest.mark.parametrize("command", ["diff", "dedup"])
def test_tables_and_pictures(
    command: str,
    models: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = ["--store", str(tmp_path / "store")]
    picture = tmp_path / "picture.svg"
    assert main([command, *models, *store, "--plot", str(picture)]) == 0
    assert "2.0 KiB" in capsys.readouterr().out
    assert b"<svg" in picture.read_bytes()
    assert main([command, *models, *store, "--plot", str(tmp_path / "picture.txt")]) == 2
