"""The commands that use only the store.

Each takes the parsed arguments and an `Output`, and returns the exit code.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tensorswarm.store.cid import object_cid
from tensorswarm.store.digest import chunk_count
from tensorswarm.store.errors import BadInput, HashMismatch, NotFound, StoreDamaged
from tensorswarm.store.manifest import Manifest
from tensorswarm.store.store import Store
from tensorswarm.store.upkeep import pins

from ..refs import Ref, RefKind, parse_ref
from .network import fetch, node, peers
from .output import Output, count_of, human_bytes

__all__ = ["add", "export", "fetch", "info", "ls", "node", "peers", "verify"]


def add(args: argparse.Namespace, output: Output) -> int:
    """Add files to the store as one model."""
    from tensorswarm.store.ingest import add_paths, files_under

    total = sum(path.stat().st_size for path, _ in files_under(args.paths))
    done = 0
    with Store(args.store) as store, output.progress("hashing") as show:

        def count(byte_count: int) -> None:
            nonlocal done
            done += byte_count
            show(done, total)

        manifest, new_bytes, notes = add_paths(
            store, args.paths, copy=not args.no_copy, verbatim=args.verbatim, progress=count
        )
        store.sync()
    for note in notes:
        output.note(note)
    document: dict[str, Any] = {
        "model": manifest.model_id,
        "weights": manifest.weights_digest.hex(),
        "files": len(manifest.files),
        "tensors": _tensor_count(manifest),
        "bytes": sum(file.size_bytes for file in manifest.files),
        "new_bytes": new_bytes,
    }

    def text() -> None:
        output.say(f"model    {document['model']}")
        output.say(f"weights  {document['weights']}")
        output.say(
            f"{count_of(document['files'], 'file')}, {count_of(document['tensors'], 'tensor')}, "
            f"{human_bytes(document['bytes'])}; {human_bytes(new_bytes)} new to the store"
        )

    output.result(document, text)
    return 0


def ls(args: argparse.Namespace, output: Output) -> int:
    """List the models in the store."""
    with Store(args.store) as store:
        kept = pins(store)
        models = [
            {
                **_model_document(store, record.digest, record.name, manifest),
                "pinned": record.digest in kept,
            }
            for record in store.models()
            if (manifest := store.manifest(record.digest)) is not None
        ]

    def text() -> None:
        if not models:
            output.say("no models here yet: `tensorswarm add PATH` or `tensorswarm fetch REF`")
            return
        rows = [
            [
                str(model["name"]) or "-",
                str(model["files"]),
                str(model["tensors"]),
                human_bytes(model["bytes"]),
                "all" if model["complete"] else human_bytes(model["bytes_local"]),
                "pinned" if model["pinned"] else "",
                str(model["model"]),
            ]
            for model in models
        ]
        output.table(["name", "files ", "tensors ", "size ", "here ", "", "model"], rows)

    output.result({"store": str(args.store), "models": models}, text)
    return 0


def info(args: argparse.Namespace, output: Output) -> int:
    """Show what a model or a tensor is made of."""
    ref = parse_ref(args.ref)
    if ref.kind is RefKind.PATH:
        from tensorswarm.store.ingest import describe_paths

        manifest = describe_paths([ref.path])
        with Store(args.store) as store:
            document = _model_document(store, manifest.digest, ref.path.name, manifest)
    else:
        with Store(args.store) as store:
            if ref.kind is RefKind.TENSOR:
                return _tensor_info(store, ref.digest, output)
            manifest = _known_manifest(store, ref)
            name = next((m.name for m in store.models() if m.digest == ref.digest), "")
            document = _model_document(store, ref.digest, name, manifest)
    document["file_list"] = [
        {
            "path": file.path,
            "size": file.size_bytes,
            "format": file.format,
            "tensors": len(file.tensors),
        }
        for file in manifest.files
    ]
    if args.tensors:
        document["tensor_list"] = _tensor_documents(manifest)
    output.result(document, lambda: _print_info(document, output))
    return 0


def _print_info(document: dict[str, Any], output: Output) -> None:
    for key in ("model", "weights", "name"):
        output.say(f"{key:9}{document[key]}")
    here = "all of it" if document["complete"] else human_bytes(document["bytes_local"])
    output.say(
        f"{count_of(document['tensors'], 'tensor')} in {count_of(document['files'], 'file')}, "
        f"{human_bytes(document['bytes'])}; here: {here}"
    )
    output.say()
    rows = [
        [file["path"], file["format"], str(file["tensors"]), human_bytes(file["size"])]
        for file in document["file_list"]
    ]
    output.table(["file", "format", "tensors ", "size "], rows)
    if "tensor_list" in document:
        output.say()
        rows = [
            [t["name"], t["dtype"], "×".join(map(str, t["shape"])), t["cid"]]
            for t in document["tensor_list"]
        ]
        output.table(["tensor", "dtype", "shape", "cid"], rows)


def _tensor_documents(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "size": manifest.size_of(tensor.object_index),
            "digest": manifest.digest_of(tensor.object_index).hex(),
            "cid": object_cid(manifest.digest_of(tensor.object_index)),
            "file": file.path,
        }
        for file in manifest.files
        for tensor in file.tensors
    ]


def _tensor_info(store: Store, digest: bytes, output: Output) -> int:
    holding = store.holdings([digest]).get(digest)
    if holding is None:
        raise NotFound(f"tensor {digest.hex()} is not in the store")
    document = {
        "tensor": object_cid(digest),
        "digest": digest.hex(),
        "bytes": holding.size_bytes,
        "chunks": chunk_count(holding.size_bytes),
        "complete": holding.proved is None,
    }

    def text() -> None:
        for key, value in document.items():
            output.say(f"{key:9}{value}")

    output.result(document, text)
    return 0


def verify(args: argparse.Namespace, output: Output) -> int:
    """Hash what the store has; what is damaged is dropped, so that it can be fetched anew."""
    from tensorswarm.store.checking import check_object

    with Store(args.store) as store:
        digests = _digests_to_verify(store, args.ref)
        here = store.records(digests)
        missing = [digest for digest in digests if digest not in here]
        damaged: list[bytes] = []
        checked_bytes = 0
        total = sum(record.size_bytes for record in here.values())
        with output.progress("verifying") as show:
            for digest, record in here.items():
                try:
                    check_object(store, digest)
                except StoreDamaged:
                    damaged.append(digest)
                checked_bytes += record.size_bytes
                show(checked_bytes, total)
        if damaged:
            store.forget(damaged)
    document = {
        "checked": len(here),
        "bytes": checked_bytes,
        "damaged": [digest.hex() for digest in damaged],
        "missing": len(missing),
        "ok": not damaged and not missing,
    }

    def text() -> None:
        output.say(f"{len(here)} objects, {human_bytes(checked_bytes)} hashed")
        for digest in damaged:
            output.say(f"damaged, dropped: {digest.hex()}")
        if missing:
            output.say(f"{len(missing)} objects are not here")
        output.say("all good" if document["ok"] else "fetch the model again to mend this")

    output.result(document, text)
    if damaged:
        return HashMismatch.exit_code
    return NotFound.exit_code if missing else 0


def _digests_to_verify(store: Store, text: str | None) -> list[bytes]:
    if text is None:
        return store.all_digests()
    ref = parse_ref(text)
    if ref.kind is RefKind.TENSOR:
        return [ref.digest]
    if ref.kind is RefKind.PATH:
        from tensorswarm.store.ingest import describe_paths

        manifest = describe_paths([ref.path])
        return [each.digest for each in manifest.objects]
    manifest = _known_manifest(store, ref)
    return [ref.digest, *(each.digest for each in manifest.objects)]


def export(args: argparse.Namespace, output: Output) -> int:
    """Write a model's files, or a tensor's bytes."""
    from tensorswarm.store.export import export_files, export_object, select, whole_files

    folder: Path | None = args.out or args.folder
    if folder is None or (args.out and args.folder and args.out != args.folder):
        raise BadInput("export needs one folder: `tensorswarm export REF DIR`")
    ref = parse_ref(args.ref)
    if ref.kind is RefKind.PATH:
        raise BadInput("export takes a model id or a tensor digest, not a path")
    with Store(args.store) as store:
        if ref.kind is RefKind.TENSOR:
            if not store.has(ref.digest):
                raise NotFound(f"tensor {args.ref} is not in the store")
            written = [folder / object_cid(ref.digest)]
            export_object(store, ref.digest, written[0])
        else:
            manifest = _known_manifest(store, ref)
            chosen = select(manifest, args.include)
            missing = store.missing_objects(manifest, chosen)
            if missing:
                raise NotFound(
                    f"{len(missing)} of the model's objects are not here: "
                    f"`tensorswarm fetch {args.ref}` first"
                )
            files = whole_files(manifest, chosen)
            total = sum(file.size_bytes for file in files)
            done = 0
            with output.progress("writing") as show:

                def count(byte_count: int) -> None:
                    nonlocal done
                    done += byte_count
                    show(done, total)

                written = export_files(store, manifest, files, folder, progress=count)
    document = {
        "model": args.ref,
        "path": str(folder),
        "files": len(written),
        "bytes": sum(path.stat().st_size for path in written),
    }
    line = f"{count_of(len(written), 'file')}, {human_bytes(document['bytes'])}: {folder}"
    output.result(document, lambda: output.say(line))
    return 0


def _known_manifest(store: Store, ref: Ref) -> Manifest:
    manifest = store.manifest(ref.digest)
    if manifest is None:
        raise NotFound("that model is not in the store: `tensorswarm fetch` it, or see `ls`")
    return manifest


def _tensor_count(manifest: Manifest) -> int:
    return sum(len(file.tensors) for file in manifest.files)


def _model_document(store: Store, digest: bytes, name: str, manifest: Manifest) -> dict[str, Any]:
    missing = store.missing_objects(manifest, range(len(manifest.objects)))
    lacking = sum(manifest.objects[index].size_bytes for index in missing)
    return {
        "model": manifest.model_id,
        "weights": manifest.weights_digest.hex(),
        "name": name,
        "files": len(manifest.files),
        "tensors": _tensor_count(manifest),
        "bytes": manifest.total_bytes,
        "bytes_local": manifest.total_bytes - lacking,
        "complete": not missing,
    }
