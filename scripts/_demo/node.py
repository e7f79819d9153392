"""A node of the demo, built with the library: a slow one, or one that tells how it fetches.

    python -m scripts._demo.node --store DIR --bootstrap ADDR --uplink BYTES_PER_S
    python -m scripts._demo.node --store DIR --bootstrap ADDR --fetch ID --origin URL

It prints one JSON document a line: first its peer id and addresses, as the command
`tensorswarm node` does; then, with ``--fetch``, the verified bytes so far as they
come, and the fetch's result. It goes on serving until SIGINT or SIGTERM.

The command has no limit on what a node sends. The demo needs one, because on the
loopback interface everything would be over before anybody could be killed midway.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path

import trio

from tensorswarm.p2p.fetch import one_error
from tensorswarm.p2p.node import Node
from tensorswarm.store.errors import TensorswarmError
from tensorswarm.store.reader import ObjectReader
from tensorswarm.store.store import Store


class Uplink:
    """A rate that several threads share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def wait_for(self, byte_count: int) -> None:
        """Return when so many bytes may have left."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + byte_count / self._bytes_per_s
            wait_s = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_s))


class SlowReader:
    """A reader that takes its time."""

    def __init__(self, reader: ObjectReader, uplink: Uplink) -> None:
        self._reader = reader
        self._uplink = uplink
        self.size_bytes = reader.size_bytes
        self.covers = reader.covers
        self.close = reader.close

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`, no faster than the uplink."""
        self._uplink.wait_for(len(view))
        self._reader.read_into(offset, view)


class SlowStore(Store):
    """A store whose objects leave no faster than an uplink."""

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        super().__init__(root)
        self._uplink = Uplink(bytes_per_s)

    def open_reader(self, digest: bytes) -> ObjectReader | None:
        """Open an object; it is read at the uplink's rate."""
        reader = super().open_reader(digest)
        return None if reader is None else SlowReader(reader, self._uplink)


def say(document: dict[str, object]) -> None:
    """Print one JSON document on a line of its own."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


async def run(options: argparse.Namespace) -> None:
    """Be a node until a signal comes."""
    slow = options.uplink > 0
    opened = SlowStore(options.store, options.uplink) if slow else Store(options.store)
    with opened as store, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with one_error(), Node(store, bootstrap=options.bootstrap) as node:
            say({"peer_id": node.peer_id, "addrs": list(node.addrs)})
            if options.fetch:
                result = await node.fetch(
                    options.fetch,
                    origins=options.origin,
                    out=options.out,
                    on_progress=lambda done, total: say({"done": done, "total": total}),
                )
                say({"result": result.as_json()})
            async for _ in signals:
                break


def main() -> int:
    """Run as a program; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--bootstrap", action="append", default=[])
    parser.add_argument("--uplink", type=float, default=0.0)
    parser.add_argument("--fetch", default="")
    parser.add_argument("--origin", action="append", default=[])
    parser.add_argument("--out", type=Path)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    try:
        trio.run(run, parser.parse_args())
    except TensorswarmError as error:
        say({"error": str(error)})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
