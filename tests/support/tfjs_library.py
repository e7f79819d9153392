"""TensorFlow.js models written and read by TensorFlow.js, which runs in Node.

The library writes all weights into one file, of the types float32, int32 and bool. Shards
and quantised weights are made by another program, its converter, which is written in
Python and needs TensorFlow: those `format_files` writes by hand, and the library reads.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.interop import js_command

DTYPES = frozenset({"float32", "int32", "bool"})
TIMEOUT_S = 60.0


def write_with_tfjs(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Have the library write ``model.json`` and the weights into a folder."""
    rows = [
        {"name": name, "dtype": array.dtype.name, "shape": array.shape, "size": array.nbytes}
        for name, array in arrays.items()
    ]
    with tempfile.TemporaryDirectory() as name:
        table, data = Path(name, "table"), Path(name, "data")
        table.write_text(json.dumps(rows))
        with data.open("wb") as file:
            for array in arrays.values():
                file.write(array.tobytes())
        _run("write", table, data, folder)


def read_with_tfjs(folder: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors that the library finds in a folder's model."""
    with tempfile.TemporaryDirectory() as name:
        table, data = Path(name, "table"), Path(name, "data")
        _run("read", folder, table, data)
        content, at, arrays = data.read_bytes(), 0, {}
        for row in json.loads(table.read_text()):
            part = np.frombuffer(content[at : at + row["size"]], row["dtype"])
            arrays[row["name"]] = part.reshape(row["shape"])
            at += row["size"]
    return arrays


def _run(*arguments: str | Path) -> None:
    command = js_command("tfjs.mjs", *map(str, arguments))
    completed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert completed.returncode == 0, completed.stderr
