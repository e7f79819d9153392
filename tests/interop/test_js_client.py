"""A client in JavaScript, written from docs/protocol.md and docs/format.md, on our node."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tensorswarm.p2p.control import wire, wire_limits
from tensorswarm.p2p.node import LOOPBACK_LISTEN, Node
from tensorswarm.store.digest import CHUNK_SIZE, chunk_list_of, digest_of, split_chunk_list
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.manifest import Manifest
from tests.support.interop import ROOT, JsError, JsPeer, js_command, js_peer
from tests.support.model_files import make_random_model, sha256_of_files
from tests.support.p2pd import go_peer

pytestmark = pytest.mark.interop

PATIENCE_S = 60
SIZES = {"large": 2 * CHUNK_SIZE + 100, "small": 4096, "one": CHUNK_SIZE}


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def in_time() -> None:
        with trio.fail_after(PATIENCE_S):
            await main()

    trio.run(in_time)


@asynccontextmanager
async def node_with_a_model(folder: Path) -> AsyncIterator[tuple[Node, Manifest, Path]]:
    files = make_random_model(folder / "model", SIZES, seed=5)
    async with Node(folder / "store", listen=[LOOPBACK_LISTEN]) as node:
        manifest = add_paths(node.store, [files]).manifest
        yield node, manifest, files


@asynccontextmanager
async def js_client(node: Node) -> AsyncIterator[JsPeer]:
    async with js_peer(server=False) as js:
        await js.do("connect", addr=node.addrs[0])
        yield js


def test_the_vectors_are_right_for_another_implementation() -> None:
    command = js_command("vectors.mjs", str(ROOT / "tests" / "vectors"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(count > 0 for count in json.loads(done.stdout).values())


def test_hello_what_we_hold_and_blobs(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_with_a_model(tmp_path) as (node, manifest, _), js_client(node) as js:
            hello = await js.do("hello", peer=node.peer_id)
            assert hello["version"] == wire_limits.PROTOCOL_VERSION
            assert hello["agent"].startswith("tensorswarm/")
            assert all(addr.startswith(("/ip4/127.0.0.1/", "/ip6/")) for addr in hello["addrs"])

            sizes = {ref.digest.hex(): ref.size_bytes for ref in manifest.objects}
            nowhere = digest_of(b"nobody has this").hex()
            said = await js.do("want", peer=node.peer_id, digests=[nowhere, *sizes])
            assert {entry["digest"]: entry["size"] for entry in said["entries"]} == sizes
            assert all(entry["whole"] for entry in said["entries"])

            model = manifest.digest.hex()
            told = await js.do("want_model", peer=node.peer_id, model=model, count=len(sizes))
            assert "models" in told["features"]
            assert told["whole"] == list(range(len(sizes)))
            with pytest.raises(JsError, match="code 5"):
                await js.do("want_model", peer=node.peer_id, model=nowhere, count=1)
            got = await js.do("blob", peer=node.peer_id, digest=model)
            assert got == {"bytes": len(manifest.encode()), "digest": model}
            got = await js.do("blob", peer=node.peer_id, digest=nowhere)
            assert got == {"bytes": None}
            large = max(sizes, key=lambda digest: sizes[digest])
            got = await js.do("blob", peer=node.peer_id, digest=large)  # in many frames
            assert got == {"bytes": sizes[large], "digest": large}

            hint = await js.do("chunk_digests", peer=node.peer_id, digest=large)
            assert (hint["size"], len(hint["chunks"])) == (sizes[large], 3)

    run(main)


def test_go_libp2p_carries_our_hello(tmp_path: Path) -> None:
    """The stream is go-libp2p's; what is said on it is encoded here."""

    async def main() -> None:
        async with Node(tmp_path / "store", listen=[LOOPBACK_LISTEN]) as node, go_peer() as go:
            await go.connect(node.addrs[0])
            stream = await go.open_stream(node.peer_id, wire_limits.PROTOCOL_ID)
            async with stream:
                await stream.send_all(wire.encode(wire.Hello(1, "go/1", (), (), ())))
                decoder = wire.FrameReader()
                while (answer := decoder.next_message()) is None:
                    decoder.feed(await stream.receive_some())
                assert isinstance(answer, wire.Hello)
                assert answer.agent.startswith("tensorswarm/")
                while not node.neighbours.is_neighbour(go.peer_id):
                    await trio.sleep(0)

    run(main)


# ---- the bulk plane over a libp2p stream


def test_a_chunk_over_a_libp2p_stream_has_its_blake3(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_with_a_model(tmp_path) as (node, manifest, _), js_client(node) as js:
            large = max(manifest.objects, key=lambda ref: ref.size_bytes)
            data = node.store.get_blob(large.digest, large.size_bytes)
            assert data is not None
            for index, digest in enumerate(split_chunk_list(chunk_list_of(data))):
                got = await js.do(
                    "chunk", peer=node.peer_id, digest=large.digest.hex(), index=index
                )
                length = min(CHUNK_SIZE, large.size_bytes - index * CHUNK_SIZE)
                assert got == {"bytes": length, "digest": digest.hex()}

    run(main)


def test_a_whole_model_over_libp2p_streams_is_the_same_files(tmp_path: Path) -> None:
    async def main() -> None:
        async with node_with_a_model(tmp_path) as (node, manifest, files), js_client(node) as js:
            got = await js.do("fetch_model", peer=node.peer_id, digest=manifest.digest.hex())
            assert got["files"] == sha256_of_files(files)

    run(main)


@pytest.mark.parametrize(
    ("hello", "size", "status"),
    [(False, SIZES["small"], 403), (True, SIZES["small"] + 1, 416)],
    ids=["no hello, no bytes", "more than there is"],
)
def test_what_is_refused_on_a_bulk_stream(
    hello: bool, size: int, status: int, tmp_path: Path
) -> None:
    async def main() -> None:
        async with node_with_a_model(tmp_path) as (node, manifest, _), js_client(node) as js:
            small = next(ref for ref in manifest.objects if ref.size_bytes == SIZES["small"])
            with pytest.raises(JsError, match=f", {status}$"):
                await js.do(
                    "range",
                    peer=node.peer_id,
                    digest=small.digest.hex(),
                    first=0,
                    last=size - 1,
                    hello=hello,
                )

    run(main)
