"""File formats: one module each, picked by the end of a file's name and its first bytes.

To add a format, write a module with a ``parse`` function that obeys ``layout.py``, and
enter it below. A suffix is compared without regard to case; what no suffix matches is
kept verbatim. A format whose tensors lie in several files has a second function, which is
given the layouts of all files of the model and puts better ones in their place.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from ..digest import MAX_OBJECT_SIZE
from ..errors import BadInput
from . import gguf, numpy_files, onnx, onnx_external, safetensors, tfjs, torch_zip, verbatim
from .layout import Layout, Piece, ReadAt, TensorRange, check_layout

__all__ = ["Layout", "Piece", "ReadAt", "TensorRange", "layout_of", "layouts_of"]

Parser = Callable[[int, ReadAt], Layout]

_PARSERS: dict[str, Parser] = {
    ".safetensors": safetensors.parse,
    ".gguf": gguf.parse,
    ".onnx": onnx.parse,
    ".npy": numpy_files.parse_npy,
    ".npz": numpy_files.parse_npz,
    ".pt": torch_zip.parse,
    ".pth": torch_zip.parse,
    ".bin": torch_zip.parse,
    ".ckpt": torch_zip.parse,
}

_OLLAMA_BLOB = re.compile(r"sha256-[0-9a-f]{64}")

Files = Mapping[str, tuple[int, ReadAt]]
"""Files of a model by path: size in bytes, and a way to read each."""


def layout_of(name: str, size_bytes: int, read_at: ReadAt) -> Layout:
    """Parse a file by the format that its name says it has.

    Parameters
    ----------
    name : str
        The file's name or path; its end says the format. A file named by its SHA-256,
        as Ollama names them, is GGUF if it begins so.
    size_bytes : int
        The file's length in bytes.
    read_at : ReadAt
        Reads bytes of the file; asked only for headers.

    Returns
    -------
    Layout
        Pieces that cover the file exactly, and the named tensors.

    Raises
    ------
    BadInput
        The file breaks the rules of its format, or is too large. The message
        does not repeat the name.
    """
    if not 0 <= size_bytes <= MAX_OBJECT_SIZE:
        raise BadInput(f"a file of {size_bytes} bytes, at most {MAX_OBJECT_SIZE}")
    base = name.rsplit("/", 1)[-1]
    suffix = next((end for end in _PARSERS if base.lower().endswith(end)), "")
    parse = _PARSERS.get(suffix, verbatim.parse)
    if _OLLAMA_BLOB.fullmatch(base) and gguf.is_gguf(size_bytes, read_at):
        parse = gguf.parse
    layout = parse(size_bytes, read_at)
    if layout.format == numpy_files.NPY_FORMAT:
        layout = numpy_files.named(layout, base[: -len(suffix)])
    return check_layout(layout, size_bytes)


def _refuse(name: str, error: BadInput) -> NoReturn:
    raise BadInput(f"{name}: {error}") from error


def layouts_of(
    files: Files,
    verbatim_patterns: Sequence[str] = (),
    on_error: Callable[[str, BadInput], object] = _refuse,
) -> dict[str, Layout]:
    """Parse all files of a model.

    Parameters
    ----------
    files : mapping of str to (int, ReadAt)
        The files, by path in the model.
    verbatim_patterns : sequence of str
        Patterns of paths that are not parsed.
    on_error : callable
        Told the path and the error of a file that cannot be parsed; if it returns, the
        file is kept verbatim.

    Raises
    ------
    BadInput
        A file breaks the rules of its format, and `on_error` raised it.
    """
    layouts: dict[str, Layout] = {}
    left_alone: set[str] = set()
    for name, (size_bytes, read_at) in files.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in verbatim_patterns):
            left_alone.add(name)
            layouts[name] = verbatim.parse(size_bytes, read_at)
            continue
        try:
            layouts[name] = layout_of(name, size_bytes, read_at)
        except BadInput as error:
            on_error(name, error)
            left_alone.add(name)
            layouts[name] = verbatim.parse(size_bytes, read_at)
    for name in sorted(files.keys() - left_alone):
        try:
            if name.lower().endswith(".onnx"):
                better = onnx_external.parse_group(name, files, layouts)
            elif name.lower().endswith(".json"):
                better = tfjs.parse_group(name, files, layouts)
            else:
                continue
            checked = {path: check_layout(each, files[path][0]) for path, each in better.items()}
        except BadInput as error:
            on_error(name, error)
            continue
        layouts |= {path: each for path, each in checked.items() if path not in left_alone}
    return layouts
