"""Sources that lie, stall, vanish or were never there; and what is told of them.

A peer of ill will is a real node (`tests.support.evil_peer`), and an origin of ill
will a real nginx. Rates are limited only where a transfer must last until something
happens to it.
"""

from __future__ import annotations

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tensorswarm.store.cid import model_cid
from tensorswarm.store.digest import digest_of
from tests.e2e.conftest import MIB, Model, add, assert_one_error, copy_of
from tests.support.model_files import WEIGHTS, make_random_model, sha256_of_files
from tests.support.swarm_processes import Node, Processes

pytestmark = pytest.mark.e2e

REPLACED_WITHIN_S = 25.0
"""In this time a source that fell silent is replaced, even on a machine that does five
things at once; else the fetch would give up after 30 s. That it takes less than 5 s where
nothing else runs, tests/unit/test_swarm_time.py shows in virtual time."""

START_AND_END_S = 25.0
"""What a command may take besides its time-out, on such a machine: libp2p's import, 1 s on
a quiet one, is most of it."""

NOBODY = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
"""A peer id that no process has."""


@pytest.fixture(scope="module")
def middling(lasting_processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a model of 40 MiB: at 8 MiB/s it lasts until something happens."""
    base = tmp_path_factory.mktemp("middling")
    sizes = {"one": 16 * MIB, "two": 16 * MIB + 9, "three": 8 * MIB}
    folder = make_random_model(base / "files", sizes, seed=3)
    return add(lasting_processes, folder, base / "store")


def assert_clean(processes: Processes, model: Model, store: Path, out: Path) -> None:
    """Check that every byte in the store is right, and so is every file that came out."""
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["damaged"] == [], verified
    assert sha256_of_files(out) == sha256_of_files(model.folder)


# ---- lies


def test_peers_that_alter_bytes_are_dropped(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """Their chunks are refused, the honest peer gives them, and `sources` tells of it."""
    rate = ("--rate", str(24 * MIB))
    liar = processes.start_evil_peer(copy_of(small, tmp_path / "lies"), "--alter", *rate)
    sly = processes.start_evil_peer(
        copy_of(small, tmp_path / "half-truth"), "--alter-every", "3", *rate
    )
    honest = processes.start_evil_peer(copy_of(small, tmp_path / "truth"), *rate)
    peers = [liar, sly, honest]
    for peer in peers:
        peer.wait_ready()
    store, out = tmp_path / "store", tmp_path / "out"
    result = processes.fetch(small.id, store, "--out", out, bootstrap=[peer.addr for peer in peers])
    sources = result.sources()
    for wrong in (liar, sly):
        assert wrong.read_bytes() > 0, "it was never asked"
        assert sources[wrong.peer_id]["dropped"], result
        assert sources[wrong.peer_id]["reason"]
    assert not sources[honest.peer_id]["dropped"], result
    # No chunk of the liar's counts; manifest and chunk lists, which were right, may.
    assert sources[liar.peer_id]["bytes"] < 16_000
    assert result.document["bytes_wasted"] > 0
    given = sum(source["bytes"] for source in sources.values())
    assert given == result.document["bytes_total"]
    assert_clean(processes, small, store, out)


def test_only_liars(processes: Processes, small: Model, tmp_path: Path) -> None:
    """Nobody is left who gives good bytes: exit 5, and not one bad byte is kept."""
    liar = processes.evil_peer(copy_of(small, tmp_path / "lies"), "--alter")
    store = tmp_path / "store"
    result = processes.fetch(
        small.id,
        store,
        *("--out", tmp_path / "out", "--timeout", "2"),
        bootstrap=[liar.addr],
        expected=5,
    )
    assert_one_error(result, 5)
    assert liar.peer_id in result.stderr
    assert not (tmp_path / "out").exists()
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["damaged"] == []


def test_an_origin_with_other_bytes(processes: Processes, small: Model, tmp_path: Path) -> None:
    """An origin's file was altered here and there: what is wrong comes from elsewhere."""
    files = tmp_path / "files"
    shutil.copytree(small.folder, files)
    with (files / WEIGHTS).open("r+b") as file:
        for at in (3 * MIB, 7 * MIB, 20 * MIB):
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    origin = processes.nginx(files)
    peer = processes.evil_peer(copy_of(small, tmp_path / "truth"), "--rate", str(8 * MIB))
    store, out = tmp_path / "store", tmp_path / "out"
    result = processes.fetch(
        small.id, store, *("--origin", origin.url, "--out", out), bootstrap=[peer.addr]
    )
    sources = result.sources()
    assert "match" in sources[origin.url]["reason"], sources
    assert sources[peer.peer_id]["bytes"] >= 3 * MIB
    assert result.document["bytes_wasted"] >= MIB
    assert_clean(processes, small, store, out)


def test_a_peer_that_claims_what_it_lacks(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """It says that it holds everything and gives nothing; who holds it gives it."""
    boaster = processes.start_evil_peer(copy_of(small, tmp_path / "boast"), "--pretend")
    honest = processes.start_evil_peer(copy_of(small, tmp_path / "truth"), "--rate", str(16 * MIB))
    boaster.wait_ready()
    # Alone first: another fetch in progress would be found through it, and give.
    alone = processes.start_fetch(
        small.id, tmp_path / "other", "--timeout", "2", bootstrap=[boaster.addr]
    ).complete()
    assert alone.exit_code in (3, 4), alone  # who searches longer is told 3
    assert_one_error(alone, alone.exit_code)

    honest.wait_ready()
    store, out = tmp_path / "store", tmp_path / "out"
    result = processes.fetch(small.id, store, "--out", out, bootstrap=[boaster.addr, honest.addr])
    # All but a file's header perhaps, which the other has as well.
    assert result.sources()[honest.peer_id]["bytes"] >= 0.99 * small.size_bytes
    assert_clean(processes, small, store, out)


# ---- silence


def test_peers_that_fall_silent_are_replaced(
    processes: Processes, middling: Model, tmp_path: Path
) -> None:
    """One peer stopped and one killed in mid-transfer are replaced, not waited for.

    From the signals on the third peer gives without a limit. The fetch cannot end
    without the chunks that the silent ones were asked for.
    """
    slow = ("--rate", str(4 * MIB))
    names = ("stopped", "killed", "other")
    peers = [processes.start_evil_peer(copy_of(middling, tmp_path / name), *slow) for name in names]
    for peer in peers:
        peer.wait_ready()
    stopped, killed, other = peers
    store, out = tmp_path / "store", tmp_path / "out"
    fetch = processes.start_fetch(
        middling.id, store, "--out", out, bootstrap=[peer.addr for peer in peers]
    )
    for peer in peers:
        peer.wait_read(4 * MIB)
    assert fetch.is_running()
    stopped.signal(signal.SIGSTOP)
    killed.signal(signal.SIGKILL)
    begun = time.monotonic()
    other.set_rate(0)
    result = fetch.complete()
    waited_s = time.monotonic() - begun
    assert result.exit_code == 0, result
    assert waited_s < REPLACED_WITHIN_S, result
    given = {peer_id: source["bytes"] for peer_id, source in result.sources().items()}
    assert given[stopped.peer_id] > 0 and given[killed.peer_id] > 0
    assert given[other.peer_id] > given[stopped.peer_id] + given[killed.peer_id]
    assert_clean(processes, middling, store, out)


def test_a_peer_whose_disk_hangs_is_replaced(
    processes: Processes, middling: Model, tmp_path: Path
) -> None:
    """Its control stream lives and it still says what it holds; only no bytes come.

    The other peer is slow enough to last beyond the silence: the fetch has to notice,
    not merely to come out first.
    """
    stuck = processes.start_evil_peer(
        copy_of(middling, tmp_path / "one"), "--hang-after", str(4 * MIB)
    )
    other = processes.start_evil_peer(copy_of(middling, tmp_path / "two"), "--rate", str(8 * MIB))
    stuck.wait_ready()
    other.wait_ready()
    store, out = tmp_path / "store", tmp_path / "out"
    fetch = processes.start_fetch(
        middling.id, store, "--out", out, bootstrap=[stuck.addr, other.addr]
    )
    result = fetch.complete()
    assert result.exit_code == 0, result
    sources = result.sources()
    assert sources[stuck.peer_id]["dropped"] and sources[stuck.peer_id]["reason"], result
    assert 0 < sources[stuck.peer_id]["bytes"] < 5 * MIB
    assert_clean(processes, middling, store, out)


def test_an_origin_that_falls_silent_is_replaced(
    processes: Processes, middling: Model, tmp_path: Path
) -> None:
    """The same, for an nginx that is stopped in mid-transfer."""
    origin = processes.nginx(middling.folder, limit_rate=2 * MIB)
    peer = processes.evil_peer(copy_of(middling, tmp_path / "one"), "--rate", str(4 * MIB))
    store, out = tmp_path / "store", tmp_path / "out"
    fetch = processes.start_fetch(
        middling.id, store, *("--origin", origin.url, "--out", out), bootstrap=[peer.addr]
    )
    origin.wait_line()  # its first request has been answered
    peer.wait_read(4 * MIB)
    assert fetch.is_running()
    origin.signal(signal.SIGSTOP)
    begun = time.monotonic()
    peer.set_rate(0)
    result = fetch.complete()
    waited_s = time.monotonic() - begun
    assert result.exit_code == 0, result
    assert waited_s < REPLACED_WITHIN_S, result
    assert result.sources()[origin.url]["bytes"] > 0
    assert_clean(processes, middling, store, out)


# ---- nobody


def test_an_id_that_nobody_knows(processes: Processes, small_node: Node, tmp_path: Path) -> None:
    """A network that answers and does not have it: exit 3."""
    refs = [model_cid(digest_of(b"no such model")), digest_of(b"no such tensor").hex()]
    fetches = [
        processes.start_fetch(ref, tmp_path / "store", bootstrap=[small_node.addr]) for ref in refs
    ]
    for fetch in fetches:
        assert_one_error(fetch.complete(), 3)


def test_nobody_reachable(processes: Processes, small: Model, tmp_path: Path) -> None:
    """One bootstrap refuses, one takes the connection and stays dumb: exit 4 in time."""
    timeout_s = 2.0
    with socket.create_server(("127.0.0.1", 0)) as dumb, socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (dumb, refusing)]
        result = processes.fetch(
            small.id,
            tmp_path / "store",
            *("--timeout", str(timeout_s)),
            bootstrap=[f"/ip4/127.0.0.1/tcp/{port}/p2p/{NOBODY}" for port in ports],
            expected=4,
        )
    assert_one_error(result, 4)
    assert timeout_s <= result.seconds < timeout_s + START_AND_END_S, result


def test_nobody_to_ask(processes: Processes, small: Model, tmp_path: Path) -> None:
    """No bootstrap at all is said at once: exit 4."""
    result = processes.fetch(small.id, tmp_path / "store", expected=4)
    assert_one_error(result, 4)
    assert "--bootstrap" in result.document["error"]
    assert result.seconds < START_AND_END_S


def test_the_last_source_goes(processes: Processes, middling: Model, tmp_path: Path) -> None:
    """The only peer is killed in mid-transfer: exit 4 within the time-out, and nothing is lost."""
    peer = processes.evil_peer(copy_of(middling, tmp_path / "one"), "--rate", str(8 * MIB))
    store = tmp_path / "store"
    timeout_s = 2.0
    fetch = processes.start_fetch(
        middling.id, store, *("--timeout", str(timeout_s)), bootstrap=[peer.addr]
    )
    peer.wait_read(12 * MIB)
    peer.kill()
    begun = time.monotonic()
    result = fetch.complete()
    waited_s = time.monotonic() - begun
    assert result.exit_code in (3, 4), result
    assert_one_error(result, result.exit_code)
    assert waited_s < timeout_s + START_AND_END_S
    (kept,) = processes.run("ls", "--store", store, "--json").document["models"]
    assert not kept["complete"]
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0, verified


# ---- no room


def test_no_room(
    processes: Processes, small: Model, small_node: Node, tmpfs: Path, tmp_path: Path
) -> None:
    """A disk too small is noticed before anything moves, or when it is full: exit 6."""
    store = tmpfs / "store"
    result = processes.fetch(small.id, store, bootstrap=[small_node.addr], expected=6)
    assert_one_error(result, 6)

    result = processes.run("add", small.folder, "--store", tmpfs / "other", "--json")
    assert_one_error(result, 6)
    listed = processes.run("ls", "--store", tmpfs / "other", "--json")
    assert listed.document["models"] == []

    result = processes.fetch(small.id, store, "--include", "medium", bootstrap=[small_node.addr])
    assert result.document["bytes_total"] < 7 * MIB, "what fits still comes in"
    result = processes.fetch(
        small.id,
        tmp_path / "store",
        *("--out", tmpfs / "out"),
        bootstrap=[small_node.addr],
        expected=6,
    )
    assert_one_error(result, 6)
    assert not list((tmpfs / "out").glob("model*")), "half a file has a file's name"
