"""Private networks, and models that are for some peers only, among real processes."""

from __future__ import annotations

import contextlib
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import tensorswarm
from tensorswarm.store.errors import NoSource
from tests.e2e.conftest import Model, assert_one_error, copy_of
from tests.support.swarm_processes import Processes


def test_a_stranger_to_a_private_network_gets_nothing(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    key = tmp_path / "network.key"
    made = processes.run("network-key", key, "--json")
    assert made.exit_code == 0 and len(made.document["network"]) == 16
    node = processes.node(copy_of(small, tmp_path / "holder"), "--network", key)
    member = processes.fetch(small.id, tmp_path / "member", "--network", key, bootstrap=[node.addr])
    assert member.exit_code == 0, member
    assert member.document["bytes_peers"] >= small.size_bytes - 1000
    library: dict[str, Any] = {"bootstrap": [node.addr], "network": key, "timeout_s": 60}
    folder = tensorswarm.fetch(small.id, store=tmp_path / "by-fetch", **library)
    assert (folder / "model.safetensors").stat().st_size > small.size_bytes / 2
    assert tensorswarm.load(small.id, store=tmp_path / "by-load", **library)
    assert dict(tensorswarm.stream(small.id, store=tmp_path / "by-stream", **library))
    with pytest.raises(NoSource):
        plainly = {**library, "network": None, "timeout_s": 1}
        tensorswarm.fetch(small.id, store=tmp_path / "plainly", **plainly)
    other_key = tmp_path / "other.key"
    processes.run("network-key", other_key, "--json")
    for arguments in ((), ("--network", other_key)):
        options = ("--timeout", "2", *arguments)
        stranger = processes.fetch(
            small.id, tmp_path / "stranger", *options, bootstrap=[node.addr], expected=4
        )
        assert_one_error(stranger, 4)
    # Whoever speaks plainly is not even told which protocols there are.
    host, port = node.addr.split("/")[2], int(node.addr.split("/")[4])
    with socket.create_connection((host, port), timeout=5) as plain:
        plain.sendall(b"\x13/multistream/1.0.0\n")
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while len(answer) < 64 and (data := plain.recv(64)):
                answer += data
        assert b"multistream" not in answer


def test_a_model_for_some_is_refused_to_others_like_one_that_is_missing(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    for name in ("friend", "stranger"):  # their ids have to be known before
        processes.node(tmp_path / name).kill()
    friend = processes.node(tmp_path / "friend")
    store = copy_of(small, tmp_path / "holder")
    shared = processes.run("share", small.id, "--only", friend.peer_id, "--store", store, "--json")
    assert shared.document == {"model": small.id, "announced": False, "only": [friend.peer_id]}
    friend.kill()
    node = processes.node(store, "--http", "127.0.0.1:0")
    missing = "ab" * 31 + "cd"
    refusals = [
        processes.fetch(ref, tmp_path / "stranger", bootstrap=[node.addr], expected=7)
        for ref in (small.id, missing)
    ]
    for refused in refusals:
        assert_one_error(refused, 7)
        assert "not here, or not for you" in refused.document["error"]
    got = processes.fetch(small.id, tmp_path / "friend", bootstrap=[node.addr])
    assert got.exit_code == 0, got
    url = f"{node.document['http']}/model/{small.id}/model.safetensors"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url, timeout=10)
    shown = processes.run("peers", "--dht", "--store", store, "--json", "--bootstrap", node.addr)
    assert shown.document["dht"]["keys"] == 0


def test_what_is_shared_with_nobody_in_particular(
    processes: Processes, small: Model, tmp_path: Path
) -> None:
    store = copy_of(small, tmp_path / "store")
    where = ("--store", store, "--json")
    assert processes.run("share", small.id, "--private", *where).document["announced"] is False
    assert processes.run("share", small.id, *where).document["announced"] is False
    assert processes.run("share", small.id, "--public", *where).document["announced"] is True
    assert_one_error(processes.run("share", small.id, "--only", "nobody", *where), 2)
    assert_one_error(processes.run("share", "ab" * 32, *where), 2)
