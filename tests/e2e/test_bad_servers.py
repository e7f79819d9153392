"""Servers that break their word: each is named in `sources`, given up, and replaced.

The fetch is a real one. Origins of ill will are `tests.support.http_origin` with a fault;
peers of ill will are real nodes (`tests.support.evil_peer`) that spoil their answers on the
bulk plane. What they fail to give comes from an honest peer, slow enough that they are
asked.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import MIB, Model, copy_of
from tests.support import http_origin as faults
from tests.support.http_origin import Fault, HttpOrigin
from tests.support.model_files import WEIGHTS, sha256_of_files
from tests.support.swarm_processes import Command, Node, Processes

pytestmark = pytest.mark.e2e

MAX_MEMORY_BYTES = 300 * MIB
"""What a fetch may need in memory in all; 80 MiB of it are libp2p. An endless header or body
would pass that within seconds if it were kept."""


def too_many(answer: faults.Answer, origin: HttpOrigin) -> faults.Answer:
    """Send the body, and go on for ever."""
    more = itertools.chain([answer.body()], _endless(origin))
    return faults.body(more)(answer, origin) or answer


def _endless(origin: HttpOrigin) -> Iterator[bytes]:
    while not origin.stopping.is_set():
        yield bytes(1 << 16)


def other_total(answer: faults.Answer, origin: HttpOrigin) -> faults.Answer:
    """Tell of a larger file than the one that is there."""
    told = answer.headers["Content-Range"]
    return answer.with_headers(Content_Range=f"{told}0")


ORIGIN_FAULTS: dict[str, tuple[Fault, str]] = {
    "too few bytes": (faults.cut_after(1000), "ended too early|closed|incomplete"),
    "too many bytes": (too_many, "more bytes"),
    "wrong Content-Range": (faults.shift_range, "another range|another size"),
    "another size": (other_total, "another size"),
    "not there": (faults.status(404), "not there"),
    "endless header": (faults.endless_header(), "headers without end"),
    "redirect loop": (faults.redirect(f"/{WEIGHTS}"), "redirects"),
    "compressed body": (faults.compress, "encoded"),
    "a byte a second": (faults.trickle(1.0), "nothing|too slow|no bytes"),
}
"""Faults by name, and what is said of each."""


@pytest.fixture(scope="module")
def slow_peer(
    small: Model, lasting_processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Node:
    """Return an honest peer that takes eight seconds: time enough to judge the others."""
    store = copy_of(small, tmp_path_factory.mktemp("honest") / "store")
    return lasting_processes.node(store, "--upload-limit", "3MB/s")


def memory_until_end(fetch: Command) -> int:
    """Return the most memory that a command had while it was looked at, twenty times a second."""
    peak = 0
    while fetch.is_running():
        peak = max(peak, fetch.peak_memory_bytes())
        time.sleep(0.05)
    return peak


def test_origins_that_break_their_word(
    processes: Processes, small: Model, slow_peer: Node, tmp_path: Path
) -> None:
    """All of them at once, beside one honest peer: the fetch ends as if they were not there."""
    with ExitStack() as stack:
        origins: dict[str, HttpOrigin] = {}
        for name, (fault, _) in ORIGIN_FAULTS.items():
            origin = stack.enter_context(HttpOrigin(small.folder))
            for path in sorted(p.name for p in small.folder.iterdir()):
                origin.fault(path, fault)
            origins[name] = origin
        options = [part for origin in origins.values() for part in ("--origin", origin.url)]
        out = tmp_path / "out"
        fetch = processes.start_fetch(
            small.id, tmp_path / "store", *options, "--out", out, bootstrap=[slow_peer.addr]
        )
        assert memory_until_end(fetch) < MAX_MEMORY_BYTES
        result = fetch.complete()
        assert result.exit_code == 0, result
        sources = result.sources()
        for name, origin in origins.items():
            assert origin.seen, f"{name}: it was never asked"
            told = sources.get(origin.url) or sources.get(origin.url.rstrip("/"))
            assert told is not None and told["dropped"], (name, result)
            assert re.search(ORIGIN_FAULTS[name][1], told["reason"]), (name, told)
    assert sha256_of_files(out) == sha256_of_files(small.folder)


PEER_FAULTS = {
    "short": "closed",
    "long": "HTTP|head",
    "range": "content-range",
    "endless": "head of more than",
    "status": "status 302",
    "gzip": "content-encoding",
    "trickle": "sent (nothing|only)",
}
"""What evil peers do to their answers, and what is said of each."""


def test_peers_that_break_their_word(
    processes: Processes, small: Model, slow_peer: Node, tmp_path: Path
) -> None:
    """The same, on the bulk plane."""
    peers = {
        name: processes.start_evil_peer(copy_of(small, tmp_path / name), "--answers", name)
        for name in PEER_FAULTS
    }
    for peer in peers.values():
        peer.wait_ready()
    out = tmp_path / "out"
    addresses = [slow_peer.addr, *(peer.addr for peer in peers.values())]
    fetch = processes.start_fetch(small.id, tmp_path / "store", "--out", out, bootstrap=addresses)
    assert memory_until_end(fetch) < MAX_MEMORY_BYTES
    result = fetch.complete()
    assert result.exit_code == 0, result
    sources = result.sources()
    for name, peer in peers.items():
        told = sources[peer.peer_id]
        assert told["dropped"], (name, result)
        assert re.search(PEER_FAULTS[name], told["reason"]), (name, told)
    assert sha256_of_files(out) == sha256_of_files(small.folder)
