"""Models that other tools keep on this disk, registered where they lie.

Three layouts are known:

- a Hugging Face cache: ``models--ORG--NAME/snapshots/COMMIT`` is a folder of links into
  ``blobs``; every snapshot is a model (huggingface_hub, "Understand caching");
- an Ollama store: ``manifests/HOST/NAMESPACE/NAME/TAG`` is JSON that lists ``blobs`` by
  their SHA-256;
- any other folder: the outermost folders that hold model files themselves are a model
  each.

Links to files are followed, so a file that several models link to is registered once.
A model that was adopted before and whose files have not changed since is not read again.
A model that cannot be read is reported, with the reason, and does not keep the others
from being adopted. No file is written to, and nothing over 64 KiB is copied but tensors
that have to be decoded or put together.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .adding import Progress
from .errors import BadInput
from .ingest import SKIPPED_FOLDERS, add_paths, files_under
from .manifest import Manifest
from .store import Store

MAX_MODELS = 100_000
"""Most models looked for in one place."""

MAX_JSON_BYTES = 4 << 20
"""Largest Ollama manifest read; they have about a kilobyte."""

MODEL_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".npz", ".npy", ".pt", ".pth", ".ckpt")
"""Ends of names that make a folder a model."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Files that may be pickles of more than tensors: kept unread, if they cannot be read."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Candidate(NamedTuple):
    """A model found: a name for people, and its files and folders; none if it is damaged."""

    name: str
    paths: list[Path]


class AdoptedModel(NamedTuple):
    """A model that was adopted."""

    name: str
    manifest: Manifest
    new_bytes: int


@dataclass
class Adopted:
    """What `adopt` did.

    Attributes
    ----------
    models : list of AdoptedModel
        Models that were read.
    known : list of AdoptedModel
        Models that were adopted before, and are unchanged.
    refused : list of (str, str)
        Names of models that could not be read, and why.
    """

    models: list[AdoptedModel] = field(default_factory=list)
    known: list[AdoptedModel] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes of all models found here, each counted with all it has."""
        return sum(each.manifest.total_bytes for each in [*self.models, *self.known])

    @property
    def new_bytes(self) -> int:
        """Bytes that were new to the store."""
        return sum(each.new_bytes for each in self.models)

    @property
    def duplicate_bytes(self) -> int:
        """Bytes of the models read now that were there already, in another or the same."""
        return sum(each.manifest.total_bytes - each.new_bytes for each in self.models)


def find_models(folder: Path) -> Iterator[Candidate]:
    """Yield the models in a folder of any of the known layouts.

    Raises
    ------
    BadInput
        It is no folder, cannot be read, or holds too many models.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder; `tensorswarm add --no-copy` takes files")
    found = _find(folder)
    for count in itertools.count():
        try:
            candidate = next(found, None)
        except OSError as error:
            raise BadInput(
                f"{error.filename or folder}: cannot be read: {error.strerror}"
            ) from error
        if candidate is None:
            return
        if count >= MAX_MODELS:
            raise BadInput(f"{folder}: more than {MAX_MODELS} models")
        yield candidate


def _find(folder: Path) -> Iterator[Candidate]:
    for base in (folder, folder / "hub"):
        if any(base.glob("models--*/snapshots")):
            yield from _hugging_face(base)
            return
    for base in (folder, folder / "models"):
        if (base / "manifests").is_dir() and (base / "blobs").is_dir():
            yield from _ollama(base)
            return
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        yield from _snapshots(folder)
        return
    yield from _tree(folder)


def _hugging_face(base: Path) -> Iterator[Candidate]:
    for repository in sorted(base.glob("models--*")):
        yield from _snapshots(repository)


def _snapshots(repository: Path) -> Iterator[Candidate]:
    name = repository.name.removeprefix("models--").replace("--", "/")
    snapshots = repository / "snapshots"
    for snapshot in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        if snapshot.is_dir() and any(path.is_file() for path in snapshot.rglob("*")):
            yield Candidate(f"{name}@{snapshot.name[:12]}", [snapshot])


def _ollama(base: Path) -> Iterator[Candidate]:
    for path in sorted((base / "manifests").rglob("*")):
        if not path.is_file():
            continue
        parts = path.relative_to(base / "manifests").parts
        name = f"{'/'.join(parts[1:-1]).removeprefix('library/')}:{parts[-1]}"
        digests = _ollama_layers(path)
        blobs = [base / "blobs" / f"sha256-{digest}" for digest in digests]
        yield Candidate(name, [path, *dict.fromkeys(blobs)] if blobs else [])


def _ollama_layers(path: Path) -> list[str]:
    """Return the digests that an Ollama manifest lists; none if it is not one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return []
        document: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(document, dict):
        return []
    layers = document.get("layers")
    entries = [document.get("config"), *(layers if isinstance(layers, list) else ())]
    texts = [str(entry.get("digest")) for entry in entries if isinstance(entry, dict)]
    return [match[1] for match in map(_DIGEST.fullmatch, texts) if match]


def _tree(folder: Path) -> Iterator[Candidate]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        if any(name.lower().endswith(MODEL_SUFFIXES) for name in files):
            folders.clear()
            path = Path(parent)
            name = path.relative_to(folder).as_posix()
            yield Candidate(folder.name if name == "." else f"{folder.name}/{name}", [path])


def adopt(
    store: Store,
    folders: Sequence[Path],
    *,
    progress: Progress = lambda count: None,
    on_model: Callable[[str], None] = lambda name: None,
) -> Adopted:
    """Register every model found in `folders` where it lies.

    Parameters
    ----------
    store : Store
        Where they are registered.
    folders : sequence of Path
        Caches and folder trees.
    progress : callable
        Hears of bytes read.
    on_model : callable
        Hears of each model's name before it is read.

    Raises
    ------
    BadInput
        A folder is none, or holds no model.
    NoRoom
        The index does not take them.
    """
    result = Adopted()
    for folder in folders:
        found = False
        for candidate in find_models(folder):
            found = True
            on_model(candidate.name)
            _adopt_one(store, candidate, result, progress)
        if not found:
            raise BadInput(f"{folder}: no model found there")
    return result


def _adopt_one(store: Store, candidate: Candidate, result: Adopted, progress: Progress) -> None:
    name, paths = candidate
    if not paths:
        result.refused.append((name, "its manifest is damaged: it names no layers"))
        return
    try:
        known = _known(store, candidate)
        if known is not None:
            result.known.append(AdoptedModel(name, known, 0))
            return
        try:
            added = add_paths(store, paths, copy=False, name=name, progress=progress)
        except BadInput:
            added = add_paths(
                store, paths, copy=False, name=name, verbatim=PICKLED, progress=progress
            )
    except BadInput as error:
        result.refused.append((name, str(error)))
        return
    result.models.append(AdoptedModel(name, added.manifest, added.new_bytes))


def _known(store: Store, candidate: Candidate) -> Manifest | None:
    """Return a model's manifest if it was adopted under this name and is as it was.

    Objects in files that changed count as absent, so it is enough that none is missing
    and that the files are the same by name and size.
    """
    sizes = {}
    for path, name in files_under(candidate.paths):
        try:
            sizes[name] = path.stat().st_size
        except OSError as error:  # a link to a file that is gone, or one that goes right now
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    for record in store.models():
        if record.name != candidate.name:
            continue
        manifest = store.manifest(record.digest)
        if manifest is None or store.missing_objects(manifest, range(len(manifest.objects))):
            continue
        if {file.path: file.size_bytes for file in manifest.files} == sizes:
            return manifest
    return None
