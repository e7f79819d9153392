"""A peer that does its neighbours wrong: a real node whose disk lies for it.

It is a `Node` with its own host, control streams and bulk plane; only what comes from
its store is not as it should be. Manifests and chunk lists stay right, so that a
fetch gets as far as asking for bytes. Without any of the faults it is an honest peer
that counts, and gives no faster than it is told to.

Prints what ``tensorswarm node --json`` prints, then ``{"read": n}`` whenever it has
read model bytes in order to send them: n in all. A number on standard input is a new
rate in bytes per second. It ends when standard input does.

    python -m tests.support.evil_peer --store DIR [--bootstrap ADDR]... [FAULT]...
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from tensorswarm.p2p.bulk import http1
from tensorswarm.p2p.bulk.connection import ServedConnection
from tensorswarm.p2p.node import LOOPBACK_LISTEN, Node
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.reader import ObjectReader
from tensorswarm.store.records import ObjectRecord
from tensorswarm.store.store import Holding, Store

ANSWERS = ("short", "long", "range", "status", "gzip", "endless", "trickle")
"""Ways to spoil an answer: half of the body and then the end of the connection, more bytes
than announced, another range, a redirect, a body said to be packed, header lines without
end, a byte a second."""

SLICE_BYTES = 64 << 10
"""Bytes read at a time, so that a slow line flows rather than jumps."""


class Line:
    """The way out, shared by all connections: counts bytes, and takes its time.

    Parameters
    ----------
    rate : float
        Bytes per second; 0 for no limit.
    hang_after : int or None
        Bytes after which nothing is given any more.
    """

    def __init__(self, rate: float, hang_after: int | None) -> None:
        self._changed = threading.Condition()
        self._rate = rate
        self._hang_after = hang_after
        self._free_at = 0.0
        self._read = 0

    def set_rate(self, rate: float) -> None:
        """Change the rate, also for those who wait."""
        with self._changed:
            self._rate = rate
            self._free_at = 0.0
            self._changed.notify_all()

    def take(self, byte_count: int) -> None:
        """Wait until there is room for so many bytes on the line, and count them."""
        with self._changed:
            while self._hang_after is not None and self._read + byte_count > self._hang_after:
                self._changed.wait()
            while self._rate and self._free_at > time.monotonic():
                self._changed.wait(self._free_at - time.monotonic())
            if self._rate:
                self._free_at = max(self._free_at, time.monotonic()) + byte_count / self._rate
            self._read += byte_count
            print(json.dumps({"read": self._read}), flush=True)


class FaultyReader:
    """An object's bytes, altered in every chunk that `altered_every` divides."""

    def __init__(self, reader: ObjectReader, line: Line, altered_every: int) -> None:
        self._reader = reader
        self._line = line
        self._altered_every = altered_every
        self.size_bytes = reader.size_bytes

    def covers(self, offset: int, length: int) -> bool:
        return self._reader.covers(offset, length)

    def read_into(self, offset: int, view: memoryview) -> None:
        for at in range(0, len(view), SLICE_BYTES):
            part = view[at : at + SLICE_BYTES]
            self._line.take(len(part))
            self._reader.read_into(offset + at, part)
            chunk = (offset + at) // CHUNK_SIZE
            if self._altered_every and chunk % self._altered_every == 0:
                part[0] ^= 1

    def close(self) -> None:
        self._reader.close()


class EvilStore(Store):
    """A store that does not give what it has.

    Parameters
    ----------
    root : Path
        A real store.
    line : Line
        Where model bytes go out.
    altered_every : int
        Which chunks of each object are altered: 1 for all, 0 for none.
    hides : bool
        Whether it denies to hold any of its models' bytes.
    pretends : bool
        Whether it claims to hold all of its models' bytes, and gives none.

    Attributes
    ----------
    lie_size : int or None
        The size it gives every object, in bytes, once this is set.
    """

    def __init__(
        self, root: Path, line: Line, altered_every: int, hides: bool, pretends: bool
    ) -> None:
        self.lie_size: int | None = None
        super().__init__(root)
        self._sizes: dict[bytes, int] = {}
        self._line = line
        self._altered_every = altered_every
        self._hides = hides
        self._pretends = pretends
        self._sizes = {
            ref.digest: ref.size_bytes
            for model in self.models()
            if (manifest := self.manifest(model.digest)) is not None
            for ref in manifest.objects
        }

    def records(self, digests: Sequence[bytes]) -> dict[bytes, ObjectRecord]:
        found = super().records(digests)
        if self.lie_size is None:
            return found
        return {d: r._replace(size_bytes=self.lie_size, chunk_list=b"") for d, r in found.items()}

    def holdings(self, digests: Sequence[bytes]) -> dict[bytes, Holding]:
        held = super().holdings(digests)
        for digest in digests:
            if digest not in self._sizes:
                continue
            if self._hides:
                held.pop(digest, None)
            elif self._pretends:
                held[digest] = Holding(self._sizes[digest], None, b"")
        return held

    def are_whole(self, digests: Sequence[bytes], sizes_bytes: Sequence[int]) -> bool:
        return False  # what there is says `holdings`

    def open_reader(self, digest: bytes) -> ObjectReader | None:
        if digest not in self._sizes:
            return super().open_reader(digest)
        if self._hides or self._pretends:
            return None
        reader = super().open_reader(digest)
        return reader and FaultyReader(reader, self._line, self._altered_every)


def _read_rates(line: Line, ended: trio.Event) -> None:
    for text in sys.stdin:
        line.set_rate(float(text))
    trio.from_thread.run_sync(ended.set)


def spoil_answers(kind: str) -> None:
    """Make all bulk servers of this process spoil their answers; see `ANSWERS`."""

    def answer(connection: Any, exchange: http1.ServerExchange) -> None:
        _, offset, length = exchange.request
        reader = connection._reader.reader_for(exchange.request)
        head = exchange.partial_content(reader.size_bytes)
        if kind == "range":
            head = head.replace(b"bytes %d-" % offset, b"bytes %d-" % (offset + 1))
        elif kind == "status":
            head = b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"
        elif kind == "gzip":
            head = head.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
        elif kind == "endless":
            head = b"HTTP/1.1 206 Partial Content\r\n" + b"X-More: more\r\n" * 1000
        connection._put(head)
        if kind == "trickle":
            connection._flush()
            for at in range(length):
                connection._put_body(reader, offset + at, 1)
                connection._flush()
                time.sleep(1.0)
        connection._put_body(reader, offset, length // 2 if kind == "short" else length)
        if kind == "long":
            connection._put(b"x" * 1000)
        connection._flush()
        if kind == "short":
            raise OSError("enough")

    ServedConnection._answer = answer  # type: ignore[method-assign]


async def _run(args: argparse.Namespace) -> None:
    if args.answers:
        spoil_answers(args.answers)
    line = Line(args.rate, args.hang_after)
    altered_every = 1 if args.alter else args.alter_every
    ended = trio.Event()
    with EvilStore(args.store, line, altered_every, args.hide, args.pretend) as store:
        async with (
            trio.open_nursery() as nursery,
            Node(store, listen=[LOOPBACK_LISTEN], bootstrap=args.bootstrap) as node,
        ):
            store.lie_size = args.false_size
            if args.discreet:
                node.neighbours.peers_for = lambda digest, asker: []  # type: ignore[method-assign]
            print(json.dumps({"peer_id": node.peer_id, "addrs": list(node.addrs)}), flush=True)
            nursery.start_soon(trio.to_thread.run_sync, _read_rates, line, ended)
            await ended.wait()


def main() -> None:
    """Run until standard input ends."""
    parser = argparse.ArgumentParser(description="A peer that does its neighbours wrong.")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--bootstrap", action="append", default=[])
    parser.add_argument("--rate", type=float, default=0.0, help="bytes per second in all")
    parser.add_argument("--alter", action="store_true", help="alter every chunk")
    parser.add_argument("--alter-every", type=int, default=0, help="alter every n-th chunk")
    parser.add_argument("--hang-after", type=int, help="give so many bytes, then nothing")
    parser.add_argument("--hide", action="store_true", help="deny to hold any model bytes")
    parser.add_argument("--false-size", type=int, help="say that every object has this size")
    parser.add_argument("--pretend", action="store_true", help="claim all, give nothing")
    parser.add_argument("--answers", choices=ANSWERS, help="spoil the answers of the bulk plane")
    parser.add_argument(
        "--discreet", action="store_true", help="tell nobody of neighbours, outside the DHT"
    )
    trio.run(_run, parser.parse_args())


if __name__ == "__main__":
    main()
