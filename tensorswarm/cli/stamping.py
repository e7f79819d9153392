"""The commands that put hash metadata into model files and beside them: stamp, manifest."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tensorswarm.store.errors import BadInput

from .output import Output, human_bytes


def stamp(args: argparse.Namespace, output: Output) -> int:
    """Write a copy of a file with its tensors' hashes in its header."""
    from tensorswarm.store.stamping import stamp_file

    target: Path = args.out or args.file.with_name(f"{args.file.stem}.stamped{args.file.suffix}")
    done = 0
    with output.progress("stamping") as show:

        def count(byte_count: int) -> None:
            nonlocal done
            done += byte_count
            show(done, 0)

        tensors = stamp_file(args.file, target, progress=count)
    before, after = args.file.stat().st_size, target.stat().st_size
    document = {
        "path": str(target),
        "tensors": tensors,
        "bytes": after,
        "stamp_bytes": after - before,
    }
    output.result(
        document,
        lambda: output.say(
            f"{target}: {tensors} tensors stamped, {human_bytes(after - before)} longer"
        ),
    )
    return 0


def manifest(args: argparse.Namespace, output: Output) -> int:
    """Write a model's manifest as JSON beside its files."""
    from tensorswarm.store import sidecar
    from tensorswarm.store.stamping import describe_with_lists

    path: Path = args.file
    found, lists = describe_with_lists(path)
    beside = path / sidecar.FOLDER_NAME if path.is_dir() else None
    target: Path = args.out or beside or path.with_name(path.name + sidecar.SUFFIX)
    text = sidecar.encode(found, lists)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise BadInput(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    document = {
        "path": str(target),
        "model": found.model_id,
        "weights": found.weights_digest.hex(),
        "bytes": len(text.encode()),
    }

    def show() -> None:
        output.say(f"model    {found.model_id}")
        output.say(f"weights  {found.weights_digest.hex()}")
        output.say(f"written  {target}")

    output.result(document, show)
    return 0
