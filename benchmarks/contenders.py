"""Who takes part: each knows how to serve a file and how to have it fetched.

A contender is made for one source file and one folder of its own. `prepare` is called
once; `start` and `stop` as often as wanted, and `run` while it is started. Every receiver
is a fresh process.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from .processes import (
    RUN_TIMEOUT_S,
    Server,
    children_cpu_seconds,
    cpu_seconds,
    memory_bytes,
    python,
    run_json,
)


@dataclass(frozen=True)
class Measurement:
    """One transfer: wall seconds, CPU seconds of both sides, memory growth in bytes."""

    seconds: float
    cpu_receiver_s: float
    cpu_server_s: float
    memory_receiver: int = 0
    memory_server: int = 0


class Contender(ABC):
    """A way to get a file from one process to another.

    Parameters
    ----------
    source : Path
        The file to serve.
    work : Path
        A folder for its own use.

    Attributes
    ----------
    name : str
        What it is called in tables.
    served : Path
        File or folder whose bytes it serves: what is warm or cold.
    """

    name: str
    needs_module = ""
    needs_program = ""

    def __init__(self, source: Path, work: Path) -> None:
        self.source = self.served = source
        self.work = work
        self.size = str(source.stat().st_size)
        self.server: Server | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Return what it would need and this machine lacks."""
        if cls.needs_module and importlib.util.find_spec(cls.needs_module) is None:
            return f"the Python package {cls.needs_module}"
        if cls.needs_program and find_program(cls.needs_program) is None:
            return cls.needs_program
        return None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Do what is done once: make a torrent, fill a store."""

    def start(self) -> None:  # noqa: B027 - `cp` has no server
        """Start serving."""

    @abstractmethod
    def run(self, target: Path) -> Measurement:
        """Have the file fetched into an empty folder."""

    def stop(self) -> None:
        """Stop serving."""
        if self.server is not None:
            self.server.stop()
            self.server = None

    def _serve_copy(self) -> None:
        """Serve a file of its own: what one has mapped would never be cold for others."""
        self.source = self.served = Path(shutil.copy(self.source, self.work))

    def _receive(self, *arguments: str) -> Measurement:
        """Run one of `receivers`, which accounts for itself, and account for the server."""
        assert self.server is not None
        before, memory = self._server_cpu_s(), memory_bytes(self.server.pid, "VmRSS")
        figures = run_json(python("benchmarks.receivers", *arguments))
        return Measurement(
            figures["seconds"],
            figures["cpu_s"],
            self._server_cpu_s() - before,
            int(figures["memory_after"] - figures["memory_before"]),
            max(0, memory_bytes(self.server.pid, "VmHWM") - memory),
        )

    def _run_program(self, *command: str) -> Measurement:
        """Run a program to its end: its start, some milliseconds, counts as well."""
        before, children = self._server_cpu_s(), children_cpu_seconds()
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=RUN_TIMEOUT_S)
        seconds = time.perf_counter() - begun
        return Measurement(
            seconds, children_cpu_seconds() - children, self._server_cpu_s() - before
        )

    def _server_cpu_s(self) -> float:
        return cpu_seconds(self.server.pid) if self.server else 0.0


def find_program(name: str) -> str | None:
    """Return a program's path; servers are often where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class Tensorswarm(Contender):
    """Ourselves: TLS, every chunk verified, into an empty store."""

    name = "tensorswarm"
    bulk = "tls"
    add_options: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Add the model to a store."""
        self.served = self.store = self.work / "store"
        where = ("--store", str(self.store), "--json", *self.add_options)
        added = run_json(python("tensorswarm", "add", str(self.source), *where))
        self._model = added["model"]

    def start(self) -> None:
        """Start a node on the store."""
        self.server = Server(
            python(
                *("tensorswarm", "node", "--listen", "/ip4/127.0.0.1/tcp/0"),
                *("--store", str(self.store), "--json", "--bulk", self.bulk),
            )
        )
        self._address = json.loads(self.server.first_line)["addrs"][0]

    def run(self, target: Path) -> Measurement:
        """Fetch into an empty store."""
        return self._receive(*self.receiver(str(target / "store")))

    def receiver(self, store: str) -> tuple[str, ...]:
        """Return the arguments of the receiver that fetches into a store."""
        return ("tensorswarm", store, self._model, self._address, self.bulk)


class TensorswarmClear(Tensorswarm):
    """Ourselves with ``--bulk clear``: verified, not encrypted."""

    name = "tensorswarm, clear"
    bulk = "clear"


class Libtorrent(Contender):
    """libtorrent, v2 torrent with 1 MiB pieces, in the clear."""

    name = "libtorrent"
    needs_module = "libtorrent"

    def prepare(self) -> None:
        """Make the torrent."""
        from .torrent import make_torrent

        self._serve_copy()
        self._torrent = self.work / "model.torrent"
        make_torrent(self.source, self._torrent)

    def start(self) -> None:
        """Seed it."""
        folder = str(self.source.parent)
        self.server = Server(python("benchmarks.torrent", str(self._torrent), folder))

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh session."""
        assert self.server is not None
        port = self.server.first_line.strip()
        return self._receive("libtorrent", str(target), str(self._torrent), port)


class Iroh(Contender):
    """iroh 0.35, blobs: QUIC with TLS, verified."""

    name = "iroh 0.35"
    needs_module = "iroh"

    def prepare(self) -> None:
        """Take a copy of the file."""
        self._serve_copy()

    def start(self) -> None:
        """Serve the file from where it is."""
        store = self.work / "iroh"
        shutil.rmtree(store, ignore_errors=True)
        self.server = Server(python("benchmarks.iroh_blobs", str(store), str(self.source)))

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh node."""
        assert self.server is not None
        return self._receive("iroh", str(target), self.server.first_line)


class Libp2pStream(Contender):
    """A plain py-libp2p stream: Noise and yamux, nothing verified."""

    name = "py-libp2p stream"

    def start(self) -> None:
        """Start a host."""
        self.server = Server(python("benchmarks.libp2p_stream", str(self.source)))

    def run(self, target: Path) -> Measurement:
        """Receive with a fresh host."""
        assert self.server is not None
        return self._receive("libp2p", str(target), self.size, self.server.first_line)


class _FromNginx(Contender):
    """Plain HTTP from nginx, nothing verified."""

    def start(self) -> None:
        """Start nginx on a free loopback port."""
        nginx = find_program("nginx")
        assert nginx is not None
        self.server = Server(
            python("benchmarks.nginx", nginx, str(self.work), str(self.source.parent))
        )
        self._url = f"http://127.0.0.1:{self.server.first_line.strip()}/{self.source.name}"

    @classmethod
    def missing(cls) -> str | None:
        """Return what it would need and this machine lacks."""
        return super().missing() or (None if find_program("nginx") else "nginx")


class Curl(_FromNginx):
    """curl: one connection."""

    name = "curl from nginx"
    needs_program = "curl"

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh curl."""
        return self._run_program("curl", "-sf", "-o", str(target / "file"), self._url)


class Aria2(_FromNginx):
    """aria2 with four connections."""

    name = "aria2, 4 from nginx"
    needs_program = "aria2c"

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh aria2."""
        return self._run_program(
            *("aria2c", "-q", "--no-conf", "-x4", "-s4", "--file-allocation=none"),
            *("-d", str(target), "-o", "file", self._url),
        )


class Copy(Contender):
    """A copy on the same disk: what reading and writing alone cost."""

    name = "cp"
    needs_program = "cp"

    def run(self, target: Path) -> Measurement:
        """Copy with ``cp``."""
        return self._run_program("cp", str(self.source), str(target / "file"))


CONTENDERS: tuple[type[Contender], ...] = (
    Tensorswarm,
    TensorswarmClear,
    Libtorrent,
    Iroh,
    Aria2,
    Curl,
    Libp2pStream,
    Copy,
)
"""In the order of the table; we come first."""
