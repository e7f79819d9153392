"""Models in every format, written by each format's own public library.

A `Writer` takes numpy arrays by name (BF16 as ``ml_dtypes``) and writes them into a
folder. What TensorFlow.js itself does not write, shards and quantised weights, is written
by hand after its public description (`tfjs_library` has what it writes, and reads).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.tfjs_library import DTYPES as TFJS_DTYPES
from tests.support.tfjs_library import write_with_tfjs
from tests.support.tools import require_module

Arrays = Mapping[str, NDArray[Any]]

SHARD_BYTES = 4 << 20
"""Size of TensorFlow.js's shards, as its converter makes them."""


def write_safetensors(folder: Path, arrays: Arrays) -> None:
    require_module("safetensors")
    from safetensors.numpy import save_file

    save_file(dict(arrays), folder / "model.safetensors")


def write_sharded(folder: Path, arrays: Arrays, shards: int = 3) -> None:
    require_module("safetensors")
    from safetensors.numpy import save_file

    names = sorted(arrays)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: arrays[name] for name in mine}, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_npz(folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "model.npz", **_for_numpy(arrays))


def write_npz_compressed(folder: Path, arrays: Arrays) -> None:
    np.savez_compressed(folder / "model.npz", **_for_numpy(arrays))


def _for_numpy(arrays: Arrays) -> dict[str, NDArray[Any]]:
    # The keyword "file" is savez's own.
    return {name: array for name, array in arrays.items() if name != "file"}


def write_npy(folder: Path, arrays: Arrays) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def write_torch(folder: Path, arrays: Arrays) -> None:
    torch = import_torch()
    torch.save({name: to_torch(array) for name, array in arrays.items()}, folder / "model.pt")


def import_torch() -> Any:
    """Return PyTorch, or skip the test, in CI too: it is large, and not everywhere to be had.

    What is to be tested without it is in ``tests/vectors/views.pt``.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library it is linked to is missing
        pytest.skip(f"needs PyTorch: {error}")
    return torch


def to_torch(array: NDArray[Any]) -> Any:
    """Return a torch tensor of an array's own bytes."""
    torch = import_torch()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def write_gguf(folder: Path, arrays: Arrays) -> None:
    require_module("gguf")
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "bert")
    writer.add_name("a test")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cd"])
    for name, array in arrays.items():
        if array.dtype.name == "bfloat16":
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def onnx_model(arrays: Arrays) -> Any:
    """Return a model with these initializers and a node."""
    from onnx import TensorProto, helper, numpy_helper

    initializers = []
    for name, array in arrays.items():
        if array.dtype.name == "bfloat16":
            initializers.append(
                helper.make_tensor(
                    name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True
                )
            )
        else:
            initializers.append(numpy_helper.from_array(array, name))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", [value], [result], initializers))


def write_onnx(folder: Path, arrays: Arrays) -> None:
    require_module("onnx")
    (folder / "model.onnx").write_bytes(onnx_model(arrays).SerializeToString())


def write_onnx_external(folder: Path, arrays: Arrays) -> None:
    require_module("onnx")
    import onnx

    onnx.save_model(
        onnx_model(arrays),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=64,
    )


def write_tfjs(folder: Path, arrays: Arrays, shard_bytes: int = SHARD_BYTES) -> None:
    kinds = {"float32": "float32", "int32": "int32", "bool": "bool", "complex64": "complex64"}
    weights, data = [], bytearray()
    for name, array in arrays.items():
        kind = array.dtype.name
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape)}
        if kind in kinds:
            entry["dtype"] = kinds[kind]
        else:
            entry |= {"dtype": "float32", "quantization": {"dtype": kind, "original_dtype": "x"}}
        weights.append(entry)
        data += array.tobytes()
    count = max(1, -(-len(data) // shard_bytes))
    paths = [f"group1-shard{i + 1}of{count}.bin" for i in range(count)]
    for i, path in enumerate(paths):
        (folder / path).write_bytes(data[i * shard_bytes : (i + 1) * shard_bytes])
    document = {
        "format": "graph-model",
        "modelTopology": {"node": []},
        "weightsManifest": [{"paths": paths, "weights": weights}],
    }
    (folder / "model.json").write_text(json.dumps(document))


def write_tfjs_small_shards(folder: Path, arrays: Arrays) -> None:
    write_tfjs(folder, arrays, shard_bytes=100)


class Writer(NamedTuple):
    """A way to write arrays: its name, the dtypes it takes, and what it cannot do."""

    name: str
    write: Callable[[Path, Arrays], None]
    dtypes: frozenset[str]
    takes_empty: bool = True
    takes_scalars: bool = True
    bfloat16_is_named: bool = True


_COMMON = frozenset({"float32", "float16", "int32", "uint8"})
_NUMPY = _COMMON | {"float64", "int64", "int8", "int16", "bool", "complex64"}

WRITERS = [
    Writer("safetensors", write_safetensors, _NUMPY | {"bfloat16"}),
    Writer("sharded", write_sharded, _NUMPY | {"bfloat16"}),
    Writer("npy", write_npy, _NUMPY | {"bfloat16"}, bfloat16_is_named=False),
    Writer("npz", write_npz, _NUMPY | {"bfloat16"}, bfloat16_is_named=False),
    Writer("npz-deflated", write_npz_compressed, _NUMPY | {"bfloat16"}, bfloat16_is_named=False),
    Writer("torch", write_torch, _NUMPY | {"bfloat16"}),
    Writer(
        "gguf",
        write_gguf,
        frozenset({"float32", "float16", "int32", "float64", "int64", "int8", "bfloat16"}),
        takes_empty=False,
        takes_scalars=False,
    ),
    Writer("onnx", write_onnx, _NUMPY | {"bfloat16"}),
    Writer("onnx-external", write_onnx_external, _NUMPY | {"bfloat16"}),
    Writer("tfjs", write_with_tfjs, TFJS_DTYPES),
    Writer("tfjs-shards", write_tfjs, frozenset({"float32", "int32", "bool", "float16", "uint8"})),
    Writer(
        "tfjs-small-shards",
        write_tfjs_small_shards,
        frozenset({"float32", "int32", "bool", "float16", "uint8"}),
    ),
]
