"""How a fetch's cost grows with the number of chunks: 10 k, 100 k, a million.

    python -m benchmarks.scale [--chunks 10000 100000 1000000] [--rounds 5] [--json]

Everything between "the manifest's bytes are here" and "the first request leaves" is the
fetch's own code: parsing, the store's look-ups, chunk lists, planning, what a peer says it
holds, encoded and decoded as on the wire. The peer itself is made up, and so are the
tensors, ten chunks each: nobody has a terabyte at hand. After that the peer "brings"
chunks without bytes, so that what is left is what deciding and noting costs per chunk.
Each size runs in a process of its own, whose highest memory is told, the made-up peer's
included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .processes import memory_bytes, python, run_json
from .report import Target, at_least_one, document, emit, spread, table

SIZES = (10_000, 100_000, 1_000_000)
CHUNKS_PER_TENSOR = 10
DRIVEN_PART = 0.8
"""Part of the chunks brought after the start; the fetch is ended then. What is done while they
come counts for them: the rest of the have messages, chunk lists, getting ready."""

MAX_START_S = 2.0
MAX_MEMORY = 300e6
MAX_GROWTH = 1.5
"""Most that a chunk may cost with the most chunks, as a multiple of the fewest: room for
caches that no longer hold everything."""

PEER = "12D3KooWPeer"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="cost of a fetch by number of chunks")
    parser.add_argument("--chunks", type=at_least_one, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.one:
            print(json.dumps(run_one(args.one, Path(name))))
            return
        runs = {
            count: [
                run_json(python("benchmarks.scale", "--one", str(count), "--folder", name))
                for _ in range(args.rounds)
            ]
            for count in args.chunks
        }
    curve = [
        {
            "chunks": count,
            **{
                field: asdict(spread([run[field] for run in each]))
                for field in ("start_s", "memory_bytes", "chunk_us")
            },
        }
        for count, each in runs.items()
    ]
    largest, smallest = max(args.chunks), min(args.chunks)
    by_count = {row["chunks"]: row for row in curve}

    def median(count: int, field: str) -> float:
        return float(by_count[count][field]["median"])

    emit(
        document("scale", rounds=args.rounds, curve=curve),
        table(
            ("chunks", "s to the first request", "memory, MB", "us per chunk"),
            [
                (
                    f"{count:,}",
                    median(count, "start_s"),
                    median(count, "memory_bytes") / 1e6,
                    median(count, "chunk_us"),
                )
                for count in args.chunks
            ],
        ),
        [
            Target("s to the first request", median(largest, "start_s"), MAX_START_S, True),
            Target("MB", median(largest, "memory_bytes") / 1e6, MAX_MEMORY / 1e6, True),
            Target(
                "times the cost per chunk",
                median(largest, "chunk_us") / median(smallest, "chunk_us"),
                MAX_GROWTH,
                True,
            ),
        ],
        as_json=args.json,
    )


# --- one size, in a process of its own -------------------------------------------------


def chunk_list_of(number: int) -> bytes:
    """Return the made-up chunk list of a tensor."""
    from blake3 import blake3

    data: bytes = blake3(number.to_bytes(8, "big")).digest(length=32 * CHUNKS_PER_TENSOR)
    return data


def made_up_manifest(tensors: int) -> tuple[bytes, dict[bytes, int]]:
    """Return a manifest's bytes, and the tensors' numbers by their chunk lists' digests."""
    from tensorswarm.store.digest import CHUNK_SIZE, digest_of
    from tensorswarm.store.manifest import ManifestBuilder, ObjectRef

    builder = ManifestBuilder()
    numbers: dict[bytes, int] = {}
    size = CHUNKS_PER_TENSOR * CHUNK_SIZE
    per_file = 1000
    for start in range(0, tensors, per_file):
        refs = []
        for number in range(start, min(start + per_file, tensors)):
            listed = digest_of(chunk_list_of(number))
            numbers[listed] = number
            refs.append(ObjectRef(digest_of(b"tensor %d" % number), size, listed))
        named = [
            (f"model.layers.{start + i}.weight", "F16", (size // 2,), ref)
            for i, ref in enumerate(refs)
        ]
        builder.add_file(f"model-{start // per_file:05}.bin", "verbatim", refs, named)
    return builder.build().encode(), numbers


class _MadeUpPeer:
    """A neighbour that holds everything; stands in for `Neighbour` and for the table."""

    peer_id = PEER

    def __init__(self, manifest: bytes, numbers: dict[bytes, int]) -> None:
        self._manifest = manifest
        self._numbers = numbers
        self.have_listeners: list[Any] = []
        self.have_model_listeners: list[Any] = []
        self.want_listeners: list[Any] = []
        self.offer_listeners: list[Any] = []
        self.joined: list[Any] = []
        self.left: list[Any] = []

    def all(self) -> list[_MadeUpPeer]:
        return [self]

    def get(self, peer_id: str) -> _MadeUpPeer:
        return self

    def is_neighbour(self, peer_id: str) -> bool:
        return True

    def seen_at(self, peer_id: str) -> str:
        return "192.0.2.1"

    def has_given(self, peer_id: str) -> None:
        """Nobody is made room for."""

    async def get_peers(self, digest: bytes) -> list[object]:
        return []

    def somebody_listens(self) -> bool:
        return False

    def tell(self, entries: object) -> None:
        """Nobody listens."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def unwant(self, digests: Collection[bytes]) -> None:
        """There is nothing to forget."""

    async def get_blobs(self, limits_bytes: Mapping[bytes, int]) -> dict[bytes, bytes]:
        return {
            digest: chunk_list_of(self._numbers[digest])
            for digest in limits_bytes
            if digest in self._numbers
        }

    async def want_model(self, model: bytes, table: Any, runs: Sequence[tuple[int, int]]) -> None:
        import trio

        from tensorswarm.p2p.control import wire, wire_models

        reader = wire.FrameReader()
        for frame in wire.fit_have_model(1, model, runs, []):
            await trio.lowlevel.checkpoint()  # frames come off a stream one by one
            reader.feed(wire.encode(frame))
            while (message := reader.next_message()) is not None:
                assert isinstance(message, wire.HaveModel)
                wire_models.check_model(message, table.sizes)
                for listener in self.have_model_listeners:
                    listener(PEER, message)


class _MadeUpWorker:
    """Says of every chunk asked for that it came; notes when the first was asked for."""

    def __init__(self, report: Any, limit: int, over: Any) -> None:
        self._report = report
        self._limit = limit
        self._over = over
        self._queue: deque[Any] = deque()
        self._changed = threading.Condition()
        self.first_at = 0.0
        self.cpu_began_s = self.cpu_ended_s = 0.0
        self.brought = 0
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request: Any) -> None:
        if not self.first_at:
            self.first_at = time.perf_counter()
            self.cpu_began_s = time.process_time()
        with self._changed:
            self._queue.append(request)
            self._changed.notify()

    def _work(self) -> None:
        from tensorswarm.p2p.swarm.source import Outcome
        from tensorswarm.store.digest import CHUNK_SIZE

        while self.brought < self._limit:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                request = self._queue.popleft()
            for index, first, count in request.spans:
                for chunk in range(first, first + count):
                    self._report.progress(PEER, request.request_id, CHUNK_SIZE)
                    self._report.chunk(
                        PEER, request.request_id, index, chunk, Outcome.PROVED, CHUNK_SIZE
                    )
                    self.brought += 1
            self._report.done(PEER, request.request_id)
        self.cpu_ended_s = time.process_time()
        self._over()

    def cancel(self, request_id: int) -> None:
        """Do nothing: it is too late by then."""

    def close(self) -> None:
        """Its thread ends by itself."""


class _NoDiscovery:
    """A DHT without anybody."""

    def routing_table_size(self) -> int:
        return 0

    @contextlib.asynccontextmanager
    async def find_providers(
        self, *_: object, **__: object
    ) -> AsyncIterator[AsyncIterator[object]]:
        async def nobody() -> AsyncIterator[object]:
            for each in ():
                yield each

        yield nobody()


def run_one(chunks: int, folder: Path) -> dict[str, float]:
    """Return what one fetch of that many chunks costs until its first request, and after."""
    import trio

    from tensorswarm.p2p.fetch import Fetch, FetchOptions
    from tensorswarm.p2p.node import Node  # as a node has it: with all it imports
    from tensorswarm.p2p.routes import Distance, Via
    from tensorswarm.p2p.services import Services
    from tensorswarm.store.manifest import Manifest
    from tensorswarm.store.store import Store

    assert Node
    encoded, numbers = made_up_manifest(math.ceil(chunks / CHUNKS_PER_TENSOR))
    peer = _MadeUpPeer(encoded, numbers)
    store = Store(folder / f"store-{os.getpid()}")
    store.place.free_bytes = lambda: 1 << 60  # type: ignore[method-assign]  # it is not written
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory, from now on
    limit = int(DRIVEN_PART * chunks)
    figures: dict[str, float] = {}

    async def drive() -> None:
        import gc

        from tensorswarm.cli.main import GC_THRESHOLDS

        gc.set_threshold(*GC_THRESHOLDS)  # as `tensorswarm fetch` does
        token = trio.lowlevel.current_trio_token()
        workers: list[_MadeUpWorker] = []

        class Routes:
            changed: list[Any] = []  # nothing changes here

            def start(self, now: float, name: str, sink: Any, report: Any) -> Any:
                workers.append(
                    _MadeUpWorker(report, limit, lambda: token.run_sync_soon(scope.cancel))
                )
                return Via.BULK, workers[-1]

            def without_bulk(self, name: str) -> Via:
                return Via.STREAM

            def held_until(self, name: str) -> float:
                return 0.0

            def distance(self, name: str) -> Distance:
                return Distance.WIDE

        services: Any = Services(
            store,
            peer,
            _NoDiscovery(),
            Routes(),
            (),
            random.Random(1),  # type: ignore[arg-type]
        )
        fetch = Fetch(services, FetchOptions())
        begun = time.perf_counter()
        manifest = Manifest.decode(encoded)
        store.put_manifest(manifest, "")
        with trio.CancelScope() as scope:
            await fetch.model(manifest.digest)
        worker = workers[0]
        figures["start_s"] = worker.first_at - begun
        figures["chunk_us"] = 1e6 * (worker.cpu_ended_s - worker.cpu_began_s) / worker.brought

    trio.run(drive)
    figures["memory_bytes"] = memory_bytes(os.getpid(), "VmHWM")
    return figures


if __name__ == "__main__":
    main()
