"""The commands that keep a store in order: rm, pin, unpin and gc."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tensorswarm.store import upkeep
from tensorswarm.store.cid import model_cid, object_cid
from tensorswarm.store.errors import BadInput
from tensorswarm.store.store import Store

from ..refs import Ref, RefKind, parse_ref
from .output import Output, human_bytes


def rm(args: argparse.Namespace, output: Output) -> int:
    """Take models out of the store, with everything that no other model needs."""
    refs = _references(args.refs)
    for ref in refs:
        if ref.kind is RefKind.TENSOR:
            raise BadInput("rm takes models: a tensor that no model needs is dropped by `gc`")
    with Store(args.store) as store:
        freed = upkeep.remove_models(store, [ref.digest for ref in refs])
    document = {"removed": [model_cid(ref.digest) for ref in refs], **_document(freed)}
    output.result(document, lambda: _say(output, f"removed {len(refs)}", freed))
    return 0


def gc(args: argparse.Namespace, output: Output) -> int:
    """Drop what no model and no pin needs."""
    with Store(args.store) as store:
        freed = upkeep.collect(store, dry_run=args.dry_run)
    document = {"dry_run": args.dry_run, **_document(freed)}
    what = "would drop" if args.dry_run else "dropped"
    output.result(document, lambda: _say(output, what, freed))
    return 0


def pin(args: argparse.Namespace, output: Output) -> int:
    """Keep models and tensors: `rm` refuses them, and `gc` leaves them."""
    refs = _references(args.refs)
    with Store(args.store) as store:
        for ref in refs:
            upkeep.pin(store, ref.digest)
    output.result({"pinned": _names(refs)}, lambda: output.say(f"pinned {len(refs)}"))
    return 0


def unpin(args: argparse.Namespace, output: Output) -> int:
    """Take pins away again."""
    refs = _references(args.refs)
    with Store(args.store) as store:
        changed = [ref for ref in refs if upkeep.unpin(store, ref.digest)]
    output.result(
        {"unpinned": _names(changed)},
        lambda: output.say(f"unpinned {len(changed)}; {len(refs) - len(changed)} had no pin"),
    )
    return 0


def _references(texts: Sequence[str]) -> list[Ref]:
    refs = [parse_ref(text) for text in dict.fromkeys(texts)]
    if any(ref.kind is RefKind.PATH for ref in refs):
        raise BadInput("this takes ids of models and tensors, not paths: see `tensorswarm ls`")
    return refs


def _names(refs: Sequence[Ref]) -> list[str]:
    return [
        object_cid(ref.digest) if ref.kind is RefKind.TENSOR else model_cid(ref.digest)
        for ref in refs
    ]


def _document(freed: upkeep.Freed) -> dict[str, int]:
    return {
        "objects": freed.objects,
        "partials": freed.partials,
        "bytes_freed": freed.size_bytes,
    }


def _say(output: Output, what: str, freed: upkeep.Freed) -> None:
    parts = f" and {freed.partials} parts of downloads" if freed.partials else ""
    output.say(f"{what}: {freed.objects} objects{parts}, {human_bytes(freed.size_bytes)}")
