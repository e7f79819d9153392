"""What has come stays: a fetch that is killed goes on where it was, and asks for little twice.

A process is killed when its source has given a certain number of bytes, so the points
do not depend on anybody's speed. The source gives no faster than it is told to, only
to make those points fall into the transfer.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import MIB, Model, add
from tests.support.model_files import make_random_model, sha256_of_files
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

KILLS = 10

LOST_PER_KILL = 3 * MIB
"""Most bytes that a peer reads for nothing when who fetches is killed, on one connection: a
chunk of 1 MiB that has not arrived whole, as much again that the peer reads into its
buffer before it learns that nobody is there any more, and small tensors on their way
into the store's index."""

LOST_PER_KILL_HTTP = 6 * MIB
"""The same for nginx and two connections: on each a chunk that has not arrived whole, and
2 MiB that nginx has handed to the kernel."""


def test_killed_ten_times(processes: Processes, minilm: Model, tmp_path: Path) -> None:
    """Eleven runs together take little more from the source than one would have.

    A fetch that began anew each time would take about twice the model's size.
    """
    source = processes.evil_peer(minilm.store, "--rate", str(48 * MIB))
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ("--out", out)
    read_at_kills = []
    for kill in range(KILLS):
        # The first at its first byte, the others 8 % of the model further each.
        point = max(1, source.read_bytes() + (kill > 0) * (minilm.size_bytes * 8 // 100))
        fetch = processes.start_fetch(minilm.id, store, *arguments, bootstrap=[source.addr])
        source.wait_read(point)
        fetch.kill()
        assert fetch.wait_exit() == -signal.SIGKILL, "it was done before it was killed"
        read_at_kills.append(source.read_bytes())

    result = processes.fetch(minilm.id, store, *arguments, bootstrap=[source.addr])
    read = source.read_bytes()
    assert minilm.size_bytes <= read <= minilm.size_bytes + KILLS * LOST_PER_KILL, read_at_kills
    assert result.document["bytes_local"] >= read_at_kills[-1] - KILLS * LOST_PER_KILL
    assert result.document["bytes_peers"] < 0.7 * minilm.size_bytes
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["ok"], verified
    assert sha256_of_files(out) == sha256_of_files(minilm.folder)


def test_killed_while_an_origin_gives(processes: Processes, tmp_path: Path) -> None:
    """The same by nginx's own log; the only peer gives no bytes, but tells what the model is."""
    sizes = {"one": 24 * MIB, "two": 24 * MIB, "three": 16 * MIB}
    model = add(
        processes, make_random_model(tmp_path / "files", sizes, seed=4), tmp_path / "origin"
    )
    teller = processes.evil_peer(model.store, "--hide")
    origin = processes.nginx(model.folder, limit_rate=8 * MIB)
    store, out = tmp_path / "store", tmp_path / "out"
    arguments = ("--origin", origin.url, "--out", out)
    kills = 3
    for kill in range(kills):
        fetch = processes.start_fetch(model.id, store, *arguments, bootstrap=[teller.addr])
        origin.wait_served((kill + 1) * 12 * MIB)
        fetch.kill()
        assert fetch.wait_exit() == -signal.SIGKILL, "it was done before it was killed"
    result = processes.fetch(model.id, store, *arguments, bootstrap=[teller.addr])
    assert result.document["bytes_origin"] < model.size_bytes - 12 * MIB
    served = sum(request.body_bytes for request in origin.stop())
    assert model.size_bytes <= served <= model.size_bytes + kills * LOST_PER_KILL_HTTP
    assert sha256_of_files(out) == sha256_of_files(model.folder)


def test_two_fetches_at_once_into_one_store(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """Neither disturbs the other; both come out with the right files."""
    source = processes.evil_peer(small.store, "--rate", str(24 * MIB))
    store = tmp_path / "store"
    outs = [tmp_path / "out-1", tmp_path / "out-2"]
    fetches = [
        processes.start_fetch(small.id, store, "--out", out, bootstrap=[source.addr])
        for out in outs
    ]
    for fetch, out in zip(fetches, outs, strict=True):
        result = fetch.complete()
        assert result.exit_code == 0, result
        assert sha256_of_files(out) == sha256_of_files(small.folder)
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.document["ok"], verified


def test_a_damaged_store_is_mended(processes: Processes, small: Model, tmp_path: Path) -> None:
    """`verify` finds what the disk has spoilt and drops it; a fetch brings it back, only it."""
    source = processes.evil_peer(small.store)
    store, out = tmp_path / "store", tmp_path / "out"
    processes.fetch(small.id, store, bootstrap=[source.addr])
    kept = max((p for p in (store / "objects").rglob("*") if p.is_file()), key=_size)
    assert _size(kept) == 16 * MIB + 5
    kept.chmod(0o644)
    with kept.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"spoilt")

    result = processes.run("verify", "--store", store, "--json")
    assert result.exit_code == 5
    assert not result.document["ok"] and len(result.document["damaged"]) == 1
    before = source.read_bytes()
    result = processes.fetch(small.id, store, "--out", out, bootstrap=[source.addr])
    assert source.read_bytes() - before <= 16 * MIB + 5
    assert sha256_of_files(out) == sha256_of_files(small.folder)
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["ok"]


def _size(path: Path) -> int:
    return path.stat().st_size
