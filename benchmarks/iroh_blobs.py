"""iroh 0.35 as a contender: its blobs API, a store on disk on both sides, loopback only."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import iroh

from .processes import own_cpu_seconds


class _Progress:
    """Keeps the hash that iroh reports for an added file."""

    hash: iroh.Hash | None = None

    async def progress(self, progress: iroh.AddProgress) -> None:
        """Take one event."""
        if progress.type() == iroh.AddProgressType.ALL_DONE:
            self.hash = progress.as_all_done().hash
        elif progress.type() == iroh.AddProgressType.ABORT:
            raise RuntimeError(progress.as_abort().error)


class _Quiet:
    """Takes a download's events and fails on a failure."""

    async def progress(self, progress: iroh.DownloadProgress) -> None:
        """Take one event."""
        if progress.type() == iroh.DownloadProgressType.ABORT:
            raise RuntimeError(progress.as_abort().error)


async def _node(store: str) -> Any:
    iroh.iroh_ffi.uniffi_set_event_loop(asyncio.get_running_loop())
    options = iroh.NodeOptions(
        node_discovery=iroh.NodeDiscoveryConfig.NONE, ipv4_addr="127.0.0.1:0"
    )
    return await iroh.Iroh.persistent_with_options(store, options)


async def serve(store: str, source: str) -> None:
    """Serve one file from where it is until terminated; print how to get it first."""
    node = await _node(store)
    added = _Progress()
    await node.blobs().add_from_path(
        source, True, iroh.SetTagOption.auto(), iroh.WrapOption.no_wrap(), added
    )
    assert added.hash is not None
    address = await node.net().node_addr()
    near = [each for each in address.direct_addresses() if each.startswith("127.")]
    print(json.dumps([str(added.hash), await node.net().node_id(), near]), flush=True)
    await asyncio.Event().wait()


async def fetch(target: str, described: str) -> dict[str, float]:
    """Fetch one blob into a store, and move it out to a file by its own means."""
    digest, node_id, addresses = json.loads(described)
    node = await _node(str(Path(target) / "store"))
    address = iroh.NodeAddr(iroh.PublicKey.from_string(node_id), None, addresses)
    options = iroh.BlobDownloadOptions(iroh.BlobFormat.RAW, [address], iroh.SetTagOption.auto())
    blob = iroh.Hash.from_string(digest)
    begun, cpu = time.perf_counter(), own_cpu_seconds()
    await node.blobs().download(blob, options, _Quiet())
    # Not COPY: that would write every byte twice. This renames where it can.
    await node.blobs().export(
        blob,
        str(Path(target) / "file"),
        iroh.BlobExportFormat.BLOB,
        iroh.BlobExportMode.TRY_REFERENCE,
    )
    figures = {"seconds": time.perf_counter() - begun, "cpu_s": own_cpu_seconds() - cpu}
    await node.node().shutdown()
    return figures


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
