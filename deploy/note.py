"""Run a command, and leave a line made from the JSON document it prints for others to read.

    python note.py --to FILE --line TEMPLATE -- COMMAND [ARGUMENT]...

In `docker-compose.yml` the containers learn two things from each other this way: the
bootstrap node's address, which holds a peer id that nobody knows before it runs, and the
id of the model that the seeder added. FILE lies on a volume that they share.

Rules
- TEMPLATE is filled from the document's fields: ``/dns4/node/tcp/4001/p2p/{peer_id}``.
- FILE is gone while there is nothing to say, and appears in one piece.
- All of the command's output is passed on. SIGTERM and SIGINT go to the command, and
  its exit status is ours.

Standard library only, so that it runs in any Python image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

MAX_DOCUMENT_BYTES = 1 << 20
"""The documents have a few hundred bytes; whatever prints more is not what we wait for."""

FAILED = 1
"""Exit status when the command printed no usable document."""


def read_document(stream: IO[bytes], copy_to: IO[bytes]) -> dict[str, object] | None:
    """Read lines up to the end of the first JSON object; None when there is none."""
    text = b""
    while len(text) < MAX_DOCUMENT_BYTES:
        line = stream.readline(MAX_DOCUMENT_BYTES)
        copy_to.write(line)
        copy_to.flush()
        if not line:
            break
        text += line
        try:
            document = json.loads(text)
        except ValueError:
            continue  # not all of it yet
        return document if isinstance(document, dict) else None
    return None


def leave_note(file: Path, line: str) -> None:
    """Write `file` anew, so that a reader sees all of it or none."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(line + "\n", encoding="utf-8")
    draft.replace(file)


def run(file: Path, template: str, command: Sequence[str], copy_to: IO[bytes]) -> int:
    """Run `command` to its end; return the exit status to hand on."""
    file.unlink(missing_ok=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            process.send_signal(number)

        signal.signal(signal.SIGTERM, pass_on)
        signal.signal(signal.SIGINT, pass_on)
        assert process.stdout is not None  # it is a pipe, see above
        document = read_document(process.stdout, copy_to)
        if document is not None:
            leave_note(file, template.format_map(document))
        shutil.copyfileobj(process.stdout, copy_to)
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return status if document is not None else status or FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, required=True, metavar="FILE")
    parser.add_argument("--line", required=True, metavar="TEMPLATE")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    return run(options.to, options.line, options.command, sys.stdout.buffer)


if __name__ == "__main__":
    sys.exit(main())
