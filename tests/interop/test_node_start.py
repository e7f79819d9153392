"""A node that does not come up leaves nothing behind, and says why in one error."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.node import Node
from tensorswarm.store.errors import LocalError
from tests.support.hosts import HERE, cancel_at_every_step, run


def test_a_node_can_be_cancelled_at_every_step_of_its_start(tmp_path: Path) -> None:
    async def main() -> None:
        assert await cancel_at_every_step(lambda: Node(tmp_path, listen=[HERE])) > 20
        async with Node(tmp_path, listen=[HERE]) as node:  # and what it held is free again
            assert node.addrs

    run(main)


def test_a_busy_bulk_port_is_told_in_one_error(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(LocalError, match=f"on 127.0.0.1 port {port} for bulk"):
                async with Node(tmp_path, listen=[HERE], bulk_port=port):
                    pass
        async with Node(tmp_path, listen=[HERE], bulk_port=port) as node:
            assert node.addrs

    run(main)


def test_an_error_inside_comes_out_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(KeyError, match="the body's own"):
            async with Node(tmp_path, listen=[HERE]):
                raise KeyError("the body's own")

    trio.run(main)
