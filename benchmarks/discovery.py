"""The DHT at scale: announcing, finding, and what is left after a crash.

A network of nodes in this process, on loopback, each with its own host. One of them
announces keys; fresh nodes look for them. py-libp2p's own ``provide`` runs in the same
network, for a few keys, beside it. Whole nodes join it to fetch a fine-tune, of which the
base's tensors are with another peer, and its look-ups are counted.

    scripts/bench discovery --nodes 100 --keys 5000

CPU is that of the whole process, so it holds what receivers spend as well as the sender.
Republishing over 22 hours runs on a clock that the benchmark moves.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import trio
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr
from safetensors.numpy import save_file

from tensorswarm.p2p.dht.announce_schedule import REPUBLISH_S
from tensorswarm.p2p.dht.discovery import Discovery
from tensorswarm.p2p.host.host import Host
from tensorswarm.p2p.node import Node
from tensorswarm.store.cid import dht_key, model_cid
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store

from .report import Target, at_least_one, document, emit, spread, table

SEED = 1
LISTEN = "127.0.0.1:0"
SEARCHERS = 3
LOOK_UPS_TIMED = 100
PARALLEL_SEARCHES = 4
"""By one fresh node: here all that answer it share one processor with it."""

STOCK_KEYS = 20
REPLACEMENT_STEPS = 6
SHARED_TENSORS = 6
PATIENCE_S = 120.0
"""Time for one look-up, for one meeting: what no machine comes near. How long they take is
measured; whether a key is found must not depend on it."""

CHECKED_KEYS = 500
"""Keys looked for after a crash: a sample, of which 99 % are five that may be missing."""


class Network:
    """Nodes that come and go, on a clock that can be moved."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.now = 1e9
        self.nodes: dict[str, tuple[Host, Discovery, trio.CancelScope]] = {}
        self._nursery = nursery
        self._rng = random.Random(SEED)

    async def join(self, *, server: bool = True) -> tuple[Host, Discovery]:
        """Start a node that knows one other, chosen by chance."""
        known = [host.addrs()[0] for host, _, _ in self.nodes.values()]
        host, discovery, scope = await self._nursery.start(self._run, server)
        if known:
            await discovery.bootstrap([self._rng.choice(known)], PATIENCE_S)
        if server:
            self.nodes[host.peer_id] = (host, discovery, scope)
        return host, discovery

    async def _run(self, server: bool, task_status: trio.TaskStatus[Any]) -> None:
        with trio.CancelScope() as scope:
            async with Host(listen=[LISTEN]) as host, trio.open_nursery() as nursery:
                discovery = Discovery(host, server=server, clock=lambda: self.now)
                await nursery.start(discovery.run)
                task_status.started((host, discovery, scope))
                await trio.sleep_forever()

    def kill(self, peer_id: str) -> None:
        """End a node."""
        self.nodes.pop(peer_id)[2].cancel()


@asynccontextmanager
async def network(size: int) -> AsyncIterator[Network]:
    """Run a network of `size` nodes."""
    async with trio.open_nursery() as nursery:
        net = Network(nursery)
        for _ in range(size):
            await net.join()
        yield net
        nursery.cancel_scope.cancel()


async def is_found(discovery: Discovery, digest: bytes, peer_id: str) -> bool:
    """Look for a key until a certain provider is named."""
    async with discovery.find_providers(digest, timeout_s=PATIENCE_S) as providers:
        async for provider in providers:
            if provider.peer_id == peer_id:
                return True
    return False


async def share_found(discovery: Discovery, digests: Sequence[bytes], peer_id: str) -> float:
    """Return which part of the keys is found."""
    found: list[bool] = []
    limiter = trio.CapacityLimiter(PARALLEL_SEARCHES)

    async def look(digest: bytes) -> None:
        async with limiter:
            found.append(await is_found(discovery, digest, peer_id))

    async with trio.open_nursery() as nursery:
        for digest in digests:
            nursery.start_soon(look, digest)
    return sum(found) / len(digests)


async def measure_announcing(net: Network, keys: Sequence[bytes], checked: int) -> dict[str, Any]:
    """Have one node announce keys; return time, CPU, messages, and who finds them.

    Each of the fresh nodes looks for `checked` keys, another part of all for each.
    """
    host, announcer, _ = next(iter(net.nodes.values()))
    cpu, begun = time.process_time(), time.perf_counter()
    outcome = await announcer.announce(keys)
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    counters = announcer.statistics()
    messages = counters["records_sent"] + counters["questions_sent"]
    readable = []
    for number in range(SEARCHERS):
        _, searcher = await net.join(server=False)
        part = [keys[(number * checked + i) % len(keys)] for i in range(min(checked, len(keys)))]
        readable.append(await share_found(searcher, part, host.peer_id))
    return {
        "seconds": seconds,
        "confirmed": len(outcome.confirmed) / len(keys),
        "cpu_ms_per_key": 1000 * cpu_s / len(keys),
        "messages_per_key": messages / len(keys),
        "look_ups": counters["look_ups"],
        "streams": counters["streams"],
        "readable": min(readable),
    }


async def measure_look_ups(net: Network, keys: Sequence[bytes], peer_id: str) -> list[float]:
    """Return the milliseconds until a provider is named, at a warm node.

    Of keys whose records it does not keep itself: it has to ask.
    """
    searcher = list(net.nodes.values())[-1][1]
    await share_found(searcher, keys[:20], peer_id)
    asked = [key for key in keys[20:] if not searcher.dht.records.others(dht_key(key))]
    taken = []
    for digest in asked[:LOOK_UPS_TIMED] or keys[:LOOK_UPS_TIMED]:
        begun = time.perf_counter()
        await is_found(searcher, digest, peer_id)
        taken.append(1000 * (time.perf_counter() - begun))
    return taken


async def measure_stock(net: Network) -> dict[str, Any]:
    """Have py-libp2p's own DHT announce in the same network, key after key."""
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(Host(listen=[LISTEN]))
        dht = KadDHT(host.libp2p, DHTMode.CLIENT)
        for other, _, _ in net.nodes.values():
            await host.connect(other.addrs()[0])
            addrs = [Multiaddr(addr) for addr in other.advertised_addrs()]
            await dht.routing_table.add_peer(PeerInfo(ID.from_string(other.peer_id), addrs))
        keys = [os.urandom(32) for _ in range(STOCK_KEYS)]
        cpu, begun = time.process_time(), time.perf_counter()
        said_true = 0
        for digest in keys:
            said_true += await dht.provider_store.provide(dht_key(digest))
        seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
        _, searcher = await net.join(server=False)
        return {
            "seconds_per_key": seconds / len(keys),
            "cpu_ms_per_key": 1000 * cpu_s / len(keys),
            "said_true": said_true / len(keys),
            "readable": await share_found(searcher, keys, host.peer_id),
        }


def write_model(path: Path, head_seed: int) -> Path:
    """Write a model of 2 MiB tensors; two of them differ in their heads alone."""
    tensors = {f"layer.{seed}": random_tensor(seed) for seed in range(SHARED_TENSORS)}
    save_file({**tensors, "head": random_tensor(head_seed)}, path)
    return path


def random_tensor(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return 2 MiB that nobody else has."""
    return np.random.default_rng(seed).integers(0, 256, 2 << 20, dtype=np.uint8)


async def measure_fine_tune(net: Network, folder: Path) -> dict[str, Any]:
    """Fetch a fine-tune of which one peer has the new tensor, and the base's peer the others.

    Returns
    -------
    dict
        ``look_ups`` that the fetch made, and the ``givers`` of more than a tensor's half.
    """
    with Store(folder / "base") as store:
        add_paths(store, [write_model(folder / "base.safetensors", 100)])
    with Store(folder / "whole") as store:
        tuned = add_paths(store, [write_model(folder / "tuned.safetensors", 101)])
    model = model_cid(tuned.manifest.digest)
    entrances = [host.addrs()[0] for host, _, _ in net.nodes.values()]

    def node(name: str, *, server: bool = True) -> Node:
        known = random.Random(name).sample(entrances, 1)
        return Node(folder / name, listen=[LISTEN], bootstrap=known, server=server)

    async with node("part") as part:
        async with node("whole") as whole:
            first = await part.fetch(model, include=["head"])
            assert {source.id for source in first.sources if source.bytes} == {whole.peer_id}
        async with node("base") as base:
            while base.discovery.statistics()["announced"] < SHARED_TENSORS + 2:
                await trio.sleep(0.1)
            async with node("new", server=False) as newcomer:
                result = await newcomer.fetch(model)
                return {
                    "look_ups": newcomer.discovery.searches,
                    "givers": sum(source.bytes > 1 << 20 for source in result.sources),
                    "seconds": result.seconds,
                }


async def announced(announcer: Discovery) -> None:
    """Have a node announce whatever is due at the time, and wait until it has."""
    while announcer.statistics()["next_due_s"] <= 0:
        changed = trio.Event()
        announcer.listeners.append(changed.set)
        announcer.wake()
        await changed.wait()
        announcer.listeners.remove(changed.set)


async def measure_crash(
    net: Network, keys: Sequence[bytes], peer_id: str, steps: int = REPLACEMENT_STEPS
) -> dict[str, Any]:
    """Kill 30 % of the nodes at once, then replace all over one republish period."""
    rng = random.Random(SEED)
    sample = rng.sample(list(keys), min(CHECKED_KEYS, len(keys)))
    others = [name for name in net.nodes if name != peer_id]
    size = len(others)
    for name in rng.sample(others, 3 * size // 10):
        net.kill(name)
    _, searcher = await net.join(server=False)
    after_crash = await share_found(searcher, sample, peer_id)
    say("30 % of the nodes were killed")
    announcer = net.nodes[peer_id][1]
    old = [name for name in net.nodes if name != peer_id]
    for step in range(steps):
        for name in old[step::steps]:
            net.kill(name)
            await net.join()
        while len(net.nodes) < (size * (step + 1)) // steps:
            await net.join()
        net.now += 1.1 * REPUBLISH_S / steps
        await announced(announcer)
        say(f"{step + 1} of {steps} parts of the nodes are replaced")
    _, searcher = await net.join(server=False)
    after_replacement = await share_found(searcher, sample, peer_id)
    return {"after_crash": after_crash, "after_replacement": after_replacement}


async def measure(nodes: int, keys: int, checked: int, *, crash: bool) -> dict[str, Any]:
    """Measure everything in one network."""
    rng = random.Random(SEED)
    digests = [rng.randbytes(32) for _ in range(keys)]
    begun, cpu = time.perf_counter(), time.process_time()
    async with network(nodes) as net:
        joining = {
            "seconds": time.perf_counter() - begun,
            "cpu_ms_per_node": 1000 * (time.process_time() - cpu) / nodes,
        }
        peer_id = next(iter(net.nodes))
        say(f"{nodes} nodes have joined in {joining['seconds']:.0f} s")
        announcing = await measure_announcing(net, digests, checked)
        say(f"{keys} keys are announced in {announcing['seconds']:.0f} s, and looked for")
        look_up_ms = sorted(await measure_look_ups(net, digests, peer_id))
        say("look-ups are timed")
        stock = await measure_stock(net)
        say("py-libp2p's own DHT has announced")
        with TemporaryDirectory() as folder:
            fine_tune = await measure_fine_tune(net, Path(folder))
        say("a fine-tune is fetched")
        result: dict[str, Any] = {
            "joining": joining,
            "announcing": announcing,
            "look_up_ms": asdict(spread(look_up_ms)),
            "look_up_p95_ms": look_up_ms[int(0.95 * (len(look_up_ms) - 1))],
            "stock": stock,
            "fine_tune": fine_tune,
        }
        if crash:
            result["crash"] = await measure_crash(net, digests, peer_id)
    return result


def say(line: str) -> None:
    """Tell whoever waits how far it has come."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="announcing and finding on the DHT")
    parser.add_argument("--nodes", type=at_least_one, default=100)
    parser.add_argument("--keys", type=at_least_one, default=5_000)
    parser.add_argument("--checked", type=int, default=1_700, help="keys each fresh node reads")
    parser.add_argument("--no-crash", dest="crash", action="store_false")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = trio.run(lambda: measure(args.nodes, args.keys, args.checked, crash=args.crash))
    ours, stock = result["announcing"], result["stock"]
    targets = [
        Target("of the keys are readable from each fresh node", ours["readable"], 1.0),
        Target("ms, 95th percentile of look-ups", result["look_up_p95_ms"], 150, at_most=True),
        Target("look-ups to fetch a fine-tune", result["fine_tune"]["look_ups"], 5, at_most=True),
    ]
    if args.nodes <= 20:
        targets.append(Target("s to announce them", ours["seconds"], 5, at_most=True))
    if args.crash:
        crash = result["crash"]
        targets += [
            Target("of the keys are found after 30 % crash", crash["after_crash"], 0.99),
            Target("are found after all are replaced", crash["after_replacement"], 0.99),
        ]
    rows = [
        (
            "tensorswarm",
            1000 * ours["seconds"] / args.keys,
            ours["cpu_ms_per_key"],
            ours["messages_per_key"],
            ours["readable"],
        ),
        (
            "py-libp2p provide",
            1000 * stock["seconds_per_key"],
            stock["cpu_ms_per_key"],
            "-",
            stock["readable"],
        ),
    ]
    emit(
        document("discovery", nodes=args.nodes, keys=args.keys, **result),
        table(("announcing", "ms/key", "CPU ms/key", "messages/key", "readable"), rows),
        targets,
        as_json=args.json,
    )
