"""Looking round: which peers can be reached from here, and what they hold of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import trio

from tensorswarm.store import bitmap
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.errors import BadInput, NoSource, Refused, RemoteError
from tensorswarm.store.manifest import MAX_MANIFEST_BYTES, Manifest

from .control import wire
from .control.neighbour import Neighbour
from .host.addresses import PeerAddress, believable
from .node import Node

MAX_PEERS_MET = 64
"""Peers met besides the bootstraps: enough to see a swarm, few enough to be quick."""


async def survey(node: Node, digest: bytes, timeout_s: float) -> list[dict[str, Any]]:
    """Meet the bootstrap peers and those they know; return one row for each.

    Parameters
    ----------
    node : Node
        A running node.
    digest : bytes
        A model or tensor whose holders matter, or empty for anybody.
    timeout_s : float
        How long to wait for each peer.

    Returns
    -------
    list of dict
        ``peer_id``, ``agent``, ``addrs``, ``bulk``, ``via``, ``rtt_ms``, ``bytes_held``.

    Raises
    ------
    NoSource
        Nobody could be reached.
    """
    failed = await node.meet_bootstrap(timeout_s)
    if not node.neighbours.all():
        reasons = "; ".join(f"{address}: {reason}" for address, reason in failed.items())
        raise NoSource(f"nobody could be reached: {reasons}")
    rtts: dict[str, float] = {}
    known: dict[str, PeerAddress] = {}

    async def ask(neighbour: Neighbour) -> None:
        begun = trio.current_time()
        try:
            entries = await neighbour.get_peers(digest)
        except RemoteError:
            return  # it left; the others are still there
        rtts[neighbour.peer_id] = trio.current_time() - begun
        seen_at = node.neighbours.seen_at(neighbour.peer_id)
        for entry in entries:
            addrs = believable(entry.addrs, told_by=seen_at)
            if addrs:
                known[entry.peer_id] = PeerAddress(entry.peer_id, addrs)

    async def meet(peer: PeerAddress) -> None:
        try:
            await ask(await node.neighbours.meet(peer, timeout_s))
        except RemoteError:
            return  # a neighbour's hint that leads nowhere

    async with trio.open_nursery() as nursery:
        for neighbour in node.neighbours.all():
            nursery.start_soon(ask, neighbour)
    with trio.move_on_after(timeout_s):
        async with trio.open_nursery() as nursery:
            for peer in list(known.values())[:MAX_PEERS_MET]:
                nursery.start_soon(meet, peer)
        async with trio.open_nursery() as nursery:
            for neighbour in node.neighbours.all():
                nursery.start_soon(node.wait_path, neighbour.peer_id)
    held = await _held_bytes(node, digest) if digest else {}
    return [
        {
            "peer_id": neighbour.peer_id,
            "agent": neighbour.hello.agent,
            "addrs": list(neighbour.hello.addrs),
            "bulk": list(neighbour.hello.bulk),
            "via": node.path_to(neighbour.peer_id),
            "rtt_ms": round(1000 * rtts.get(neighbour.peer_id, 0.0), 2),
            "bytes_held": held.get(neighbour.peer_id, 0),
        }
        for neighbour in node.neighbours.all()
        if not digest or neighbour.peer_id in held
    ]


async def _held_bytes(node: Node, digest: bytes) -> dict[str, int]:
    """Return how many bytes of a model (or one object) each neighbour says it holds."""
    wanted = [digest]
    lists: dict[bytes, bytes] = {}
    try:
        manifest = node.store.manifest(digest) or await _ask_manifest(node, digest)
    except BadInput:
        manifest = None  # the digest is here, and a tensor's
    if manifest is not None:
        wanted += [ref.digest for ref in manifest.objects]
        lists = {ref.digest: ref.chunk_list for ref in manifest.objects}
    held: defaultdict[str, dict[bytes, int]] = defaultdict(dict)

    def listen(peer_id: str, entries: Sequence[wire.HaveEntry]) -> None:
        for entry in entries:
            size = entry.size_bytes
            if entry.bitmap is not None:
                if entry.chunk_list != lists.get(entry.digest, entry.chunk_list):
                    continue  # proved against another list: not of this model
                size = min(size, bitmap.count_set(entry.bitmap) * CHUNK_SIZE)
            held[peer_id][entry.digest] = size

    def listen_by_model(peer_id: str, message: wire.HaveModel) -> None:
        if manifest is None or message.model != digest:
            return
        known = held[peer_id]
        for ref in (ref for start, stop in message.runs() for ref in manifest.table[start:stop]):
            known[ref.digest] = ref.size_bytes
        for index, bits in message.parts:
            ref = manifest.table[index]
            known[ref.digest] = min(ref.size_bytes, bitmap.count_set(bits) * CHUNK_SIZE)

    async def ask_about(neighbour: Neighbour) -> None:
        if manifest is not None:
            try:
                await neighbour.want_model(digest, manifest.table, [(0, len(manifest.table))])
                await neighbour.want([digest])  # the manifest itself, which is held as well
                return
            except (NoSource, Refused):
                pass  # it does not know the model, and may hold some of its objects
        await neighbour.want(wanted)

    node.neighbours.have_listeners.append(listen)
    node.neighbours.have_model_listeners.append(listen_by_model)
    try:
        for neighbour in node.neighbours.all():
            try:
                await ask_about(neighbour)
                await neighbour.unwant(wanted)
            except RemoteError:
                continue  # it left; what it said so far counts
    finally:
        node.neighbours.have_listeners.remove(listen)
        node.neighbours.have_model_listeners.remove(listen_by_model)
    return {peer_id: sum(sizes.values()) for peer_id, sizes in held.items() if sizes}


async def _ask_manifest(node: Node, digest: bytes) -> Manifest | None:
    for neighbour in node.neighbours.all():
        try:
            data = (await neighbour.get_blobs({digest: MAX_MANIFEST_BYTES})).get(digest)
            if data is not None:
                return Manifest.decode(data)
        except (RemoteError, BadInput):
            continue  # it lied or left, or the digest names no manifest: ask the next
    return None
