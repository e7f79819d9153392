"""Real processes for the end-to-end tests: nodes, peers of ill will, commands, nginx.

Nothing here sleeps in order to wait. What a process prints is read by a thread as it
comes, a test waits for a line, and every wait has a deadline. A deadline is only there
to end a broken test: none of them says how fast the product is.

`Processes` ends whatever was started, by process id, however the test ends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.support.tools import require_tool

PROJECT = Path(__file__).resolve().parents[2]

DEADLINE_S = 60.0
"""Longest wait for anything that should happen, on the slowest of machines."""

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
"""Where the tests' nodes listen: nobody outside this machine can reach them."""

NGINX_CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 128; }}
http {{
    log_format served '$request_method $status $body_bytes_sent "$uri" "$http_range"';
    access_log /dev/stdout served;
    sendfile on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        limit_rate {limit_rate};
    }}
}}
"""
"""In one process, so that a signal to it stops all of it."""

_LOG_LINE = re.compile(r'(\w+) (\d+) (\d+) "(.*)" "(.*)"')


def environment(**changes: str) -> dict[str, str]:
    """Return the environment in which processes find the project's own packages."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    quiet = {name: text for name, text in os.environ.items() if name != "TENSORSWARM_DEBUG"}
    return {**quiet, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **changes}


class Lines:
    """What a process writes to a pipe, read by a thread as it comes."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            for line in self._pipe:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def all(self) -> list[str]:
        """Return the lines so far."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, wanted: Callable[[str], bool], timeout_s: float = DEADLINE_S) -> str | None:
        """Return the first line that is wanted, old or new; None when the output ended."""
        seen = 0
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self._lines)
                if self._ended:
                    return None
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no such line within {timeout_s:g} s: {self._lines[-5:]}")

    def wait_end(self, timeout_s: float = DEADLINE_S) -> list[str]:
        """Wait until the process has closed the pipe; return all lines."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still writing after {timeout_s:g} s"
        return self.all()


class Process:
    """A process that a test started, with its output.

    Parameters
    ----------
    arguments : sequence of str
        Program and arguments.
    env : mapping of str to str, optional
        Its environment.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.started_at = time.monotonic()
        self._name = " ".join(arguments)
        self._popen = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else environment(),
            text=True,
        )
        assert self._popen.stdin and self._popen.stdout and self._popen.stderr
        self.stdin = self._popen.stdin
        self.stdout = Lines(self._popen.stdout)
        self.stderr = Lines(self._popen.stderr)

    def wait_line(
        self, wanted: Callable[[str], bool] = lambda line: True, timeout_s: float = DEADLINE_S
    ) -> str:
        """Return the first wanted line of standard output."""
        line = self.stdout.wait_for(wanted, timeout_s)
        assert line is not None, (
            f"{self._name} ended before it printed what was waited for: "
            f"{self.stdout.all()[-5:]} {self.stderr.wait_end()[-20:]}"
        )
        return line

    def peak_memory_bytes(self) -> int:
        """Return the most memory it has had so far; 0 once it has ended."""
        status = Path(f"/proc/{self._popen.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+([0-9]+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def is_running(self) -> bool:
        """Tell whether it has not ended yet."""
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self.wait_exit()

    def wait_exit(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended; return its exit code."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self._name} still runs after {timeout_s:g} s: {self.stderr.all()[-20:]}"
            ) from None

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.is_running():
            self.kill()
        with self.stdin:
            pass


@dataclass(frozen=True)
class Completed:
    """A command that has ended."""

    arguments: Sequence[str]
    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output; fails if it is anything else."""
        try:
            document = json.loads(self.stdout)
        except ValueError:
            raise AssertionError(f"not one JSON document: {self}") from None
        assert isinstance(document, dict) and self.stdout.count("\n") == 1, self
        return document

    def sources(self) -> dict[str, dict[str, Any]]:
        """Return the sources of a fetch, by their id."""
        return {source["id"]: source for source in self.document["sources"]}


class Command(Process):
    """A ``tensorswarm`` command that runs while the test goes on."""

    def __init__(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> None:
        self.arguments = [str(argument) for argument in arguments]
        super().__init__([sys.executable, "-m", "tensorswarm", *self.arguments], env)

    def complete(self, timeout_s: float = DEADLINE_S) -> Completed:
        """Wait until it has ended."""
        exit_code = self.wait_exit(timeout_s)
        seconds = time.monotonic() - self.started_at
        out, err = (
            "".join(f"{line}\n" for line in s.wait_end()) for s in (self.stdout, self.stderr)
        )
        return Completed(self.arguments, exit_code, out, err, seconds)


class Node(Command):
    """A running ``tensorswarm node``, or another peer that starts in the same way."""

    document: dict[str, Any]

    def wait_ready(self) -> None:
        """Wait for the line that says how to reach it."""
        self.document = json.loads(self.wait_line())

    @property
    def peer_id(self) -> str:
        """Its public name."""
        return str(self.document["peer_id"])

    @property
    def addr(self) -> str:
        """Its first address."""
        return str(self.document["addrs"][0])


class EvilPeer(Node):
    """`tests.support.evil_peer` in a process of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.arguments = [str(argument) for argument in arguments]
        module = [sys.executable, "-m", "tests.support.evil_peer"]
        Process.__init__(self, [*module, *self.arguments])

    def read_bytes(self) -> int:
        """Return the model bytes that it has read in order to send them, so far."""
        lines = self.stdout.all()
        return int(json.loads(lines[-1])["read"]) if len(lines) > 1 else 0

    def wait_read(self, byte_count: int) -> None:
        """Wait until it has read so many model bytes."""
        self.wait_line(lambda line: '"read"' in line and json.loads(line)["read"] >= byte_count)

    def set_rate(self, bytes_per_s: float) -> None:
        """Change how fast it gives; 0 for as fast as it can."""
        self.stdin.write(f"{bytes_per_s}\n")
        self.stdin.flush()


class Member(Process):
    """`tests.support.swarm_member` in a process of its own.

    Parameters
    ----------
    store : Path
        Its store.
    model, bootstrap, origin : str
        What it fetches, whom it meets first, and where the bytes are.
    others : int
        How many others want the same.
    """

    def __init__(self, store: Path, model: str, bootstrap: str, origin: str, others: int) -> None:
        module = [sys.executable, "-m", "tests.support.swarm_member"]
        super().__init__([*module, str(store), model, bootstrap, origin, str(others)])

    def wait_said(self, word: str) -> dict[str, Any]:
        """Wait until it has said something, and return that line."""
        said = json.loads(self.wait_line(lambda line: f'"{word}"' in line))
        assert isinstance(said, dict)
        return said

    def go_on(self) -> None:
        """Say the word that it waits for."""
        self.stdin.write("\n")
        self.stdin.flush()


@dataclass(frozen=True)
class LoggedRequest:
    """A line of nginx's access log, written when a request has ended."""

    method: str
    status: int
    body_bytes: int
    path: str
    range: str


class PortTaken(Exception):
    """The port chosen for a server was taken before it could listen."""


class Nginx(Process):
    """An nginx that serves a folder, ready to be asked.

    Parameters
    ----------
    root : Path
        The folder it serves.
    folder : Path
        A folder for its own files.
    port : int
        A free port of the loopback interface.
    limit_rate : int, optional
        Bytes per second and connection; 0 for no limit.

    Raises
    ------
    PortTaken
        Somebody else was quicker.
    """

    def __init__(self, root: Path, folder: Path, port: int, limit_rate: int = 0) -> None:
        program = require_tool("nginx")
        folder.mkdir(parents=True)
        self.url = f"http://127.0.0.1:{port}"
        config = folder / "nginx.conf"
        config.write_text(
            NGINX_CONFIG.format(folder=folder, root=root, port=port, limit_rate=limit_rate)
        )
        super().__init__([program, "-p", str(folder), "-c", str(config)], os.environ)
        # Written once the socket listens.
        if self.stderr.wait_for(lambda line: "event method" in line) is None:
            assert any("in use" in line for line in self.stderr.all()), self.stderr.all()
            raise PortTaken

    def log(self) -> list[LoggedRequest]:
        """Return the requests that have ended so far."""
        return [parse_log_line(line) for line in self.stdout.all()]

    def wait_served(self, byte_count: int) -> None:
        """Wait until requests that have ended took so many bytes together."""
        served = 0

        def enough(line: str) -> bool:
            nonlocal served
            served += parse_log_line(line).body_bytes
            return served >= byte_count

        self.wait_line(enough)

    def stop(self) -> list[LoggedRequest]:
        """End it once its requests have ended; return its whole access log."""
        self.signal(signal.SIGQUIT)
        self.wait_exit()
        return [parse_log_line(line) for line in self.stdout.wait_end()]


def parse_log_line(line: str) -> LoggedRequest:
    """Read a line of the access log."""
    match = _LOG_LINE.fullmatch(line)
    assert match, line
    method, status, size, path, byte_range = match.groups()
    return LoggedRequest(method, int(status), int(size), path, byte_range)


class Processes:
    """Starts processes, and ends them with the block.

    Parameters
    ----------
    folder : Path
        Where processes may keep files of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def command(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Command:
        """Start a command that runs while the test goes on."""
        command = Command(*arguments, env=env)
        self._stack.callback(command.close)
        return command

    def run(
        self,
        *arguments: str | Path,
        timeout_s: float = DEADLINE_S,
        env: Mapping[str, str] | None = None,
    ) -> Completed:
        """Run a command to its end."""
        return self.command(*arguments, env=env).complete(timeout_s)

    def node(self, store: Path, *arguments: str | Path, bootstrap: Sequence[str] = ()) -> Node:
        """Start a node and wait until it can be reached."""
        node = self.start_node(store, *arguments, bootstrap=bootstrap)
        node.wait_ready()
        return node

    def start_node(
        self, store: Path, *arguments: str | Path, bootstrap: Sequence[str] = ()
    ) -> Node:
        """Start a node; `Node.wait_ready` waits for it, so that several start at once."""
        where: list[str | Path] = [
            "--store",
            store,
            "--listen",
            LOOPBACK,
            "--json",
            *_bootstraps(bootstrap),
        ]
        node = Node("node", *where, *arguments)
        self._stack.callback(node.close)
        return node

    def start_evil_peer(
        self, store: Path, *arguments: str | Path, bootstrap: Sequence[str] = ()
    ) -> EvilPeer:
        """Start a peer of ill will; `Node.wait_ready` waits for it."""
        peer = EvilPeer("--store", store, *_bootstraps(bootstrap), *arguments)
        self._stack.callback(peer.close)
        return peer

    def evil_peer(
        self, store: Path, *arguments: str | Path, bootstrap: Sequence[str] = ()
    ) -> EvilPeer:
        """Start a peer of ill will and wait until it can be reached."""
        peer = self.start_evil_peer(store, *arguments, bootstrap=bootstrap)
        peer.wait_ready()
        return peer

    def start_member(
        self, store: Path, model: str, *, bootstrap: str, origin: str, others: int
    ) -> Member:
        """Start a member of a swarm; `Member.wait_said` waits for it."""
        member = Member(store, model, bootstrap, origin, others)
        self._stack.callback(member.close)
        return member

    def start_fetch(
        self,
        ref: str,
        store: Path,
        *arguments: str | Path,
        bootstrap: Sequence[str] = (),
    ) -> Command:
        """Start ``fetch --json``."""
        where: list[str | Path] = ["--store", store, "--json", *_bootstraps(bootstrap)]
        return self.command("fetch", ref, *where, *arguments)

    def fetch(
        self,
        ref: str,
        store: Path,
        *arguments: str | Path,
        bootstrap: Sequence[str] = (),
        expected: int = 0,
    ) -> Completed:
        """Run ``fetch --json`` to its end, which is the exit code `expected`."""
        completed = self.start_fetch(ref, store, *arguments, bootstrap=bootstrap).complete()
        assert completed.exit_code == expected, completed
        return completed

    def nginx(self, root: Path, limit_rate: int = 0) -> Nginx:
        """Start an nginx that serves a folder."""
        while True:
            with socket.create_server(("127.0.0.1", 0)) as chosen:
                port = chosen.getsockname()[1]
            try:
                nginx = Nginx(root, self._folder / f"nginx-{port}", port, limit_rate)
            except PortTaken:
                continue
            self._stack.callback(nginx.close)
            return nginx


def _bootstraps(addrs: Sequence[str]) -> list[str]:
    return [text for addr in addrs for text in ("--bootstrap", addr)]
