"""The receiving side of a contender, as a process of its own.

Each prints one JSON line: ``seconds`` from the moment it is asked to fetch to the
moment all bytes are verified (where it verifies) and written to files, its memory
before and its highest after, in bytes. None of them waits for the disk's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from .processes import memory_bytes, touch_pages


def tensorswarm_fetch(size: str, target: str, model: str, address: str) -> dict[str, float]:
    """Fetch with this project, into an empty store."""
    import trio

    from tensorswarm.p2p.node import Node

    async def main() -> dict[str, float]:
        async with Node(Path(target), bootstrap=[address], server=False, seed=1) as node:
            touch_pages(Path(target), int(size))
            before = memory_bytes(os.getpid(), "VmRSS")
            begun = time.perf_counter()
            result = await node.fetch(model)
            seconds = time.perf_counter() - begun
            assert result.bytes_peers == result.bytes_total
            return {"seconds": seconds, "memory_before": before}

    return trio.run(main)


def libtorrent_fetch(size: str, target: str, torrent: str, port: str) -> dict[str, float]:
    """Fetch with libtorrent, in the clear."""
    from .torrent import new_session, parameters

    session = new_session(0)
    adding = parameters(torrent, target)
    touch_pages(Path(target), int(size))
    before = memory_bytes(os.getpid(), "VmRSS")
    begun = time.perf_counter()
    handle = session.add_torrent(adding)
    handle.connect_peer(("127.0.0.1", int(port)))
    while not handle.status().is_seeding:
        session.wait_for_alert(50)
        session.pop_alerts()
    return {"seconds": time.perf_counter() - begun, "memory_before": before}


def file_copy(size: str, target: str, source: str) -> dict[str, float]:
    """Copy on the same disk through memory, as ``cp`` without reflinks does."""
    touch_pages(Path(target).parent, int(size))
    before = memory_bytes(os.getpid(), "VmRSS")
    begun = time.perf_counter()
    shutil.copyfile(source, target)
    return {"seconds": time.perf_counter() - begun, "memory_before": before}


def main() -> None:
    """Run one receiver, named by the first argument."""
    receivers = {
        "tensorswarm": tensorswarm_fetch,
        "libtorrent": libtorrent_fetch,
        "copy": file_copy,
    }
    figures = receivers[sys.argv[1]](*sys.argv[2:])
    figures["memory_after"] = memory_bytes(os.getpid(), "VmHWM")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
