"""Reads the project's imports and holds them against its rules.

The source is parsed, never run. A file is known by its path from the project's folder
(``store/digest.py``), whatever name it is imported by; the links in ``tensorswarm/``
are not followed, they only tell how a name maps to a file.

Every rule is a function from a `Project` to a list of complaints, each of which begins
with ``file:line``. `tests/unit/test_architecture.py` runs them over the real tree, and
over small broken ones to prove that they would notice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FACE = "tensorswarm"
LINKED = ("p2p", "store", "simulations")
FOLDERS = (FACE, *LINKED)

MAY_IMPORT = {
    "store": {"store"},
    "p2p": {"p2p", "store"},
    "simulations": {"simulations", "p2p", "store"},  # narrowed to I/O-free files below
    FACE: set(FOLDERS),
}
"""Which folders' files may import which folders. Arrows go one way."""

MAY_IMPORT_IN_P2P = {
    "limits": {"limits"},
    "swarm": {"swarm"},
    "host": {"host"},
    "reach": {"reach", "host", "limits"},
    "control": {"control", "host"},
    "dht": {"dht", "control", "host"},
    "bulk": {"bulk", "swarm", "host", "limits"},
    "origins": {"origins", "swarm", "limits"},
}
"""The same for the rooms of ``p2p``. Its files that are in no room put the rooms together."""

NOT_IN_STORE = {"libp2p", "trio", "httpx"}

NOT_IN_IO_FREE = {
    "asyncio", "fcntl", "http", "httpcore", "httpx", "libp2p", "mmap", "multiprocessing",
    "os", "requests", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "trio", "urllib3",
}  # fmt: skip
"""What would bring I/O, a clock, threads or chance of its own into a part without any."""

PURE_PATHS = {"PurePath", "PurePosixPath", "PureWindowsPath"}
"""The part of pathlib that never touches a disk."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name, resolved.

    Attributes
    ----------
    file, line
        Where it stands.
    module : str
        The module's full name, as Python would import it (``tensorswarm.store.digest``).
    name : str
        The name taken from the module, or ``""`` for ``import module``.
    level : int
        Number of leading dots; 0 for an absolute import.
    at_load : bool
        Whether it runs when the file is loaded: not in a function, not for types alone.
    target : str or None
        The project's file that is meant, None for anything outside the project.
    """

    file: str
    line: int
    module: str
    name: str
    level: int
    at_load: bool
    target: str | None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@dataclass(slots=True)
class Project:
    """The parsed files of the project's four folders."""

    root: Path
    trees: dict[str, ast.Module] = field(default_factory=dict)
    imports: list[Import] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> Project:
        project = cls(root)
        for file in source_files(root):
            source = (root / file).read_text(encoding="utf-8")
            project.trees[file] = ast.parse(source, filename=file)
        for file, tree in project.trees.items():
            project.imports += _imports_of(file, tree, project.trees.keys())
        return project

    def imports_of(self, file: str) -> list[Import]:
        return [found for found in self.imports if found.file == file]


def source_files(root: Path) -> list[str]:
    """Return the Python files of the four folders, without following links."""
    files: list[str] = []
    for folder in FOLDERS:
        pending = [root / folder]
        while pending:
            for path in pending.pop().iterdir():
                if path.is_symlink():
                    continue
                if path.is_dir() and path.name != "__pycache__":
                    pending.append(path)
                elif path.suffix == ".py":
                    files.append(path.relative_to(root).as_posix())
    return sorted(files)


def folder_of(file: str) -> str:
    return file.partition("/")[0]


def module_name(file: str) -> str:
    """Return the name by which a file is imported."""
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == FACE else [FACE, *parts])


def file_of(module: str, files: Iterable[str]) -> str | None:
    """Return the project's file behind a module's name, None when there is none."""
    parts = module.split(".")
    if parts[0] != FACE:
        return None
    parts = parts[1:] if len(parts) > 1 and parts[1] in LINKED else parts
    stem = "/".join(parts)
    return next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in files), None)


def _imports_of(file: str, tree: ast.Module, files: Iterable[str]) -> Iterator[Import]:
    package = module_name(file).split(".")
    if not file.endswith("/__init__.py"):
        package = package[:-1]
    for node, at_load in _walk(tree, at_load=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = file_of(alias.name, files)
                yield Import(file, node.lineno, alias.name, "", 0, at_load, target)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                module = ".".join([*base, module]) if module else ".".join(base)
            for alias in node.names:
                target = file_of(f"{module}.{alias.name}", files) or file_of(module, files)
                yield Import(file, node.lineno, module, alias.name, node.level, at_load, target)


def _walk(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below `node`, and whether it runs when the file is loaded."""
    for child in ast.iter_child_nodes(node):
        yield child, at_load
        inside = at_load and not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = False
        yield from _walk(child, inside)


# Rules: each returns complaints, an empty list when the rule is kept.


def wrong_arrows(project: Project) -> list[str]:
    """Check that no folder imports one it must not know."""
    complaints = []
    for found in project.imports:
        folder = folder_of(found.file)
        if found.top == FACE:
            target = _target_folder(found)
            if target not in MAY_IMPORT[folder]:
                complaints.append(f"{found.where}: {folder} must not import {target}")
        elif folder == "store" and found.top in NOT_IN_STORE:
            complaints.append(f"{found.where}: store must not import {found.top}")
    return complaints


def wrong_rooms(project: Project) -> list[str]:
    """Check that no room of ``p2p`` imports one it must not know."""
    complaints = []
    for found in project.imports:
        room = room_of(found.file)
        if room and found.target and folder_of(found.target) == "p2p":
            target = room_of(found.target)
            if target not in MAY_IMPORT_IN_P2P[room]:
                what = f"p2p/{target}" if target else found.target
                complaints.append(f"{found.where}: p2p/{room} must not import {what}")
    return complaints


def room_of(file: str) -> str:
    """Return the room of ``p2p`` that a file is in, or an empty text."""
    parts = file.split("/")
    return parts[1] if parts[0] == "p2p" and len(parts) > 2 else ""


def _target_folder(found: Import) -> str:
    if found.target is not None:
        return folder_of(found.target)
    parts = [*found.module.split("."), found.name]
    return parts[1] if parts[1] in LINKED else FACE


def wrong_style(project: Project) -> list[str]:
    """Check: relative inside a folder, ``tensorswarm.…`` across, no bare folder names."""
    complaints = []
    for found in project.imports:
        if found.level == 0 and found.top in LINKED:
            complaints.append(
                f"{found.where}: import tensorswarm.{found.module}, not {found.module}"
            )
        if found.level and found.top != FACE:
            complaints.append(f"{found.where}: relative import leaves the project")
        if found.top != FACE:
            continue
        same = _target_folder(found) == folder_of(found.file)
        if found.level and not same:
            complaints.append(f"{found.where}: relative import crosses folders, use {found.module}")
        if not found.level and same:
            complaints.append(f"{found.where}: inside a folder imports are relative")
    return complaints


def import_cycles(project: Project) -> list[str]:
    """Check that no files import each other in a circle while they are loaded."""
    edges: dict[str, dict[str, Import]] = {file: {} for file in project.trees}
    for found in project.imports:
        if found.at_load and found.target and found.target != found.file:
            edges[found.file].setdefault(found.target, found)
    complaints: list[str] = []
    done: set[str] = set()

    def visit(file: str, trail: list[str]) -> None:
        if file in trail:
            circle = trail[trail.index(file) :]
            steps = [edges[a][b].where for a, b in zip(circle, [*circle[1:], file], strict=True)]
            complaints.append("import cycle: " + " -> ".join([*steps, file]))
            return
        if file in done:
            return
        for target in edges[file]:
            visit(target, [*trail, file])
        done.add(file)

    for file in sorted(edges):
        visit(file, [])
    return complaints


def io_free_closure(project: Project, io_free: Iterable[str]) -> dict[str, str]:
    """Return every file that the I/O-free ones load, each with the file that asks for it.

    A part is I/O-free only if all that it imports is; packages' ``__init__`` count too,
    since Python runs them on the way.
    """
    reached = {file: file for file in io_free}
    pending = list(reached)
    while pending:
        file = pending.pop()
        wanted = [found.target for found in project.imports_of(file) if found.target]
        wanted += [f"{parent}/__init__.py" for parent in map(str, Path(file).parents)]
        for target in wanted:
            if target in project.trees and target not in reached:
                reached[target] = file
                pending.append(target)
    return reached


def io_in_io_free(project: Project, io_free: Iterable[str]) -> list[str]:
    """Check that the I/O-free files, and all that they load, are free of I/O."""
    complaints = []
    for file, wanted_by in sorted(io_free_closure(project, io_free).items()):
        because = "" if wanted_by == file else f" (it is loaded by the I/O-free {wanted_by})"
        complaints += [
            f"{file}:{line}: {what} in an I/O-free part{because}"
            for line, what in _impurities(project, file)
        ]
    return complaints


def _impurities(project: Project, file: str) -> Iterator[tuple[int, str]]:
    for found in project.imports_of(file):
        if found.top in NOT_IN_IO_FREE or found.module.startswith("urllib.request"):
            yield found.line, f"import of {found.module}"
        elif found.top == "pathlib" and found.name not in PURE_PATHS:
            yield found.line, f"import of pathlib.{found.name or '*'}"
        elif found.top == "random" and found.name not in ("", "Random"):
            yield found.line, f"import of random.{found.name}"
    has_random = any(found.module == "random" for found in project.imports_of(file))
    for node in ast.walk(project.trees[file]):
        if has_random and isinstance(node, ast.Attribute) and _is_name(node.value, "random"):
            if node.attr != "Random":
                yield node.lineno, f"use of random.{node.attr}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("open", "input", "print"):
                yield node.lineno, f"call of {called}()"
            elif called in ("Random", "random.Random"):
                yield node.lineno, "a random generator of its own (take it as an argument)"
            elif called.endswith(("datetime.now", "datetime.utcnow", "date.today")):
                yield node.lineno, f"call of {called}() (take the time as an argument)"


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def io_in_simulations(project: Project, io_free: Iterable[str]) -> list[str]:
    """Check that simulations take nothing from the other folders but I/O-free files."""
    allowed = io_free_closure(project, io_free)
    return [
        f"{found.where}: simulations must not import {found.target}, it is not I/O-free"
        for found in project.imports
        if folder_of(found.file) == "simulations"
        and found.target
        and folder_of(found.target) != "simulations"
        and found.target not in allowed
    ]
