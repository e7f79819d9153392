"""The rules of the house: who may import whom, how, and how large a file may grow.

The rules themselves are in `tests/support/architecture.py`. Here they are held against
the project, and against small trees that each break one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import architecture
from tests.support.architecture import Project

ROOT = Path(__file__).resolve().parents[2]

IO_FREE = (
    "p2p/swarm/*.py",
    "p2p/control/wire.py",
    "p2p/dht/announce_schedule.py",
    "p2p/dht/provider_table.py",
    "p2p/bulk/http1.py",
    "p2p/bulk/http1_small.py",
    "p2p/bulk/wire_plan.py",
    "p2p/origins/origin.py",
    "p2p/limits/fair_queue.py",
    "p2p/limits/patience.py",
    "p2p/reach/dcutr.py",
    "store/cid.py",
    "store/digest.py",
    "store/dtypes.py",
    "store/errors.py",
    "store/manifest.py",
    "store/names.py",
    "store/formats/*.py",
)
"""Parts that do no I/O: events in, actions out, with the time and chance as arguments."""

MAX_LINES = 600

NOT_OURS = {
    ".git", ".venv", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache",
    "__pycache__", "build", "dist", "model",
}  # fmt: skip

# Homes and working folders of whoever wrote a file. Pieced together, so that this file
# passes its own test.
MACHINE_PATH = re.compile(
    "|".join(
        (
            r"/hom" + r"e/[\w.-]+/",
            r"/User" + r"s/[\w.-]+/",
            r"/roo" + r"t/[\w.-]+",
            r"(?<![\w./-])/wor" + r"k/",
            r"/tm" + r"p/[\w.-]+/[\w.-]+/",
            r"[A-Z]:\\\\?User" + r"s\\",
        )
    )
)


@pytest.fixture(scope="module")
def project() -> Project:
    return Project.read(ROOT)


def io_free_files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for pattern in IO_FREE for path in root.glob(pattern)]


def our_files(*suffixes: str) -> Iterator[Path]:
    """Yield the project's own text files; links are not followed."""
    pending = [ROOT]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if path.is_symlink() or path.name in NOT_OURS or path.name.endswith(".egg-info"):
                continue
            if path.is_dir():
                pending.append(path)
            elif not suffixes or path.suffix in suffixes:
                yield path


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""  # a binary test vector has no lines to hold rules against


def complain(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


def test_arrows_go_one_way(project: Project) -> None:
    complain(architecture.wrong_arrows(project))


def test_arrows_between_the_rooms_of_p2p_go_one_way(project: Project) -> None:
    complain(architecture.wrong_rooms(project))
    rooms = {architecture.room_of(file) for file in project.trees} - {""}
    assert rooms == architecture.MAY_IMPORT_IN_P2P.keys()


def test_imports_are_relative_inside_a_folder_and_absolute_across(project: Project) -> None:
    complain(architecture.wrong_style(project))


def test_no_import_cycles(project: Project) -> None:
    complain(architecture.import_cycles(project))


@pytest.mark.parametrize("pattern", IO_FREE)
def test_list_of_io_free_parts_names_real_files(pattern: str) -> None:
    assert list(ROOT.glob(pattern)), f"{pattern} is gone: take it off the list IO_FREE"


def test_io_free_parts_do_no_io(project: Project) -> None:
    complain(architecture.io_in_io_free(project, io_free_files(ROOT)))


def test_simulations_use_io_free_parts_only(project: Project) -> None:
    complain(architecture.io_in_simulations(project, io_free_files(ROOT)))


def test_no_file_is_too_long() -> None:
    lengths = {path: text_of(path).count("\n") for path in our_files(".py", ".sh", ".yml", "")}
    complain(
        [
            f"{path.relative_to(ROOT)}:{lines}: more than {MAX_LINES} lines"
            for path, lines in lengths.items()
            if lines > MAX_LINES
        ]
    )


def test_no_machine_paths() -> None:
    complain(
        [
            f"{path.relative_to(ROOT)}:{number}: a path of somebody's machine: {found[0]}"
            for path in our_files()
            for number, line in enumerate(text_of(path).splitlines(), 1)
            if (found := MACHINE_PATH.search(line))
        ]
    )


# The rules must notice what they are there for: each of these trees breaks one.

Rule = Callable[[Project], list[str]]


def tree(root: Path, files: dict[str, str]) -> Project:
    for folder in architecture.FOLDERS:
        (root / folder).mkdir()
    for folder in architecture.LINKED:
        (root / architecture.FACE / folder).symlink_to(f"../{folder}")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Project.read(root)


def io_rule(*io_free: str) -> Rule:
    return lambda project: architecture.io_in_io_free(project, io_free)


def simulation_rule(*io_free: str) -> Rule:
    return lambda project: architecture.io_in_simulations(project, io_free)


BROKEN: dict[str, tuple[Rule, dict[str, str], str]] = {
    "store imports p2p": (
        architecture.wrong_arrows,
        {"store/a.py": "\nfrom tensorswarm.p2p.b import c\n", "p2p/b.py": ""},
        "store/a.py:2: store must not import p2p",
    ),
    "a room of p2p imports one above it": (
        architecture.wrong_rooms,
        {"p2p/host/a.py": "from ..control.b import c", "p2p/control/b.py": ""},
        "p2p/host/a.py:1: p2p/host must not import p2p/control",
    ),
    "a room of p2p imports what puts the rooms together": (
        architecture.wrong_rooms,
        {"p2p/swarm/a.py": "from ..node import b", "p2p/node.py": ""},
        "p2p/swarm/a.py:1: p2p/swarm must not import p2p/node.py",
    ),
    "store imports a missing part of p2p": (
        architecture.wrong_arrows,
        {"store/a.py": "import tensorswarm.p2p.gone"},
        "store/a.py:1: store must not import p2p",
    ),
    "store imports a folder from the face": (
        architecture.wrong_arrows,
        {"store/a.py": "from tensorswarm import p2p"},
        "store/a.py:1: store must not import p2p",
    ),
    "store imports trio in a function": (
        architecture.wrong_arrows,
        {"store/a.py": "def f():\n    import trio.socket"},
        "store/a.py:2: store must not import trio",
    ),
    "p2p imports the face": (
        architecture.wrong_arrows,
        {"p2p/a.py": "import tensorswarm", "tensorswarm/__init__.py": ""},
        "p2p/a.py:1: p2p must not import tensorswarm",
    ),
    "p2p imports simulations": (
        architecture.wrong_arrows,
        {"p2p/a.py": "from tensorswarm.simulations import b", "simulations/b.py": ""},
        "p2p/a.py:1: p2p must not import simulations",
    ),
    "relative import crosses folders": (
        architecture.wrong_style,
        {"p2p/a.py": "from ..store.b import c", "store/b.py": ""},
        "p2p/a.py:1: relative import crosses folders, use tensorswarm.store.b",
    ),
    "the face reaches through its links": (
        architecture.wrong_style,
        {"tensorswarm/a.py": "from .store import b", "store/b.py": ""},
        "tensorswarm/a.py:1: relative import crosses folders, use tensorswarm.store",
    ),
    "absolute import inside a folder": (
        architecture.wrong_style,
        {"store/a.py": "from tensorswarm.store.b import c", "store/b.py": ""},
        "store/a.py:1: inside a folder imports are relative",
    ),
    "bare folder name": (
        architecture.wrong_style,
        {"p2p/a.py": "from store.b import c", "store/b.py": ""},
        "p2p/a.py:1: import tensorswarm.store.b, not store.b",
    ),
    "cycle of three": (
        architecture.import_cycles,
        {
            "store/a.py": "from .b import x",
            "store/b.py": "\nfrom . import c",
            "store/c.py": "from .a import y",
        },
        "import cycle: store/a.py:1 -> store/b.py:2 -> store/c.py:1 -> store/a.py",
    ),
    "an I/O-free part imports the clock": (
        io_rule("p2p/a.py"),
        {"p2p/a.py": "import json\nimport time"},
        "p2p/a.py:2: import of time in an I/O-free part",
    ),
    "an I/O-free part imports one with I/O": (
        io_rule("p2p/a.py"),
        {"p2p/a.py": "from . import b", "p2p/b.py": "import socket"},
        "p2p/b.py:1: import of socket in an I/O-free part (it is loaded by the I/O-free p2p/a.py)",
    ),
    "an I/O-free part lies in a package with I/O": (
        io_rule("store/formats/a.py"),
        {"store/formats/a.py": "", "store/__init__.py": "import os.path"},
        "store/__init__.py:1: import of os.path in an I/O-free part"
        " (it is loaded by the I/O-free store/formats/a.py)",
    ),
    "an I/O-free part opens files": (
        io_rule("store/a.py"),
        {"store/a.py": "def f(path):\n    return open(path)"},
        "store/a.py:2: call of open() in an I/O-free part",
    ),
    "an I/O-free part takes real paths": (
        io_rule("store/a.py"),
        {"store/a.py": "from pathlib import Path, PurePosixPath"},
        "store/a.py:1: import of pathlib.Path in an I/O-free part",
    ),
    "an I/O-free part throws its own dice": (
        io_rule("p2p/a.py"),
        {"p2p/a.py": "import random\n\ndef f():\n    return random.choice([1, 2])"},
        "p2p/a.py:4: use of random.choice in an I/O-free part",
    ),
    "an I/O-free part makes its own generator": (
        io_rule("p2p/a.py"),
        {"p2p/a.py": "from random import Random\nDICE = Random(1)"},
        "p2p/a.py:2: a random generator of its own (take it as an argument) in an I/O-free part",
    ),
    "a simulation uses the real network": (
        simulation_rule("p2p/swarm.py"),
        {
            "simulations/a.py": "from tensorswarm.p2p.swarm import x\nimport tensorswarm.p2p.host",
            "p2p/swarm.py": "",
            "p2p/host.py": "",
        },
        "simulations/a.py:2: simulations must not import p2p/host.py, it is not I/O-free",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_noticed(name: str, tmp_path: Path) -> None:
    rule, files, complaint = BROKEN[name]
    assert rule(tree(tmp_path, files)) == [complaint]


def test_sound_tree_passes(tmp_path: Path) -> None:
    sound = tree(
        tmp_path,
        {
            "store/__init__.py": "",
            "store/digest.py": "from __future__ import annotations\nimport hashlib",
            "store/store.py": "import os\nfrom . import digest\nfrom .digest import x",
            "store/formats/a.py": "from ..digest import x\nfrom pathlib import PurePosixPath",
            "p2p/swarm.py": (
                "import random\nfrom tensorswarm.store.digest import x\n"
                "def f(rng: random.Random) -> float:\n    from .node import y\n"
                "    return rng.random()"
            ),
            "p2p/node.py": "import hashlib\nfrom .swarm import x",
            "tensorswarm/__init__.py": "from .face import load",
            "tensorswarm/face.py": "from tensorswarm.store import store",
            "simulations/a.py": "from random import Random\nfrom tensorswarm.p2p.swarm import x",
        },
    )
    io_free = ("p2p/swarm.py", "store/formats/a.py")
    assert len(sound.trees) == 9
    assert architecture.wrong_arrows(sound) == []
    assert architecture.wrong_style(sound) == []
    assert architecture.import_cycles(sound) == []
    assert architecture.io_in_io_free(sound, io_free) == []
    assert architecture.io_in_simulations(sound, io_free) == []


@pytest.mark.parametrize(
    ("line", "is_ours"),
    [
        ("see /hom" + "e/ada/model", True),
        ("C:\\User" + "s\\ada", True),
        ("/wor" + "k/main", True),
        ("/tm" + "p/a1/b2/c3", True),
        ("/usr/share/nginx/html", False),
        ("https://example.org/wor" + "k/1", False),
        ("docs/wor" + "k/plan.md", False),
        ("--out /tm" + "p/minilm", False),
    ],
)
def test_machine_paths_are_told_from_others(line: str, is_ours: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is is_ours
