"""Rates that a person sets are held by real processes, and nobody is blamed for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Model, assert_one_error, copy_of
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

LIMIT = 2_400_000.0
"""Bytes per second: the small model takes ten seconds."""

LOW_LIMIT = 50_000.0
"""The lowest that must work: its smaller half of a MiB takes as long."""


def test_limits_are_held(processes: Processes, small: Model, tmp_path: Path) -> None:
    """Four fetches at once: from a limited node, and with a limit of their own.

    The lower bound leaves room for what a fetch does before its first byte.
    """
    free = processes.start_node(copy_of(small, tmp_path / "free"))
    limited = processes.start_node(copy_of(small, tmp_path / "a"), "--upload-limit", "2.4MB/s")
    low = processes.start_node(copy_of(small, tmp_path / "b"), "--upload-limit", "400kbit")
    origin = processes.nginx(small.folder)
    for node in (free, limited, low):
        node.wait_ready()
    some = ("--include", "half")
    fetches = {
        "upload": (
            LIMIT,
            processes.start_fetch(small.id, tmp_path / "1", bootstrap=[limited.addr]),
        ),
        "download": (
            LIMIT,
            processes.start_fetch(
                small.id,
                tmp_path / "2",
                *("--download-limit", "2.4M", "--origin", origin.url),
                bootstrap=[free.addr],
            ),
        ),
        "low upload": (
            LOW_LIMIT,
            processes.start_fetch(small.id, tmp_path / "3", *some, bootstrap=[low.addr]),
        ),
        "low download": (
            LOW_LIMIT,
            processes.start_fetch(
                small.id,
                tmp_path / "4",
                *(*some, "--download-limit", "50k", "--origin", origin.url),
                bootstrap=[free.addr],
            ),
        ),
    }
    for name, (limit, fetch) in fetches.items():
        result = fetch.complete()
        assert result.exit_code == 0, (name, result)
        document = result.document
        rate = document["bytes_total"] / document["seconds"]
        assert 0.75 * limit < rate <= 1.05 * limit, (name, rate)
        assert not any(source["dropped"] for source in document["sources"]), (name, result)
        assert document["bytes_wasted"] == 0, (name, result)
        kinds = {source["kind"] for source in document["sources"]}
        # Beside four downloads at once an origin may be found too late to give anything.
        assert name != "download" or "peer" in kinds, result


@pytest.mark.parametrize("command", [["node"], ["fetch", "b" + "a" * 58]])
@pytest.mark.parametrize(
    ("option", "text"),
    [("--upload-limit", "fast"), ("--download-limit", "5Mb"), ("--upload-limit", "1")],
)
def test_a_bad_rate_is_told_in_one_line(
    processes: Processes, tmp_path: Path, command: list[str], option: str, text: str
) -> None:
    result = processes.run(*command, "--store", tmp_path / "store", "--json", option, text)
    assert_one_error(result, 2)
    assert option in result.stderr and text in result.stderr
