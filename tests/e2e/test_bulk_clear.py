"""``--bulk clear`` between real nodes: both have to want it, and the files are the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.host.pnet import write_new_key
from tensorswarm.p2p.node import LOOPBACK_LISTEN
from tensorswarm.p2p.node import Node as PeerNode
from tests.e2e.conftest import MIB, add
from tests.support.model_files import make_random_model, sha256_of_files
from tests.support.swarm_processes import Processes

pytestmark = pytest.mark.e2e

SIZES = {"large": 5 * MIB + 12, "small": 300}


@pytest.mark.parametrize("asking", ["clear", "tls"])
def test_a_model_comes_whole(processes: Processes, tmp_path: Path, asking: str) -> None:
    folder = make_random_model(tmp_path / "model", SIZES, seed=1)
    model = add(processes, folder, tmp_path / "store-1")
    node = processes.node(model.store, "--bulk", "clear")
    processes.fetch(
        model.id,
        tmp_path / "store-2",
        *("--bulk", asking, "--out", tmp_path / "out"),
        bootstrap=[node.addr],
    )
    assert sha256_of_files(tmp_path / "out") == sha256_of_files(folder)


@pytest.mark.parametrize("is_private", [False, True])
@pytest.mark.parametrize("asking", ["clear", "tls"])
def test_files_go_into_the_socket_only_where_both_want_it(
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asking: str,
    is_private: bool,
) -> None:
    key = tmp_path / "network.key"
    write_new_key(key)
    network = key if is_private else None
    folder = make_random_model(tmp_path / "model", SIZES, seed=1)
    model = add(processes, folder, tmp_path / "store-1")
    sent = 0
    real = os.sendfile

    def sendfile(to: int, source: int, offset: int, count: int) -> int:
        nonlocal sent
        taken = real(to, source, offset, count)
        sent += taken
        return taken

    monkeypatch.setattr(os, "sendfile", sendfile)

    async def main() -> None:
        listen = [LOOPBACK_LISTEN]
        async with (
            PeerNode(model.store, listen=listen, bulk="clear", network=network) as serving,
            PeerNode(
                tmp_path / "store-2", bootstrap=serving.addrs, bulk=asking, network=network
            ) as fetching,
        ):
            result = await fetching.fetch(model.id)
            assert result.bytes_peers == result.bytes_total

    trio.run(main)
    assert sent >= 5 * MIB if asking == "clear" else not sent
