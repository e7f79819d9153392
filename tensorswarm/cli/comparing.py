"""The commands that look across models: adopt, diff, dedup."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorswarm.store.comparing import Deduplication, Difference, TensorPair, compare, deduplicate
from tensorswarm.store.errors import BadInput, NotFound
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store

from ..refs import RefKind, parse_ref
from .output import Output, count_of, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PLOTTED = 40
"""Most models in one picture: more could not be told apart."""


def adopt(args: argparse.Namespace, output: Output) -> int:
    """Register the models of other tools' caches where they lie."""
    from tensorswarm.store.adopt import adopt as adopt_folders

    done = 0
    with Store(args.store) as store, output.progress("hashing") as show:

        def count(byte_count: int) -> None:
            nonlocal done
            done += byte_count
            show(done, 0)

        result = adopt_folders(store, args.folders, progress=count)
        store.sync()
    models = [
        {
            "name": each.name,
            "model": each.manifest.model_id,
            "bytes": each.manifest.total_bytes,
            "new_bytes": each.new_bytes,
            "known": each in result.known,
        }
        for each in [*result.models, *result.known]
    ]
    document: dict[str, Any] = {
        "models": models,
        "refused": [{"name": name, "reason": reason} for name, reason in result.refused],
        "bytes": result.total_bytes,
        "new_bytes": result.new_bytes,
        "duplicate_bytes": result.duplicate_bytes,
    }

    def text() -> None:
        rows = [
            [
                str(model["name"]),
                human_bytes(float(str(model["bytes"]))),
                "as before" if model["known"] else human_bytes(float(str(model["new_bytes"]))),
                str(model["model"]),
            ]
            for model in models
        ]
        output.table(["name", "size ", "new ", "model"], rows)
        for name, reason in result.refused:
            output.note(f"{name} is left out: {reason}")
        output.say(
            f"{count_of(len(models), 'model')}, {human_bytes(result.total_bytes)}; "
            f"{human_bytes(result.new_bytes)} new to the store, "
            f"{human_bytes(result.duplicate_bytes)} were duplicates"
        )

    output.result(document, text)
    return 0 if models or not result.refused else BadInput.exit_code


def manifest_of(store: Store, text: str) -> Manifest:
    """Return the manifest of a model in the store, or of a file or folder.

    Raises
    ------
    BadInput
        It is a tensor, or the file is malformed.
    NotFound
        The model is not here.
    """
    ref = parse_ref(text)
    if ref.kind is RefKind.TENSOR:
        raise BadInput(f"{text} is a tensor, not a model")
    if ref.kind is RefKind.PATH:
        from tensorswarm.store.ingest import describe_paths

        return describe_paths([ref.path])
    manifest = store.manifest(ref.digest)
    if manifest is None:
        raise NotFound(f"{text} is not in the store: `tensorswarm fetch` it, or see `ls`")
    return manifest


def diff(args: argparse.Namespace, output: Output) -> int:
    """Show which tensors two models share."""
    with Store(args.store) as store:
        a, b = manifest_of(store, args.a), manifest_of(store, args.b)
    found = compare(a, b)
    document = {
        "a": a.model_id,
        "b": b.model_id,
        "equal_weights": a.weights_digest == b.weights_digest,
        "shared_bytes": found.shared_bytes,
        "a_bytes": found.a_bytes,
        "b_bytes": found.b_bytes,
        "bytes_saved": found.shared_bytes,
        "same": [pair.name for pair in found.same],
        "changed": [pair.name for pair in found.changed],
        "renamed": [pair.name for pair in found.renamed],
        "only_a": [pair.name for pair in found.only_a],
        "only_b": [pair.name for pair in found.only_b],
    }
    if args.plot is not None:
        _plot_difference(args.plot, found)
    output.result(document, lambda: _print_difference(found, output))
    return 0


def _kinds(found: Difference) -> list[tuple[str, list[TensorPair]]]:
    return [
        ("same", found.same),
        ("renamed", found.renamed),
        ("changed", found.changed),
        ("only in A", found.only_a),
        ("only in B", found.only_b),
    ]


def _print_difference(found: Difference, output: Output) -> None:
    rows = [
        [
            kind,
            str(len(pairs)),
            human_bytes(sum(pair.a_bytes for pair in pairs)),
            human_bytes(sum(pair.b_bytes for pair in pairs)),
        ]
        for kind, pairs in _kinds(found)
    ]
    output.table(["tensors", "count ", "in A ", "in B "], rows)
    rows = [
        [kind, pair.name, human_bytes(pair.a_bytes or pair.b_bytes)]
        for kind, pairs in _kinds(found)[1:]
        for pair in pairs
    ]
    if rows:
        output.say()
        output.table(["", "tensor", "size "], rows)
    output.say()
    output.say(f"shared, and kept once: {human_bytes(found.shared_bytes)}")


def dedup(args: argparse.Namespace, output: Output) -> int:
    """Show what several models take together, each tensor kept once."""
    with Store(args.store) as store:
        texts = args.refs
        if texts:
            manifests = [manifest_of(store, text) for text in texts]
        else:
            records = store.models()
            known = [(record, store.manifest(record.digest)) for record in records]
            texts = [record.name or "-" for record, manifest in known if manifest is not None]
            manifests = [manifest for _, manifest in known if manifest is not None]
    if not manifests:
        raise NotFound("no models here yet: `tensorswarm add PATH` or `tensorswarm fetch REF`")
    found = deduplicate(manifests)
    saved = found.separate_bytes - found.together_bytes
    document = {
        "models": [
            {
                "ref": text,
                "model": manifest.model_id,
                "weights": manifest.weights_digest.hex(),
                "bytes": share.total_bytes,
                "own_bytes": share.own_bytes,
            }
            for text, manifest, share in zip(texts, manifests, found.shares, strict=True)
        ],
        "bytes_separate": found.separate_bytes,
        "bytes_together": found.together_bytes,
        "bytes_saved": saved,
        "overlap": found.overlap,
    }
    if args.plot is not None:
        _plot_deduplication(args.plot, texts, found)

    def text() -> None:
        rows = [
            [
                name,
                human_bytes(share.total_bytes),
                human_bytes(share.total_bytes - share.own_bytes),
                human_bytes(share.own_bytes),
            ]
            for name, share in zip(texts, found.shares, strict=True)
        ]
        output.table(["model", "size ", "shared ", "own "], rows)
        output.say()
        share = saved / found.separate_bytes if found.separate_bytes else 0.0
        output.say(
            f"{human_bytes(found.together_bytes)} together instead of "
            f"{human_bytes(found.separate_bytes)}: {human_bytes(saved)} saved ({share:.0%})"
        )

    output.result(document, text)
    return 0


def _axes(path: Path) -> tuple[Any, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("--plot needs matplotlib: pip install 'tensorswarm[plot]'") from error
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise BadInput(f"--plot {path}: give a name that ends in .png, .svg or .pdf")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise BadInput(f"--plot {path}: {error.strerror or error}") from error


def _plot_difference(path: Path, found: Difference) -> None:
    figure, axes = _axes(path)
    left = [0.0, 0.0]
    for kind, pairs in _kinds(found):
        values = [
            sum(pair.a_bytes for pair in pairs) / 2**20,
            sum(pair.b_bytes for pair in pairs) / 2**20,
        ]
        axes.barh(["A", "B"], values, left=left, label=kind)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_xlabel("MiB of tensors")
    axes.legend()
    _save(figure, path)


def _plot_deduplication(path: Path, names: list[str], found: Deduplication) -> None:
    if len(names) > MAX_PLOTTED:
        raise BadInput(f"--plot shows at most {MAX_PLOTTED} models")
    figure, axes = _axes(path)
    labels = [f"{i + 1}. {name[-40:]}" for i, name in enumerate(names)]
    own = [share.own_bytes / 2**20 for share in found.shares]
    shared = [(s.total_bytes - s.own_bytes) / 2**20 for s in found.shares]
    axes.barh(labels, own, label="its own")
    axes.barh(labels, shared, left=own, label="shared with another")
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.legend()
    _save(figure, path)
