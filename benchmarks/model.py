"""A model of random bytes in the shape of a small language model, as one safetensors file."""

from __future__ import annotations

import json
import random
from pathlib import Path

MIB = 1 << 20
LAYERS = 12


def tensor_sizes(total_mib: int) -> list[tuple[str, int]]:
    """Return names and sizes (bytes) of tensors that add up to `total_mib` MiB.

    A quarter is the embedding; the rest is twelve equal layers of four square matrices
    and two of twice that size. What rounding leaves goes to the output norm.
    """
    total = total_mib * MIB
    sizes = [("embed.weight", total // 4)]
    unit = (total - sizes[0][1]) // (LAYERS * 8) // 2 * 2
    for layer in range(LAYERS):
        sizes += [(f"layers.{layer}.attention.{part}.weight", unit) for part in "qkvo"]
        sizes += [(f"layers.{layer}.mlp.{part}.weight", 2 * unit) for part in ("up", "down")]
    rest = total - sum(size for _, size in sizes)
    if rest:
        sizes.append(("norm.weight", rest))
    return sizes


def write_model(path: Path, sizes: list[tuple[str, int]], seed: int = 1) -> None:
    """Write a safetensors file of F16 tensors with random bytes."""
    header: dict[str, object] = {}
    position = 0
    for name, size in sizes:
        header[name] = {
            "dtype": "F16",
            "shape": [size // 2],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, size in sizes:
            for start in range(0, size, 16 * MIB):
                file.write(generator.randbytes(min(16 * MIB, size - start)))
