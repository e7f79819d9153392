"""The command line's promises: exit codes, one line of error, one JSON document, quick ends."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorswarm.store.version import VERSION
from tests.e2e.conftest import MIB, Model, add, assert_one_error, copy_of
from tests.support.model_files import (
    WEIGHTS,
    make_random_model,
    sha256_of_files,
)
from tests.support.swarm_processes import Completed, Node, Processes, environment

pytestmark = pytest.mark.e2e

ENDS_WITHIN_S = 20.0
"""In this time a command that was asked to end has ended, on the busiest machine. Its own
time-outs, which it would otherwise wait for, are longer."""


# ---- what comes in


def _header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def _entry(start: int, stop: int, shape: int) -> str:
    return f'{{"dtype":"U8","shape":[{shape}],"data_offsets":[{start},{stop}]}}'


MALFORMED = {
    "empty": b"",
    "cut in the length": b"\x10\x00",
    "length beyond the file": (1 << 62).to_bytes(8, "little") + b"{}",
    "not JSON": _header("{no"),
    "not an object": _header("[]"),
    "a name twice": _header(f'{{"a":{_entry(0, 4, 4)},"a":{_entry(0, 4, 4)}}}', b"1234"),
    "an offset outside": _header(f'{{"a":{_entry(0, 9, 9)}}}', b"1234"),
    "an overlap": _header(f'{{"a":{_entry(0, 4, 4)},"b":{_entry(2, 6, 4)}}}', b"123456"),
    "bytes of nobody": _header(f'{{"a":{_entry(0, 2, 2)}}}', b"1234"),
    "a shape of another size": _header(f'{{"a":{_entry(0, 4, 5)}}}', b"1234"),
    "deeply nested": _header('{"a":' * 5000 + "1" + "}" * 5000),
}


def test_malformed_safetensors(processes: Processes, tmp_path: Path) -> None:
    """Each is refused with one line, and the store stays as it was."""
    store = tmp_path / "store"
    good = make_random_model(tmp_path / "good", {"a": 200_000}, seed=5)
    kept = add(processes, good, store)
    before = _content(store)
    running = {}
    for number, (what, data) in enumerate(MALFORMED.items()):
        folder = tmp_path / f"bad-{number}"
        make_random_model(folder, {"first": 300_000}, seed=6 + number)
        (folder / "second.safetensors").write_bytes(data)
        running[what] = processes.command("add", folder, "--store", store, "--json")
        if number % 4 == 3 or number == len(MALFORMED) - 1:
            for what, command in running.items():
                result = command.complete()
                assert_one_error(result, 2)
                assert "second.safetensors" in result.stderr, what
            running.clear()
    assert _content(store) == before
    listed = processes.run("ls", "--store", store, "--json").document
    assert [model["model"] for model in listed["models"]] == [kept.id]
    verified = processes.run("verify", "--store", store, "--json")
    assert verified.exit_code == 0 and verified.document["ok"]


def _content(store: Path) -> dict[str, str]:
    """Return the store's files, but for those of its database."""
    return {name: sha for name, sha in sha256_of_files(store).items() if "index.db" not in name}


@pytest.mark.parametrize(
    "arguments",
    [
        ["fetch", "no such thing"],
        ["fetch", ""],
        ["fetch", "0123456789abcdef" * 4 + "0"],
        ["fetch", "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKPbdG"],
        ["fetch", "."],
        ["fetch", "ftp://127.0.0.1/model.safetensors"],
        ["fetch", "ab" * 32, "--bootstrap", "/ip4/127.0.0.1/tcp/1"],
        ["fetch", "ab" * 32, "--bootstrap", "@no-such-file"],
        ["fetch", "ab" * 32, "--origin", "ftp://127.0.0.1/"],
        ["fetch", "ab" * 32, "--timeout", "-1"],
        ["fetch"],
        ["node", "--listen", "nowhere"],
        ["node", "--http", "nowhere"],
        ["add", "no-such-file"],
        ["info", "no such thing"],
        ["export", "ab" * 32],
        ["fly"],
    ],
    ids=" ".join,
)
def test_wrong_usage(
    start_commands: Callable[[list[str]], Completed], arguments: list[str]
) -> None:
    """Exit 2, one document, one line."""
    result = start_commands(arguments)
    assert result.exit_code == 2, result
    assert result.document["exit_code"] == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("tensorswarm")


@pytest.fixture
def start_commands(processes: Processes, store_dir: Path) -> Callable[[list[str]], Completed]:
    """Return a function that runs a command with ``--json`` on a new store."""
    return lambda arguments: processes.run(*arguments, "--store", store_dir, "--json")


def test_a_release_of_nobody(processes: Processes, store_dir: Path) -> None:
    """A name is a proper reference; only nobody here knows its publisher: exit 3."""
    result = processes.run("fetch", "acme/minilm@1.3.*", "--store", store_dir, "--json")
    assert_one_error(result, 3)


# ---- what comes out


def test_every_local_command_gives_one_document(processes: Processes, tmp_path: Path) -> None:
    """And what it says is true."""
    folder = make_random_model(tmp_path / "files", {"a": 2 * MIB + 1, "b": 10}, seed=7)
    size = sum(path.stat().st_size for path in folder.iterdir())
    where = ("--store", tmp_path / "store", "--json")
    added = processes.run("add", folder, *where).document
    assert (added["files"], added["tensors"], added["bytes"]) == (2, 2, size)
    assert added["new_bytes"] == size
    again = processes.run("add", folder, "--no-copy", *where).document
    assert again == {**added, "new_bytes": 0}

    (listed,) = processes.run("ls", *where).document["models"]
    assert listed["model"] == added["model"] and listed["complete"]
    told = processes.run("info", added["model"], "--tensors", *where).document
    assert told["weights"] == added["weights"]
    assert [tensor["size"] for tensor in told["tensor_list"]] == [2 * MIB + 1, 10]
    assert processes.run("info", folder, *where).document["model"] == added["model"]
    tensor = processes.run("info", told["tensor_list"][0]["digest"], *where).document
    assert (tensor["bytes"], tensor["chunks"], tensor["complete"]) == (2 * MIB + 1, 3, True)

    exported = processes.run("export", added["model"], tmp_path / "out", *where).document
    assert exported["files"] == 2 and exported["bytes"] == size
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(folder)
    assert processes.run("verify", *where).document["ok"]
    assert_one_error(processes.run("info", "ab" * 32, *where), 3)
    assert_one_error(processes.run("export", "ab" * 32, tmp_path / "none", *where), 3)


def test_for_people_there_is_text(processes: Processes, tmp_path: Path, small_node: Node) -> None:
    """Without --json nothing of it is JSON, and the store is where the environment says."""
    home = environment(TENSORSWARM_HOME=str(tmp_path / "home"))
    folder = make_random_model(tmp_path / "files", {"a": 1000}, seed=8)
    added = processes.run("add", folder, env=home)
    assert added.exit_code == 0 and added.stdout.startswith("model ")
    assert (tmp_path / "home" / "index.db").exists()
    listed = processes.run("ls", env=home)
    assert "files" in listed.stdout and not listed.stdout.startswith("{")
    version = processes.run("--version")
    assert version.stdout == f"tensorswarm {VERSION}\n"
    failed = processes.run("info", "ab" * 32, env=home)
    assert failed.exit_code == 3 and failed.stdout == "" and failed.stderr.count("\n") == 1


def test_peers(processes: Processes, small: Model, small_node: Node, tmp_path: Path) -> None:
    """`peers` shows who can be reached, and how much of a model each holds."""
    where = ("--store", tmp_path / "store", "--json", "--bootstrap", small_node.addr)
    (found,) = processes.run("peers", small.id, *where).document["peers"]
    assert found["peer_id"] == small_node.peer_id
    assert found["bytes_held"] >= small.size_bytes
    alone = processes.run("peers", "--store", tmp_path / "store", "--json")
    assert_one_error(alone, 4)


# ---- how it ends


def test_nodes_end_when_asked(processes: Processes, small: Model, tmp_path: Path) -> None:
    """SIGINT and SIGTERM: exit 0 in a moment, though connected; one line was all output."""
    first = processes.node(tmp_path / "store", "--http", "127.0.0.1:0")
    second = processes.node(copy_of(small, tmp_path / "other"), bootstrap=[first.addr])
    for node, how in ((first, signal.SIGINT), (second, signal.SIGTERM)):
        state = Path(node.arguments[node.arguments.index("--store") + 1]) / "node.json"
        assert state.exists()
        node.signal(how)
        begun = time.monotonic()
        assert node.wait_exit() == 0
        assert time.monotonic() - begun < ENDS_WITHIN_S
        assert [json.loads(line)["peer_id"] for line in node.stdout.wait_end()] == [node.peer_id]
        assert not state.exists()
        assert not [line for line in node.stderr.wait_end() if "Traceback" in line]


def test_a_fetch_ends_when_asked(processes: Processes, small: Model, tmp_path: Path) -> None:
    """Ctrl-C in mid-transfer: exit 130 in a moment, one document, and what came is kept."""
    source = processes.evil_peer(small.store, "--rate", str(8 * MIB))
    store = tmp_path / "store"
    fetch = processes.start_fetch(small.id, store, bootstrap=[source.addr])
    source.wait_read(8 * MIB)
    source.signal(signal.SIGSTOP)  # or a busy machine might finish before it hears
    fetch.signal(signal.SIGINT)
    begun = time.monotonic()
    result = fetch.complete()
    assert time.monotonic() - begun < ENDS_WITHIN_S
    assert result.exit_code == 130, result
    assert "Traceback" not in result.stderr
    source.signal(signal.SIGCONT)
    source.set_rate(0)
    again = processes.fetch(small.id, store, bootstrap=[source.addr])
    assert again.document["bytes_local"] >= 5 * MIB
    assert result.document["exit_code"] == 130


# ---- how it begins


def _seconds_to_import(module: str) -> float:
    code = (
        "import sys, time; begun = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - begun)"
    )
    run = [sys.executable, "-c", code]
    return float(subprocess.run(run, env=environment(), check=True, capture_output=True).stdout)


def test_import_costs_next_to_nothing() -> None:
    """`import tensorswarm` takes no longer than numpy's import and 0.1 s.

    The best of five, in turns, so that a busy machine slows both or neither.
    """
    times = [(_seconds_to_import("tensorswarm"), _seconds_to_import("numpy")) for _ in range(5)]
    ours, numpys = (min(column) for column in zip(*times, strict=True))
    assert ours <= numpys + 0.1, (ours, statistics.median(t for t, _ in times), numpys)


@pytest.mark.parametrize(
    "code",
    [
        "import tensorswarm",
        "import tensorswarm; tensorswarm.Store, tensorswarm.load, tensorswarm.TensorswarmError",
        "from tensorswarm.cli.main import main; main(['ls', '--store', 'STORE'])",
        "from tensorswarm.cli.main import main; main(['fetch', 'MODEL', '--store', 'STORE'])",
    ],
)
def test_without_the_network_no_libp2p(small: Model, code: str) -> None:
    """Neither libp2p nor trio is loaded before something has to move."""
    code = code.replace("STORE", str(small.store)).replace("MODEL", small.id)
    code += "\nimport sys; print(sorted({'libp2p', 'trio', 'httpx'} & set(sys.modules)))"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment(), check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ctrl_c_while_the_command_is_still_imported() -> None:
    """No traceback then either: exit 130."""
    code = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorswarm.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from tensorswarm.__main__ import run
sys.exit(run())
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_weights_file_is_what_it_was(processes: Processes, small: Model, tmp_path: Path) -> None:
    """A file chosen by --include comes out of `export` alone, bit for bit."""
    where = ("--store", small.store, "--json")
    result = processes.run(
        "export", small.id, tmp_path / "out", "--include", "*.safetensors", *where
    )
    assert result.document["files"] == 1
    wanted = sha256_of_files(small.folder)[WEIGHTS]
    assert sha256_of_files(tmp_path / "out") == {WEIGHTS: wanted}


def test_models_are_pinned_removed_and_collected(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    """rm frees what no other model needs; a pin stands in its way; gc finds nothing more."""
    store = copy_of(small, tmp_path / "store")
    assert processes.run("pin", small.id, "--store", store).exit_code == 0
    assert processes.run("ls", "--store", store, "--json").document["models"][0]["pinned"]
    assert_one_error(processes.run("rm", small.id, "--store", store, "--json"), 2)
    assert_one_error(processes.run("rm", "/no/such/path", "--store", store, "--json"), 2)
    processes.run("unpin", small.id, "--store", store)
    removed = processes.run("rm", small.id, "--store", store, "--json").document
    assert removed["removed"] == [small.id]
    assert removed["bytes_freed"] >= small.size_bytes
    assert processes.run("ls", "--store", store, "--json").document["models"] == []
    assert processes.run("gc", "--store", store, "--json").document["objects"] == 0
    assert_one_error(processes.run("rm", small.id, "--store", store, "--json"), 3)
