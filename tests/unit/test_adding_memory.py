"""Memory while a model is added: bounded, however large the model is.

Each model is far larger than the bound, and sparse, so that it costs the disk nothing.
The figure is the process's own highest (``VmHWM``): what ``wait4`` says of a child counts
its parent's memory too, from before ``exec``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.store_world import MIB, run_python

MAX_MEMORY_BYTES = 200_000_000

ADD = """
import sys
from pathlib import Path
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store

with Store(Path(sys.argv[1])) as store:
    manifest = add_paths(store, [Path(sys.argv[2])], copy=sys.argv[3] == "copy").manifest
    store.sync()
status = Path("/proc/self/status").read_text()
print(sum(ref.size_bytes for ref in manifest.objects), status.split("VmHWM:")[1].split()[0])
"""


def write_sparse_model(path: Path, sizes: list[int]) -> None:
    """Write a safetensors file of tensors that differ in their first bytes alone."""
    entries, at = {}, 0
    for number, size in enumerate(sizes):
        entries[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        for number, entry in enumerate(entries.values()):
            file.seek(start + entry["data_offsets"][0])  # type: ignore[index]
            file.write(bytes([number + 1]))
        file.truncate(start + at)


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ("in place", [1024 * MIB, *[64 * MIB] * 24]),
        ("copy", [256 * MIB, *[16 * MIB] * 16]),
    ],
)
def test_memory_stays_below_its_bound(how: str, sizes: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_sparse_model(path, sizes)
    kept, peak_kib = map(int, run_python(ADD, tmp_path / "store", path, how).split())
    assert kept >= sum(sizes)
    assert peak_kib * 1024 < MAX_MEMORY_BYTES
