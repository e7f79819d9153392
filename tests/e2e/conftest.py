"""Models, their holders, and the processes of one test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.model_files import make_random_model
from tests.support.swarm_processes import Completed, Node, Processes

MIB = 1 << 20


@dataclass(frozen=True)
class Model:
    """A model's files, and a store that holds them.

    Attributes
    ----------
    folder, store : Path
        The files; the store.
    id : str
        The model id.
    size_bytes : int
        Size of the files.
    """

    folder: Path
    store: Path
    id: str
    size_bytes: int


def add(processes: Processes, folder: Path, store: Path, *arguments: str) -> Model:
    """Add a folder's files to a store, by the command line."""
    completed = processes.run("add", folder, "--store", store, "--json", *arguments)
    assert completed.exit_code == 0, completed
    document = completed.document
    return Model(folder, store, document["model"], document["bytes"])


def copy_of(model: Model, store: Path) -> Path:
    """Return another store with the same content, for another node."""
    not_ours = shutil.ignore_patterns("identity.*", "node.json", "dht.db*")
    shutil.copytree(model.store, store, ignore=not_ours)
    return store


def assert_one_error(completed: Completed, exit_code: int) -> None:
    """Check how a command failed: one document, one line for people, no traceback."""
    assert completed.exit_code == exit_code, completed
    assert completed.document["exit_code"] == exit_code
    assert completed.document["error"]
    assert completed.stderr.count("\n") == 1, completed
    assert completed.stderr.startswith("tensorswarm: error: ")


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Start processes that end with the test."""
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture(scope="session")
def lasting_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Start processes that end with the run. No test may stop them or write to their stores."""
    with Processes(tmp_path_factory.mktemp("processes")) as started:
        yield started


@pytest.fixture(scope="session")
def minilm(
    minilm_dir: Path, lasting_processes: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """Return MiniLM in a store that refers to its files where they lie."""
    store = tmp_path_factory.mktemp("minilm") / "store"
    return add(lasting_processes, minilm_dir, store, "--no-copy")


@pytest.fixture(scope="session")
def minilm_node(minilm: Model, lasting_processes: Processes) -> Node:
    """Return a node that holds MiniLM."""
    return lasting_processes.node(minilm.store)


@pytest.fixture(scope="session")
def small(lasting_processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Return a model of 24 MiB, in a few tensors of many chunks and some of one."""
    base = tmp_path_factory.mktemp("small")
    sizes = {"large": 16 * MIB + 5, "medium": 6 * MIB, "chunk": MIB, "half": MIB // 2, "tiny": 40}
    folder = make_random_model(base / "files", sizes, seed=1)
    return add(lasting_processes, folder, base / "store")


@pytest.fixture(scope="session")
def small_node(small: Model, lasting_processes: Processes) -> Node:
    """Return a node that holds the small model."""
    return lasting_processes.node(small.store)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 16 MiB; only root may mount one."""
    import subprocess

    from tests.support.tools import lacking, require_tool

    if os.geteuid() != 0:
        lacking("needs to be root, to mount a small disk")
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = [require_tool("mount"), "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        lacking("needs the right to mount a small disk")
    yield folder
    subprocess.run([require_tool("umount"), str(folder)], check=True)
