"""Starting real processes and reading what they cost."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
RUN_TIMEOUT_S = 600.0


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds a process and its ended children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def memory_bytes(pid: int, field: str) -> int:
    """Return a memory figure of a process: ``VmRSS`` (now) or ``VmHWM`` (highest)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all children of this process that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def own_cpu_seconds() -> float:
    """Return the CPU seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Server:
    """A process that serves until it is stopped; its first line on stdout says it is ready."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self.first_line = read_line(self._process.stdout, START_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)


def read_line(stream: IO[bytes], timeout_s: float) -> str:
    """Return the next line of a pipe, or raise TimeoutError."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("a benchmark's process did not get ready")
        byte = os.read(stream.fileno(), 1)
        if not byte:
            raise RuntimeError("a benchmark's process ended before it was ready")
        line += byte
    return line.decode()


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end and return the JSON it prints."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, timeout=RUN_TIMEOUT_S, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
