"""What is shipped: a wheel with real folders behind the links, all of our code, no tests."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.architecture import source_files
from tests.support.tools import lacking

ROOT = Path(__file__).resolve().parents[2]

SETUPTOOLS_NEEDED = 77
"""Its first version that reads our licence field; see pyproject.toml."""

SHIPPED = ("pyproject.toml", "LICENSE", "README.md", "p2p", "store", "simulations", "tensorswarm")

BUILD_SDIST = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what goes into a wheel: building leaves files in its source."""
    copy = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copyfile(source, copy / name)
    return copy


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    """Build a wheel: with the setuptools at hand, or with one that pip fetches."""
    version = int(importlib.metadata.version("setuptools").partition(".")[0])
    here = ["--no-build-isolation", "--no-index"] if version >= SETUPTOOLS_NEEDED else []
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", *here, "--wheel-dir", str(into), str(source), cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source_copy, tmp_path_factory.mktemp("wheel"))


def shipped_name(file: str) -> str:
    return file if file.startswith("tensorswarm/") else f"tensorswarm/{file}"


def test_wheel_holds_all_of_our_code_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {shipped_name(file) for file in source_files(ROOT)}
    assert "tensorswarm/py.typed" in names
    others = {name for name in names - modules if ".dist-info/" not in name}
    assert others == {"tensorswarm/py.typed"}


def test_wheel_has_each_part_under_the_import_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for pattern in (r"p2p/\w+\.py", r"store/\w+\.py", r"store/formats/\w+\.py"):
        assert any(re.fullmatch(f"tensorswarm/{pattern}", name) for name in names), pattern
    assert not any("test" in name.lower() for name in names)


def test_wheel_carries_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
    assert b"tensorswarm = tensorswarm.__main__:run" in archive.read(entry_points)


def test_installed_package_is_imported_without_libp2p(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tensorswarm;"
        "from tensorswarm.store import digest; assert 'libp2p' not in sys.modules;"
        "print(digest.__file__)"
    )
    where = run(sys.executable, "-P", "-c", code, str(tmp_path), cwd=tmp_path).strip()
    assert Path(where) == tmp_path / "tensorswarm" / "store" / "digest.py"


def test_sdist_holds_real_files(source_copy: Path, tmp_path: Path) -> None:
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS_NEEDED:
        lacking(f"needs setuptools {SETUPTOOLS_NEEDED}, which the extra 'test' brings")
    run(sys.executable, "-c", BUILD_SDIST, str(tmp_path), cwd=source_copy)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for file in source_files(ROOT):
        assert members[shipped_name(file)].isreg(), file
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


def test_every_folder_of_code_is_a_package() -> None:
    folders = {Path(file).parent for file in source_files(ROOT)}
    missing = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert not missing, f"these folders lack an __init__.py: {missing}"


def normal(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    return {normal(re.split(r"[<>=~!;\[ ]", line)[0]) for line in requirements}


def imported_modules() -> dict[str, str]:
    """Return the top-level modules that our code imports, each with a place."""
    found: dict[str, str] = {}
    for file in source_files(ROOT):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found.setdefault(name.partition(".")[0], f"{file}:{node.lineno}")
    return found


def test_declared_dependencies_are_those_imported() -> None:
    distributions = importlib.metadata.packages_distributions()
    # Of the extras, only those that our code imports.
    allowed, used = declared("sim", "plot", "torch"), set()
    undeclared = []
    for module, where in imported_modules().items():
        if module in sys.stdlib_module_names or module == "tensorswarm":
            continue
        providers = {normal(name) for name in distributions.get(module, [module])}
        used |= providers
        if not providers & allowed:
            undeclared.append(f"{where}: {module} is not in pyproject.toml's dependencies")
    assert not undeclared, "\n" + "\n".join(undeclared)
    assert allowed <= used, f"declared, but never imported: {sorted(allowed - used)}"


def test_constraints_pin_everything_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for line in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"not a plain pin: {line}"
    names = {normal(line.partition("==")[0]) for line in pins}
    assert len(names) == len(pins)
    assert declared("test", "check", "bench", "fuzz") <= names
