"""A plain py-libp2p stream as a contender: TCP, Noise, yamux, nothing verified."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import trio
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from .processes import own_cpu_seconds

PROTOCOL = TProtocol("/benchmark/file/1")
BLOCK_BYTES = 256 << 10
"""Bytes read and written at a time."""

LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")


async def serve(source: str) -> None:
    """Send one file on every stream until terminated; print the address first."""

    async def send(stream: INetStream) -> None:
        with Path(source).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                await stream.write(block)
        await stream.close()

    host = new_host(key_pair=create_new_key_pair())
    async with host.run([LOOPBACK]):
        host.set_stream_handler(PROTOCOL, send)
        print(json.dumps(str(host.get_addrs()[0])), flush=True)
        await trio.sleep_forever()


async def fetch(target: str, size: str, described: str) -> dict[str, float]:
    """Receive `size` bytes into a file."""
    host = new_host(key_pair=create_new_key_pair())
    async with host.run([LOOPBACK]):
        server = info_from_p2p_addr(Multiaddr(json.loads(described)))
        begun, cpu = time.perf_counter(), own_cpu_seconds()
        await host.connect(server)
        stream = await host.new_stream(server.peer_id, [PROTOCOL])
        left = int(size)
        with (Path(target) / "file").open("wb", buffering=0) as file:
            while left and (block := await stream.read(BLOCK_BYTES)):
                file.write(block)
                left -= len(block)
        figures = {"seconds": time.perf_counter() - begun, "cpu_s": own_cpu_seconds() - cpu}
        await stream.close()
    if left:
        raise RuntimeError(f"the stream ended {left} bytes early")
    return figures


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
