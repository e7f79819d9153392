"""What a person sees: nothing that a stranger wrote can steer the terminal."""

from __future__ import annotations

import json

import pytest

from tensorswarm.cli.output import Output, printable

EVIL = "red \x1b[31m\x9b2J\rover\nnew \u202eback\x07"
SHOWN = r"red \x1b[31m\x9b2J\rover\nnew \u202eback\x07"


def test_plain_words_of_any_script_stay() -> None:
    for text in ("", "layer.0.weight", "n\u00e4me \u4e2d\u6587 \U0001f600", "a b"):
        assert printable(text) == text
    assert printable(EVIL) == SHOWN


def test_no_line_can_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False)
    output.say(EVIL)
    output.note(EVIL)
    output.error(EVIL, 2)
    output.table(["name", "size "], [[EVIL, "1"]])
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == SHOWN
    assert SHOWN in told.out.splitlines()[2]
    for text in (told.out, told.err):
        assert all(line.isprintable() for line in text.splitlines())
        assert "\x9b" not in text and "\x1b" not in text


def test_a_document_keeps_the_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"name": EVIL}, lambda: None)
    assert json.loads(capsys.readouterr().out) == {"name": EVIL}
