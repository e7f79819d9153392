"""The demo's processes: started, listened to, and ended by their ids, whatever happens.

Each has its standard output read line by line, and its standard error in a file that
is shown when the process fails. All of them are in sessions of their own, so that a
Ctrl-C reaches the demo alone, which then ends them in good order.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROJECT = Path(__file__).resolve().parents[2]

LINE_TIMEOUT_S = 45.0
"""Longest wait for a process's next line: a fetch itself gives up after 30 s."""

STOP_TIMEOUT_S = 10.0
"""Time to end in good order; then a process is killed."""

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for a server to take connections."""

SERVER_FOLDERS = ":/usr/local/sbin:/usr/sbin:/sbin"
"""Where nginx lies on many systems; not on an ordinary user's PATH."""

SHOWN_LOG_LINES = 12
"""Lines of a failed process's log that are shown."""


class DemoFailed(Exception):
    """Something is not as the demo claims."""


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def takes_connections(port: int) -> bool:
    """Tell whether somebody listens on a port of the loopback interface."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def wait_for_server(port: int, process: Process) -> None:
    """Return once a server takes connections.

    Raises
    ------
    DemoFailed
        It ended, or did not come up in time.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while not takes_connections(port):
        if process.popen.poll() is not None or time.monotonic() > deadline:
            raise DemoFailed(f"{process.name} did not come up\n{process.log_tail()}")
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    """Return the environment of the demo's processes: our modules, and no proxy."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class Process:
    """One running process.

    Parameters
    ----------
    name : str
        What the demo calls it.
    command : sequence of str
        Program and arguments.
    folder : Path
        Working folder, and where its log lies.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"{name}-output", daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None  # it is a pipe, see above
        for line in self.popen.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def next_document(self) -> dict[str, Any]:
        """Return the next line of output, which is a JSON document.

        Raises
        ------
        DemoFailed
            There is none: the process ended, or said nothing for too long.
        """
        try:
            line = self._lines.get(timeout=LINE_TIMEOUT_S)
        except queue.Empty:
            raise DemoFailed(f"{self.name} said nothing for {LINE_TIMEOUT_S:g} s") from None
        if not line:
            raise DemoFailed(
                f"{self.name} ended with exit code {self.popen.wait()}\n{self.log_tail()}"
            )
        document: dict[str, Any] = json.loads(line)
        if "error" in document:
            raise DemoFailed(f"{self.name}: {document['error']}")
        return document

    def log_tail(self) -> str:
        """Return the end of what the process wrote to its standard error."""
        lines = self._log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
        return "\n".join(f"    {line}" for line in lines)

    def kill(self) -> None:
        """End the process at once, without a chance to say goodbye."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """Ask the process to end, and return its exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DemoFailed(f"{self.name} did not end within {STOP_TIMEOUT_S:g} s") from None


class Processes:
    """All processes of the demo. Use it in a ``with`` statement.

    Parameters
    ----------
    folder : Path
        Where they work; stores are named relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # from here on nothing may come in between
        running = [process for process in self._all if process.popen.poll() is None]
        for process in running:
            process.popen.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def start(self, name: str, command: Sequence[str]) -> Process:
        """Start a program."""
        process = Process(name, command, self.folder)
        self._all.append(process)
        return process

    def tensorswarm(self, name: str, *arguments: str) -> Process:
        """Start the command `tensorswarm`, with its answer as JSON."""
        return self.python(name, "tensorswarm", *arguments, "--json")

    def python(self, name: str, module: str, *arguments: str) -> Process:
        """Start a module of this project."""
        return self.start(name, [sys.executable, "-m", module, *arguments])

    def nginx(self, model: Path, bytes_per_s: int) -> tuple[Process, int] | None:
        """Start nginx as the origin; returns it and its port, None without nginx."""
        path = os.environ.get("PATH", os.defpath) + SERVER_FOLDERS
        program = shutil.which("nginx", path=path)
        if program is None:
            return None
        port = free_port()
        (self.folder / "www").mkdir()
        (self.folder / "www" / "model").symlink_to(model)
        configuration = self.folder / "nginx.conf"
        configuration.write_text(NGINX_CONFIGURATION.format(port=port, bytes_per_s=bytes_per_s))
        command = [program, "-p", str(self.folder), "-c", str(configuration)]
        return self.start("origin", command), port


NGINX_CONFIGURATION = """\
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .;
    uwsgi_temp_path .; scgi_temp_path .;
    server {{
        listen 127.0.0.1:{port};
        root www;
        limit_rate {bytes_per_s};
    }}
}}
"""
