"""The demo's origin where nginx is not installed: a web server no faster than a rate.

    python -m scripts._demo.origin FOLDER BYTES_PER_S

Prints its URL as a JSON document, and serves the folder until it is ended.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.http_origin import Answer, Fault, HttpOrigin

PIECE_BYTES = 64 << 10


def no_faster_than(bytes_per_s: float) -> Fault:
    """Return the way to answer with the right bytes, at a rate per connection."""

    def pieces(data: bytes) -> Iterator[bytes]:
        begun = time.monotonic()
        for start in range(0, len(data), PIECE_BYTES):
            time.sleep(max(0.0, begun + start / bytes_per_s - time.monotonic()))
            yield data[start : start + PIECE_BYTES]

    def fault(answer: Answer, _origin: HttpOrigin) -> Answer:
        if answer.file is None:
            return answer
        return dataclasses.replace(answer, pieces=pieces(answer.body()))

    return fault


def main() -> int:
    """Run as a program."""
    folder, bytes_per_s = Path(sys.argv[1]), float(sys.argv[2])
    with HttpOrigin(folder) as origin:
        for path in folder.rglob("*"):
            if path.is_file():
                origin.fault(path.relative_to(folder).as_posix(), no_faster_than(bytes_per_s))
        sys.stdout.write(json.dumps({"url": origin.url}) + "\n")
        sys.stdout.flush()
        origin.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
