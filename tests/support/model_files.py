"""Model files for tests: written by hand, so that they owe nothing to the code under test.

The layout is the safetensors format's: the header's length in 8 bytes, a JSON header,
the tensors' bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WEIGHTS = "model.safetensors"

_DTYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I64": "<i8"}


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> None:
    """Write tensors to a safetensors file, in the order given."""
    names = {np.dtype(kind): name for name, kind in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def read_safetensors(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read a safetensors file's tensors, in the order of their bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            _DTYPES[entry["dtype"]],
        ).reshape(entry["shape"])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


class FineTune(NamedTuple):
    """A model that shares most tensors with another.

    Attributes
    ----------
    folder : Path
        Its files.
    changed : list of str
        Names of the tensors that differ.
    changed_bytes : int
        Their size.
    """

    folder: Path
    changed: list[str]
    changed_bytes: int


def make_fine_tune(base: Path, folder: Path, pattern: str) -> FineTune:
    """Copy a model's folder, with other numbers in the tensors whose name matches."""
    shutil.copytree(base, folder)
    tensors = read_safetensors(base / WEIGHTS)
    changed = [name for name in tensors if fnmatch.fnmatchcase(name, pattern)]
    assert changed, pattern
    for name in changed:
        tensors[name] = np.add(tensors[name], 1, dtype=tensors[name].dtype)
    write_safetensors(folder / WEIGHTS, tensors)
    return FineTune(folder, changed, sum(tensors[name].nbytes for name in changed))


def make_grown_vocabulary(base: Path, folder: Path, embedding: str, rows: int) -> FineTune:
    """Copy a model's folder, with rows appended to its embedding."""
    shutil.copytree(base, folder)
    tensors = read_safetensors(base / WEIGHTS)
    old = tensors[embedding]
    new_rows = np.random.default_rng(rows).standard_normal((rows, *old.shape[1:]))
    tensors[embedding] = np.concatenate([old, new_rows.astype(old.dtype)])
    write_safetensors(folder / WEIGHTS, tensors)
    return FineTune(folder, [embedding], tensors[embedding].nbytes - old.nbytes)


def make_random_model(folder: Path, tensor_sizes: Mapping[str, int], seed: int) -> Path:
    """Write a model of random bytes, whose tensors have these names and sizes in bytes."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    write_safetensors(
        folder / WEIGHTS,
        {
            name: np.frombuffer(generator.bytes(size), np.uint8)
            for name, size in tensor_sizes.items()
        },
    )
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


def sha256_of_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found
