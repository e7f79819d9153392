"""The commands that say for whom things are: share, network-key."""

from __future__ import annotations

import argparse

from tensorswarm.store.access import Rule, read_rules, write_rules
from tensorswarm.store.errors import BadInput, NotFound
from tensorswarm.store.store import Store

from ..refs import RefKind, parse_ref
from .output import Output


def share(args: argparse.Namespace, output: Output) -> int:
    """Set, or show, whom a model is for. A running node heeds it within a second."""
    ref = parse_ref(args.ref)
    if ref.kind is not RefKind.MODEL:
        raise BadInput(f"{args.ref} is not a model id: whole models are shared or not")
    with Store(args.store) as store:
        rules = read_rules(store.root)
        if args.only:
            rules[ref.digest] = Rule(frozenset(map(_peer_id, args.only)))
        elif args.private:
            rules[ref.digest] = Rule()
        elif args.public:
            rules.pop(ref.digest, None)
        elif store.manifest(ref.digest) is None and ref.digest not in rules:
            raise NotFound(f"{args.ref} is not in the store")
        if args.only or args.private or args.public:
            write_rules(store.place, rules)
        rule = rules.get(ref.digest)
    only = sorted(rule.only) if rule is not None and rule.only is not None else None
    document = {"model": args.ref, "announced": rule is None, "only": only}

    def text() -> None:
        if rule is None:
            output.say("public: announced, and given to whoever asks")
        elif only is None:
            output.say("private: given to whoever asks this node for it, and not announced")
        else:
            output.say(f"for {len(only)} peers only, and not announced")
            for peer_id in only:
                output.say(f"  {peer_id}")

    output.result(document, text)
    return 0


def network_key(args: argparse.Namespace, output: Output) -> int:
    """Make the key file of a private network."""
    from tensorswarm.p2p.host.pnet import fingerprint, write_new_key

    document = {"file": str(args.file), "network": fingerprint(write_new_key(args.file))}

    def text() -> None:
        output.say(f"network  {document['network']}")
        output.say(f"key      {args.file}: give it to every member, and to nobody else")

    output.result(document, text)
    return 0


def _peer_id(text: str) -> str:
    from tensorswarm.p2p.host.addresses import parse_peer_id

    try:
        return parse_peer_id(text)
    except ValueError as error:
        raise BadInput(f"not a peer id: {text[:100]!r}: {error}") from error
