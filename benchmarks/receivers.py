"""The receiving side of a contender, as a process of its own.

Each prints one JSON line: ``seconds`` from the moment it is asked to fetch to the moment
all bytes are verified (where it verifies) and written to files, ``cpu_s``, the CPU seconds
of the process meanwhile, its memory before and its highest after, in bytes. Starting the
program and its imports are not counted. None of them waits for the disk's cache.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .processes import memory_bytes, own_cpu_seconds


def tensorswarm_fetch(target: str, model: str, address: str, bulk: str) -> dict[str, float]:
    """Fetch with this project, into an empty store, as `tensorswarm fetch` does it."""
    import trio

    from tensorswarm.cli.main import GC_THRESHOLDS
    from tensorswarm.p2p.node import Node

    gc.set_threshold(*GC_THRESHOLDS)

    async def main() -> dict[str, float]:
        options = {"server": False, "seed": 1, "bulk": bulk}
        async with Node(Path(target), bootstrap=[address], **options) as node:
            before = memory_bytes(os.getpid(), "VmRSS")
            begun, cpu = time.perf_counter(), own_cpu_seconds()
            result = await node.fetch(model)
            seconds = time.perf_counter() - begun
            assert result.bytes_peers == result.bytes_total
            return {
                "seconds": seconds,
                "cpu_s": own_cpu_seconds() - cpu,
                "memory_before": before,
            }

    return trio.run(main)


def libtorrent_fetch(target: str, torrent: str, port: str) -> dict[str, float]:
    """Fetch with libtorrent, in the clear."""
    from .torrent import new_session, parameters

    session = new_session(0)
    adding = parameters(torrent, target)
    before = memory_bytes(os.getpid(), "VmRSS")
    begun, cpu = time.perf_counter(), own_cpu_seconds()
    handle = session.add_torrent(adding)
    handle.connect_peer(("127.0.0.1", int(port)))
    while not handle.status().is_seeding:
        session.wait_for_alert(50)
        session.pop_alerts()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "cpu_s": own_cpu_seconds() - cpu, "memory_before": before}


def iroh_fetch(target: str, described: str) -> dict[str, float]:
    """Fetch with iroh's blobs."""
    from .iroh_blobs import fetch

    return asyncio.run(fetch(target, described))


def libp2p_fetch(target: str, size: str, described: str) -> dict[str, float]:
    """Receive over a plain py-libp2p stream."""
    import trio

    from .libp2p_stream import fetch

    return trio.run(fetch, target, size, described)


def main() -> None:
    """Run one receiver, named by the first argument."""
    receivers: dict[str, Callable[..., dict[str, float]]] = {
        "tensorswarm": tensorswarm_fetch,
        "libtorrent": libtorrent_fetch,
        "iroh": iroh_fetch,
        "libp2p": libp2p_fetch,
    }
    figures = receivers[sys.argv[1]](*sys.argv[2:])
    figures.setdefault("memory_before", memory_bytes(os.getpid(), "VmHWM"))
    figures["memory_after"] = memory_bytes(os.getpid(), "VmHWM")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
