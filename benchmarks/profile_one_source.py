"""Where the CPU seconds of one transfer go, on both sides, by library and kernel function.

    python -m benchmarks.profile_one_source [--mib 1024] [--bulk tls] [--json]

Samples the receiving and the serving process with ``perf record`` (cpu-clock, a sample
each millisecond). Each side's main thread is left out: it starts the program and makes the
planner's decisions, while the others receive, hash, write and send.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import page_cache
from .contenders import Tensorswarm, find_program
from .model import tensor_sizes, write_model
from .processes import ROOT, RUN_TIMEOUT_S, python
from .report import at_least_one, document, emit, table
from .warm_memory import warm_memory

SAMPLES_PER_S = 1000
LIBRARIES = 8
FUNCTIONS = 12
"""Rows of each table; what is left is small."""

Samples = Counter[tuple[str, str]]


def main() -> None:
    """Profile one transfer and print."""
    parser = argparse.ArgumentParser(description="where the CPU seconds of one transfer go")
    parser.add_argument("--mib", type=at_least_one, default=1024, help="size of the model in MiB")
    parser.add_argument("--bulk", choices=("tls", "clear"), default="tls")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    perf = find_program("perf")
    if perf is None:
        sys.exit("error: perf is not installed (Debian: apt install linux-perf)")
    with tempfile.TemporaryDirectory() as name:
        seconds, sides = profile(perf, Path(name), args.mib, args.bulk)
    gigabytes = args.mib * (1 << 20) / 1e9
    texts = [f"{args.mib} MiB, --bulk {args.bulk}, {seconds:.2f} s; CPU seconds per GB"]
    for side, samples in sides.items():
        texts.append(text_of(side, samples, gigabytes))
    result = document(
        "profile_one_source",
        mib=args.mib,
        bulk=args.bulk,
        seconds=seconds,
        cpu_s_per_gb={
            side: [
                [library, function, count / SAMPLES_PER_S / gigabytes]
                for (library, function), count in samples.most_common(100)
            ]
            for side, samples in sides.items()
        },
    )
    emit(result, "\n\n".join(texts), as_json=args.json)


def profile(perf: str, work: Path, mib: int, bulk: str) -> tuple[float, dict[str, Samples]]:
    """Return the seconds of one transfer, and the samples of both sides."""
    source = work / "model.safetensors"
    write_model(source, tensor_sizes(mib))
    contender = Tensorswarm(source, work)
    contender.bulk = bulk
    contender.prepare()
    contender.start()
    recording = [perf, "record", "-q", "-e", "cpu-clock", "-F", str(SAMPLES_PER_S)]
    try:
        with warm_memory(source.stat().st_size):
            contender.run(_folder(work / "first"))  # not looked at
            page_cache.warm(contender.served)
            assert contender.server is not None
            serving = subprocess.Popen(
                [*recording, "-o", str(work / "server"), "-p", str(contender.server.pid)]
            )
            target = str(_folder(work / "second") / "store")
            receiver = python("benchmarks.receivers", *contender.receiver(target))
            done = subprocess.run(
                [*recording, "-o", str(work / "receiver"), "--", *receiver],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                check=True,
                timeout=RUN_TIMEOUT_S,
            )
            serving.send_signal(signal.SIGINT)
            serving.wait(RUN_TIMEOUT_S)
    finally:
        contender.stop()
    sides = {side: _samples(perf, work / side) for side in ("receiver", "server")}
    return json.loads(done.stdout)["seconds"], sides


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _samples(perf: str, recorded: Path) -> Samples:
    fields = ["script", "-i", str(recorded), "-F", "pid,tid,ip,sym,dso"]
    done = subprocess.run(
        [perf, *fields], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return parse_samples(done.stdout.decode(errors="replace"))


def parse_samples(text: str) -> Samples:
    """Count samples by library and function, from ``perf script -F pid,tid,ip,sym,dso``.

    A line is process/thread, an address, a function, and a library in parentheses. Main
    threads, whose number is the process's, are not counted.
    """
    found: Samples = Counter()
    for line in text.splitlines():
        words = line.split()
        if len(words) < 4 or not words[-1].endswith(")"):
            continue
        process, _, thread = words[0].partition("/")
        if process == thread:
            continue
        path = words[-1].strip("()")
        library = "kernel" if path.startswith("[") else Path(path).name.split(".")[0]
        found[library, words[2].partition("+")[0]] += 1
    return found


def text_of(side: str, samples: Samples, gigabytes: float) -> str:
    """Return two tables: by library, and the kernel's functions."""
    libraries: Counter[str] = Counter()
    kernel: Counter[str] = Counter()
    for (library, function), count in samples.items():
        libraries[library] += count
        if library == "kernel":
            kernel[function] += count
    return "\n\n".join(
        table((heading, "s/GB"), _rows(counts.most_common(most), gigabytes))
        for heading, counts, most in (
            (side, libraries, LIBRARIES),
            (f"{side}, kernel", kernel, FUNCTIONS),
        )
    )


def _rows(counted: Sequence[tuple[str, int]], gigabytes: float) -> list[tuple[str, float]]:
    return [(name, count / SAMPLES_PER_S / gigabytes) for name, count in counted]


if __name__ == "__main__":
    main()
