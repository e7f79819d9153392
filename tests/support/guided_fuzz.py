"""The fuzz targets of `format_fuzz` and `claims_fuzz`, with inputs that Atheris makes.

Atheris (libFuzzer for Python) watches which branches of `tensorswarm.store` an input
reaches and goes on from those that reach new ones, so it gets deeper than mutations of
the seeds do. What has to hold is the same, and each input's processor time and the
process's memory are bounded too.

- A format's input is the files' bytes, behind the lengths of all but the last. It is
  changed by our own mutator or by libFuzzer's, one file at a time.
- A claim's input is a tape of bytes that answers every question to the generator of
  random numbers, so that coverage chooses what is changed, and how.

Atheris is in the extra ``fuzz``, and Linux's ``/proc`` is read. Each kind has a process of
its own, because libFuzzer ends it::

    python -m tests.support.guided_fuzz 1000000 1
    python -m tests.support.guided_fuzz 1000000 1 onnx pickle
"""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import atheris

SERVE = "--serve"

with atheris.instrument_imports(["tensorswarm.store"]) if SERVE in sys.argv else nullcontext():
    from tests.support import claims_fuzz, format_fuzz

MAX_INPUT_BYTES = 4096
"""Longest input: the seeds have some hundred bytes, so several can be put together."""

HEADROOM_BYTES = 256 << 20
"""Address space that the process may take beyond what it has when it begins. libFuzzer keeps
its corpus and coverage there too."""

HANG_S = 20
"""Seconds after which libFuzzer ends an input that does not return, on a busy machine."""

_LENGTH = struct.Struct("<H")


def packed(files: format_fuzz.Files) -> bytes:
    """Return files as one input."""
    contents = list(files.values())
    return b"".join([*(_LENGTH.pack(len(each)) for each in contents[:-1]), *contents])


def unpacked(data: bytes, names: list[str]) -> format_fuzz.Files:
    """Return the files that an input stands for, whatever it is."""
    head = _LENGTH.size * (len(names) - 1)
    lengths = [length for (length,) in _LENGTH.iter_unpack(data[:head].ljust(head, b"\0"))]
    files, at = {}, head
    for name, length in zip(names[:-1], lengths, strict=True):
        files[name] = data[at : at + length]
        at += length
    files[names[-1]] = data[at:]
    return files


class Tape(random.Random):
    """A generator whose every choice is read from a tape; zeros follow its end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int, /) -> int:
        """Return the tape's next bits."""
        length = -(-k // 8)
        taken = self._data[self._at : self._at + length].ljust(length, b"\0")
        self._at += length
        return int.from_bytes(taken, "little") >> (8 * length - k)

    def random(self) -> float:
        """Return a number from 0 to 1, by the tape's next two bytes."""
        return self.getrandbits(16) / (1 << 16)


class Watch:
    """Counts inputs, and says at the last one what came of them."""

    def __init__(self, name: str, count: int, seed: int, target: Callable[[bytes], bool]) -> None:
        self._name, self._count, self._seed, self._target = name, count, seed, target
        self._done = self._accepted = 0
        self._slowest_s = 0.0
        self._begun = time.monotonic()

    def __call__(self, data: bytes) -> None:
        """Try an input."""
        begun = time.thread_time()
        self._accepted += self._target(data)
        taken_s = time.thread_time() - begun
        assert taken_s <= format_fuzz.MAX_INPUT_S, f"an input took {taken_s:.1f} s"
        self._slowest_s = max(self._slowest_s, taken_s)
        self._done += 1
        if self._done == self._count:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"{self._name}: {self._done} inputs guided by coverage, {self._accepted} "
                f"accepted, the others refused with BadInput; slowest "
                f"{1000 * self._slowest_s:.0f} ms, {time.monotonic() - self._begun:.0f} s, "
                f"peak memory {peak} MiB, seed {self._seed}",
                flush=True,
            )


def mutator_of(names: list[str]) -> Callable[[bytes, int, int], bytes]:
    """Return the mutator of a format's inputs."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        files = unpacked(data, names)
        victim = rng.choice(names) if rng.random() < 0.2 else names[0]
        if rng.random() < 0.5:
            files[victim] = format_fuzz.mutate(files[victim], rng)
        else:
            files[victim] = bytes(atheris.Mutate(files[victim], max_size))
        return packed({name: each[:max_size] for name, each in files.items()})[:max_size]

    return mutate


def serve(name: str, count: int, seed: int, folder: Path) -> None:
    """Fuzz a kind, and end the process; the folder takes the corpus."""
    options = [f"-runs={count}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}"]
    options += [f"-timeout={HANG_S}", "-rss_limit_mb=0", f"-artifact_prefix={folder}/"]
    target: Callable[[bytes], bool]
    if name in claims_fuzz.CLAIMS:
        target = lambda data: claims_fuzz.CLAIMS[name](Tape(data)).accepted  # noqa: E731
        seeds = [random.Random(number).randbytes(64) for number in range(32)]
        mutator = {}
    else:
        files = format_fuzz.SEEDS[name]()
        names = list(files[0])
        target = lambda data: format_fuzz.check(unpacked(data, names))  # noqa: E731
        seeds = [packed(each) for each in files]
        mutator = {"custom_mutator": mutator_of(names)}
    for number, data in enumerate(seeds):
        (folder / str(number)).write_bytes(data)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Watch(name, count, seed, target)
    atheris.Setup([sys.argv[0], *options, str(folder)], watch, **mutator)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the kinds on the command line, or all, each in a process of its own.

    Arguments are the number of inputs, the seed, and names of kinds.
    """
    if sys.argv[1] == SERVE:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    count, seed = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1"
    for name in sys.argv[3:] or [*format_fuzz.SEEDS, *claims_fuzz.CLAIMS]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.support.guided_fuzz", SERVE]
            command += [name, count, seed, folder]
            # What libFuzzer says is only of interest if it found something.
            done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
            if done.returncode:
                sys.stderr.buffer.write(done.stderr)
                for crash in Path(folder).glob("*-*"):
                    print(f"{name}: {crash.name}: {crash.read_bytes()!r}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
