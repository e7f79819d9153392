"""Which models are for whom: the rules that a user sets with `tensorswarm share`.

Rules
-----
- A model without a rule is public: announced, and given to whoever asks.
- A *private* model is not announced; whoever knows its id and this node gets it.
- A model *for some* is not announced either, and is given to the listed peers alone. To
  all others it is as if it were not here.
- The rules lie in ``access.json`` in the store's directory, written whole or not at all.
  A file that cannot be read is an error, never "everything is public".

What it does not do: bind those who got a model. Whoever has it decides for itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .digest import DIGEST_SIZE
from .errors import BadInput
from .place import Place, disk_errors

ACCESS_FILE = "access.json"
"""The file's name in the store's directory."""

MAX_FILE_BYTES = 16 << 20
"""Longest file read: 100,000 models with a short list each."""

MAX_LISTED_PEERS = 10_000
"""Peers on the list of one model."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Who may know of a model, and have it.

    Attributes
    ----------
    only : frozenset of str or None
        Ids of the peers that get it; None for everybody.
    """

    only: frozenset[str] | None = None


def read_rules(root: Path) -> dict[bytes, Rule]:
    """Return the rules of a store, by model digest; those not named are public.

    Raises
    ------
    BadInput
        The file is there and cannot be understood.
    """
    path = root / ACCESS_FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError("it is too long")
        return {_digest(name): _rule(each) for name, each in json.loads(data)["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path} cannot be understood ({error}); mend it, or remove it to make all public"
        ) from error


def write_rules(place: Place, rules: Mapping[bytes, Rule]) -> None:
    """Replace the rules of a store."""
    models = {
        digest.hex(): {"only": sorted(rule.only) if rule.only is not None else None}
        for digest, rule in rules.items()
    }
    temporary = place.temporary()
    with disk_errors("cannot write the access rules"):
        temporary.write_text(json.dumps({"models": models}, indent=1))
        temporary.replace(place.root / ACCESS_FILE)


def _digest(text: str) -> bytes:
    digest = bytes.fromhex(text)
    if len(digest) != DIGEST_SIZE:
        raise ValueError(f"{text[:80]!r} is not a model's digest")
    return digest


def _rule(entry: Mapping[str, object]) -> Rule:
    only = entry["only"]
    if only is None:
        return Rule()
    if not isinstance(only, list) or not all(isinstance(peer, str) for peer in only):
        raise ValueError("`only` is not a list of peer ids")
    if len(only) > MAX_LISTED_PEERS:
        raise ValueError(f"a list of {len(only)} peers")
    return Rule(frozenset(only))
