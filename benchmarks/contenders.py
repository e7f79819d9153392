"""Who takes part: each knows how to serve a file and how to have it fetched."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .processes import (
    RUN_TIMEOUT_S,
    Server,
    children_cpu_seconds,
    cpu_seconds,
    memory_bytes,
    python,
    run_json,
    touch_pages,
)
from .torrent import make_torrent


@dataclass(frozen=True)
class Measurement:
    """One transfer: wall seconds, CPU seconds of both sides, memory growth in bytes."""

    seconds: float
    cpu_receiver_s: float
    cpu_server_s: float
    memory_receiver: int = 0


class Contender(Protocol):
    """A way to get a file from one process to another."""

    name: str

    def start(self) -> None:
        """Make ready to serve."""
        ...

    def run(self, target: Path) -> Measurement:
        """Have the file fetched into an empty folder."""
        ...

    def stop(self) -> None:
        """Stop serving."""
        ...


def _fetch(command: list[str], server: Server | None) -> Measurement:
    """Run a receiver and account for both sides."""
    server_before = cpu_seconds(server.pid) if server else 0.0
    before = children_cpu_seconds()
    figures = run_json(command)
    return Measurement(
        figures["seconds"],
        children_cpu_seconds() - before,
        (cpu_seconds(server.pid) if server else 0.0) - server_before,
        int(figures["memory_after"] - figures["memory_before"]),
    )


class Tensorswarm:
    """Ourselves: TLS, every chunk verified, into an empty store."""

    name = "tensorswarm"

    def __init__(self, source: Path, work: Path) -> None:
        self._source = source
        self._store = work / "store"
        self._server: Server | None = None
        self.memory_server = 0

    def start(self) -> None:
        """Add the model to a store, and start a node on it."""
        added = run_json(
            python("tensorswarm", "add", str(self._source), "--store", str(self._store), "--json")
        )
        self._model = added["model"]
        self._server = Server(
            python(
                *("tensorswarm", "node", "--listen", "/ip4/127.0.0.1/tcp/0"),
                *("--store", str(self._store), "--json"),
            )
        )
        self._address = json.loads(self._server.first_line)["addrs"][0]
        self._memory_before = memory_bytes(self._server.pid, "VmRSS")

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh process and an empty store."""
        measured = _fetch(
            python(
                *("benchmarks.receivers", "tensorswarm", str(self._source.stat().st_size)),
                *(str(target / "store"), self._model, self._address),
            ),
            self._server,
        )
        assert self._server is not None
        self.memory_server = memory_bytes(self._server.pid, "VmHWM") - self._memory_before
        return measured

    def stop(self) -> None:
        """Stop the node."""
        if self._server is not None:
            self._server.stop()


class Libtorrent:
    """libtorrent, v2 torrent with 1 MiB pieces, in the clear."""

    name = "libtorrent"

    def __init__(self, source: Path, work: Path) -> None:
        self._source = source
        self._torrent = work / "model.torrent"
        self._server: Server | None = None

    def start(self) -> None:
        """Make the torrent and seed it."""
        make_torrent(self._source, self._torrent)
        self._server = Server(
            python("benchmarks.torrent", str(self._torrent), str(self._source.parent))
        )

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh session."""
        assert self._server is not None
        port = self._server.first_line.strip()
        return _fetch(
            python(
                *("benchmarks.receivers", "libtorrent", str(self._source.stat().st_size)),
                *(str(target), str(self._torrent), port),
            ),
            self._server,
        )

    def stop(self) -> None:
        """Stop seeding."""
        if self._server is not None:
            self._server.stop()


class Curl:
    """curl from nginx, plain HTTP, nothing verified."""

    name = "curl from nginx"

    def __init__(self, source: Path, work: Path) -> None:
        self._source = source
        self._work = work
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start nginx on a free loopback port."""
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
        if nginx is None:
            raise RuntimeError("nginx is not installed")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        config = self._work / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {self._work}/nginx.pid;\n"
            f"error_log {self._work}/nginx.log;\n"
            "events { }\n"
            "http { access_log off; sendfile on; tcp_nopush on;\n"
            f"  server {{ listen 127.0.0.1:{self._port}; root {self._source.parent}; }} }}\n"
        )
        self._process = subprocess.Popen(
            [nginx, "-p", str(self._work), "-c", str(config)], stderr=subprocess.DEVNULL
        )
        self._wait_until_open()

    def _wait_until_open(self) -> None:
        command = ["curl", "-s", "--retry", "20", "--retry-connrefused", "--retry-delay", "1"]
        url = f"http://127.0.0.1:{self._port}/"
        subprocess.run([*command, "-o", "/dev/null", url], check=True, timeout=RUN_TIMEOUT_S)

    def _workers(self) -> list[int]:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(int(child) for child in children)]

    def run(self, target: Path) -> Measurement:
        """Fetch with a fresh curl."""
        touch_pages(target, self._source.stat().st_size)
        server_before = sum(cpu_seconds(pid) for pid in self._workers())
        before = children_cpu_seconds()
        url = f"http://127.0.0.1:{self._port}/{self._source.name}"
        command = ["curl", "-sf", "-o", str(target / "file"), "-w", "%{time_total}", url]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=RUN_TIMEOUT_S)
        return Measurement(
            float(done.stdout),
            children_cpu_seconds() - before,
            sum(cpu_seconds(pid) for pid in self._workers()) - server_before,
        )

    def stop(self) -> None:
        """Stop nginx."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(RUN_TIMEOUT_S)


class Copy:
    """A copy on the same disk: what the disk cache alone costs."""

    name = "cp"

    def __init__(self, source: Path, work: Path) -> None:
        self._source = source

    def start(self) -> None:
        """Nothing serves."""

    def run(self, target: Path) -> Measurement:
        """Copy with ``cp``."""
        before = children_cpu_seconds()
        figures = run_json(
            python(
                *("benchmarks.receivers", "copy", str(self._source.stat().st_size)),
                *(str(target / "file"), str(self._source)),
            )
        )
        return Measurement(figures["seconds"], children_cpu_seconds() - before, 0.0)

    def stop(self) -> None:
        """Nothing serves."""
