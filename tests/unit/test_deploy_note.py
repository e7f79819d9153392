"""deploy/note.py: what a container says becomes a line that the others can read."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import note

NOTE = Path(note.__file__)

NODE = """
import json, signal, sys
print(json.dumps({"peer_id": "12D3KooW", "addrs": []}), flush=True)
signal.sigwait({signal.SIGTERM}) if "--wait" in sys.argv else None
print("last words", flush=True)
sys.exit(3)
"""
BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"


def command(file: Path, line: str, *run: str) -> list[str]:
    return [sys.executable, str(NOTE), "--to", str(file), "--line", line, "--", *run]


def test_note_is_left_and_the_rest_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "bootstrap"
    done = subprocess.run(
        command(file, "/dns4/b/tcp/4001/p2p/{peer_id}", sys.executable, "-c", NODE),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert file.read_text() == "/dns4/b/tcp/4001/p2p/12D3KooW\n"
    assert done.stdout == '{"peer_id": "12D3KooW", "addrs": []}\nlast words\n'
    assert done.returncode == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bootstrap"]


def test_note_is_there_while_the_command_runs_and_signals_reach_it(tmp_path: Path) -> None:
    file = tmp_path / "bootstrap"
    node = [sys.executable, "-c", BLOCKED + NODE, "--wait"]
    with subprocess.Popen(command(file, "{peer_id}", *node), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"peer_id"')
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"last words\n"
        assert process.wait(timeout=60) == 3
    assert file.read_text() == "12D3KooW\n"


def test_old_note_is_gone_when_there_is_nothing_to_say(tmp_path: Path) -> None:
    file = tmp_path / "bootstrap"
    file.write_text("of an earlier run")
    done = subprocess.run(
        command(file, "{peer_id}", sys.executable, "-c", "print('no document')"),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == note.FAILED
    assert not file.exists()


@pytest.mark.parametrize(
    ("output", "document"),
    [
        (b'{"model": "b1"}\n', {"model": "b1"}),
        (b'{\n  "model": "b1"\n}\nmore\n', {"model": "b1"}),
        (b'{"model": "b1"}', {"model": "b1"}),
        (b"[1]\n", None),
        (b"", None),
        (b"{" * (note.MAX_DOCUMENT_BYTES + 1), None),
    ],
)
def test_document_is_the_first_json_object(
    output: bytes, document: dict[str, object] | None
) -> None:
    copy = io.BytesIO()
    assert note.read_document(io.BytesIO(output), copy) == document
    assert output.startswith(copy.getvalue())
