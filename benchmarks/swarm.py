"""A swarm that starts at once, with nobody but a slow origin: how near it comes to the optimum.

N nodes, each a real process with a limited uplink, begin at the same word to fetch one
model. Its bytes are on an HTTP server of the same limit and nowhere else; a bootstrap node
knows the manifest and holds no tensor. They meet through it. The word is
said when all processes are at rest, having joined the network, or with `--cold` as soon as
they can take it. Measured are the last finisher, against the least time that chunks of 1 MiB
allow (M + floor(log2 N) rounds of a chunk's time), how many copies of the model the origin
gave, and the CPU time of all nodes. libtorrent does the same in the same run: a seed in the
place of the origin, the same file, limits and number of receivers, who know each other from
the start.

    scripts/bench swarm [--nodes 8] [--mib 64] [--limit 8MB/s] [--rounds 1] [--cold] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tensorswarm.p2p.limits.rates import parse_rate
from tensorswarm.store.cid import parse_reference
from tensorswarm.store.digest import CHUNK_SIZE
from tensorswarm.store.store import Store
from tests.support.http_origin import HttpOrigin

from .model import tensor_sizes, write_model
from .processes import ROOT, Server, cpu_seconds, python, read_line, run_json
from .report import Target, at_least_one, document, emit, spread, table
from .seeds import LISTEN

START_TIMEOUT_S = 120.0
"""Seconds for all processes to import libp2p, on few processors."""

FETCH_TIMEOUT_S = 300.0

REST_LOOK_S, REST_CPU = 0.5, 0.1
"""All processes together are at rest when they take less than this part of a processor for
so long."""

REST_TIMEOUT_S = 20.0
"""Longest wait for that."""

WANTED_RATIO, WANTED_COPIES = 1.25, 1.10


@dataclass(frozen=True)
class Round:
    """One round of one contender.

    Attributes
    ----------
    last_s, first_s : float
        From the word to the last and to the first receiver that has everything.
    copies : float
        What the origin gave, in sizes of the model.
    cpu_s : float
        CPU seconds of all receivers from the word on.
    dropped : int
        Sources that receivers gave up.
    """

    last_s: float
    first_s: float
    copies: float
    cpu_s: float
    dropped: int = 0


def optimum_s(nodes: int, size_bytes: int, bytes_per_s: float) -> float:
    """Return the least time in which chunks reach all: M + floor(log2 N) rounds.

    One line gives a chunk in a round, and who has it may give it in the next (Farley 1980;
    Mundinger, Weber, Weiss 2008).
    """
    chunks = size_bytes / CHUNK_SIZE
    return (chunks + nodes.bit_length() - 1) * CHUNK_SIZE / bytes_per_s


def receive(store: str, model: str, bootstrap: str, origin: str, limit: str) -> None:
    """Be one node: wait for the word, fetch, and tell how it went."""
    import trio

    from tensorswarm.p2p.node import Node

    async def main() -> None:
        async with Node(
            Path(store), listen=[LISTEN], bootstrap=[bootstrap], upload_limit=limit
        ) as node:
            await node.meet_bootstrap(START_TIMEOUT_S)
            print("ready", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            result = await node.fetch(model, origins=[origin])
            dropped = sum(source.dropped for source in result.sources)
            print(json.dumps({"dropped": dropped}), flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)  # gives to others until the end

    trio.run(main)


def receive_torrent(torrent: str, folder: str, limit: str) -> None:
    """Be one libtorrent client: read the others' ports, download, and tell."""
    from .torrent import new_session, parameters

    session = new_session(0)
    _limit_uploads(session, limit)
    handle = session.add_torrent(parameters(torrent, folder))
    print(session.listen_port(), flush=True)
    for port in json.loads(sys.stdin.readline()):
        handle.connect_peer(("127.0.0.1", port))
    while not handle.status().is_seeding:
        session.wait_for_alert(50)
        session.pop_alerts()
    print(json.dumps({"dropped": 0}), flush=True)
    sys.stdin.readline()


def seed_torrent(torrent: str, folder: str, limit: str) -> None:
    """Be libtorrent's seed; tell at the end how much was given."""
    from .torrent import new_session, parameters

    session = new_session(0)
    _limit_uploads(session, limit)
    handle = session.add_torrent(parameters(torrent, folder, seed_mode=True))
    while not handle.status().is_seeding:
        session.wait_for_alert(50)
        session.pop_alerts()
    print(session.listen_port(), flush=True)
    sys.stdin.readline()
    print(json.dumps({"given": handle.status().total_payload_upload}), flush=True)


def _limit_uploads(session: Any, limit: str) -> None:
    """Hold a libtorrent session's uploads below a rate, also to peers on loopback.

    Left alone it does not limit those of the local network.
    """
    import libtorrent

    everybody = libtorrent.ip_filter()
    everybody.add_rule("0.0.0.0", "255.255.255.255", 1 << libtorrent.session.global_peer_class_id)
    session.set_peer_class_filter(everybody)
    session.apply_settings({"upload_rate_limit": int(parse_rate(limit))})


class Crowd:
    """Receivers that begin at one word."""

    def __init__(self, commands: list[list[str]]) -> None:
        self._processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for command in commands
        ]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def ready(self) -> list[str]:
        """Return the line of each that says it is ready."""
        return [read_line(_pipe(each.stdout), START_TIMEOUT_S) for each in self._processes]

    def wait_at_rest(self) -> None:
        """Wait until the processes have little to do."""
        deadline = time.perf_counter() + REST_TIMEOUT_S
        before = self._cpu_s()
        while time.perf_counter() < deadline:
            time.sleep(REST_LOOK_S)
            after = self._cpu_s()
            if after - before < REST_CPU * REST_LOOK_S:
                return
            before = after

    def _cpu_s(self) -> float:
        return sum(cpu_seconds(each.pid) for each in self._processes)

    def go(self, words: str) -> tuple[list[float], float, int]:
        """Say the word; return when each was done, the CPU they took, and the dropped."""
        cpu_before = self._cpu_s()
        begun = time.perf_counter()
        for process in self._processes:
            say(process, words)
        seconds, dropped = [], 0
        for process in self._processes:
            told = json.loads(read_line(_pipe(process.stdout), FETCH_TIMEOUT_S))
            seconds.append(time.perf_counter() - begun)  # the last is exact, others at most
            dropped += told["dropped"]
        return seconds, self._cpu_s() - cpu_before, dropped


def say(process: subprocess.Popen[bytes], words: str) -> None:
    """Write a line to a process."""
    stream = _pipe(process.stdin)
    stream.write(f"{words}\n".encode())
    stream.flush()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def empty_store(source: Path, store: Path) -> str:
    """Make a store that has a model's manifest and chunk lists, and none of its tensors."""
    added = run_json(python("tensorswarm", "add", str(source), "--store", str(store), "--json"))
    model = str(added["model"])
    with Store(store) as opened:
        manifest = opened.manifest(parse_reference(model).digest)
        assert manifest is not None
        opened.forget([ref.digest for ref in manifest.objects])
    return model


def run_ours(work: Path, source: Path, args: argparse.Namespace) -> Round:
    """Let nodes fetch from an origin."""
    model = empty_store(source, work / "empty")
    stores = [work / f"node-{number}" for number in range(args.nodes)]
    where = ("--store", str(work / "empty"), "--listen", LISTEN, "--json")
    bootstrap = Server(python("tensorswarm", "node", *where))
    try:
        addr = json.loads(bootstrap.first_line)["addrs"][0]
        with HttpOrigin(source.parent, bytes_per_s=parse_rate(args.limit)) as origin:
            commands = [
                python(
                    "benchmarks.swarm", "--receive", str(store), model, addr, origin.url, args.limit
                )
                for store in stores
            ]
            with Crowd(commands) as crowd:
                crowd.ready()
                if not args.cold:
                    crowd.wait_at_rest()
                seconds, cpu_s, dropped = crowd.go("go")
            copies = origin.body_bytes_sent / source.stat().st_size
    finally:
        bootstrap.stop()
        for store in (work / "empty", *stores):
            shutil.rmtree(store, ignore_errors=True)
    return Round(max(seconds), min(seconds), copies, cpu_s, dropped)


def run_torrent(work: Path, source: Path, args: argparse.Namespace) -> Round:
    """Let libtorrent clients fetch from a seed."""
    from .torrent import make_torrent

    torrent = work / "model.torrent"
    make_torrent(source, torrent)
    folders = [work / f"torrent-{number}" for number in range(args.nodes)]
    seeding = python(
        "benchmarks.swarm", "--torrent-seed", str(torrent), str(source.parent), args.limit
    )
    seed = subprocess.Popen(seeding, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        port = read_line(_pipe(seed.stdout), START_TIMEOUT_S)
        commands = [
            python("benchmarks.swarm", "--torrent", str(torrent), str(folder), args.limit)
            for folder in folders
        ]
        with Crowd(commands) as crowd:
            ports = [int(port), *map(int, crowd.ready())]
            if not args.cold:
                crowd.wait_at_rest()
            seconds, cpu_s, dropped = crowd.go(json.dumps(ports))
            say(seed, "end")
            given = json.loads(read_line(_pipe(seed.stdout), START_TIMEOUT_S))["given"]
    finally:
        seed.kill()
        seed.wait()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return Round(max(seconds), min(seconds), given / source.stat().st_size, cpu_s, dropped)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="a swarm starts at once from one slow origin")
    parser.add_argument("--nodes", type=at_least_one, default=8)
    parser.add_argument("--mib", type=at_least_one, default=64, help="size of the model in MiB")
    parser.add_argument("--limit", metavar="RATE", default="8MB/s", help="of every uplink")
    parser.add_argument("--rounds", type=at_least_one, default=1)
    parser.add_argument("--cold", action="store_true", help="do not wait until all are at rest")
    parser.add_argument("--only", choices=("tensorswarm", "libtorrent"))
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's tmp)")
    parser.add_argument("--json", action="store_true")
    for hidden, count in (("--receive", 5), ("--torrent", 3), ("--torrent-seed", 3)):
        parser.add_argument(hidden, nargs=count, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.receive:
        receive(*args.receive)
    elif args.torrent:
        receive_torrent(*args.torrent)
    elif args.torrent_seed:
        seed_torrent(*args.torrent_seed)
    else:
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    contenders = {"tensorswarm": run_ours, "libtorrent": run_torrent}
    rounds: dict[str, list[Round]] = {name: [] for name in contenders if args.only in (None, name)}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        source = work / "source" / "model.safetensors"
        source.parent.mkdir()
        write_model(source, tensor_sizes(args.mib))
        least_s = optimum_s(args.nodes, source.stat().st_size, parse_rate(args.limit))
        for _ in range(args.rounds):
            for name, measured in rounds.items():
                measured.append(contenders[name](work, source, args))
    _report(args, rounds, least_s)


def _report(args: argparse.Namespace, rounds: dict[str, list[Round]], least_s: float) -> None:
    rows: list[tuple[object, ...]] = []
    summaries: dict[str, Any] = {}
    targets = []
    for name, measured in rounds.items():
        last = spread([one.last_s for one in measured])
        copies = spread([one.copies for one in measured])
        cpu = spread([one.cpu_s for one in measured])
        ratio = last.median / least_s
        dropped = sum(one.dropped for one in measured)
        rows.append((name, last.median, last.span, ratio, copies.median, cpu.median, dropped))
        summaries[name] = {
            "last_s": asdict(last),
            "ratio": ratio,
            "origin_copies": asdict(copies),
            "cpu_s": asdict(cpu),
            "dropped": dropped,
        }
        if name == "tensorswarm":
            targets = [
                Target("x the optimum", ratio, WANTED_RATIO, at_most=True),
                Target("copies from the origin", copies.median, WANTED_COPIES, at_most=True),
            ]
    emit(
        document(
            "swarm",
            nodes=args.nodes,
            mib=args.mib,
            limit=args.limit,
            rounds=args.rounds,
            optimum_s=least_s,
            contenders=summaries,
        ),
        f"{args.nodes} nodes, {args.mib} MiB, uplinks of {args.limit}; "
        f"no less than {least_s:.1f} s is possible\n\n"
        + table(
            ("", "last s", "from-to", "/optimum", "origin copies", "CPU s of all", "dropped"),
            rows,
        ),
        targets,
        as_json=args.json,
    )


if __name__ == "__main__":
    main()
