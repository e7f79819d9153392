"""Who may have which object, by the rules of the store's models.

Purpose
-------
`Access` answers two questions for the planes that serve peers: may this peer have this
object, and is this model announced. The rules themselves are `store.access`'s.

Rules
-----
- An object that a public model contains, or none, is everybody's. One that only models
  for some contain is for those on any of their lists. Manifests and lists of chunks are
  objects like any other.
- A peer that may not have an object is answered as if it were not here. A node with
  lists *refuses* what it cannot give, whether it is missing or not for the asker, so
  that a refusal tells neither.
- Rules that can no longer be read leave those in force that were read last.

Methods may be called in any thread; `refresh` blocks on the disk.
"""

from __future__ import annotations

import logging

from tensorswarm.store.access import ACCESS_FILE, Rule, read_rules
from tensorswarm.store.errors import BadInput
from tensorswarm.store.store import Store

log = logging.getLogger("tensorswarm.node")


class Access:
    """The rules of one store, as they are at the moment.

    Parameters
    ----------
    store : Store
        Whose models they concern.

    Raises
    ------
    BadInput
        The rules cannot be understood.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: tuple[object, ...] = ()
        self._rules: dict[bytes, Rule] = {}
        self._allowed: dict[bytes, frozenset[str]] = {}
        self._load()

    @property
    def is_guarded(self) -> bool:
        """Whether there are lists at all."""
        return bool(self._allowed)

    def may_have(self, peer_id: str, digest: bytes) -> bool:
        """Tell whether a peer may have an object, or know that it is here."""
        allowed = self._allowed.get(digest)
        return allowed is None or peer_id in allowed

    def is_public(self, digest: bytes) -> bool:
        """Tell whether anybody may have an object: over plain HTTP nobody has a name."""
        return digest not in self._allowed

    def is_announced(self, model: bytes) -> bool:
        """Tell whether a model, and what only it contains, is announced."""
        return model not in self._rules

    def refresh(self) -> bool:
        """Read the rules again if anything has changed; return whether it had."""
        if self._stamp() == self._seen:
            return False
        try:
            self._load()
        except BadInput as error:
            log.warning("%s; the rules from before stay in force", error)
            self._seen = self._stamp()
        return True

    def _stamp(self) -> tuple[object, ...]:
        try:
            status = (self._store.root / ACCESS_FILE).stat()
            file: tuple[object, ...] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            file = ()
        return (file, self._store.change_count())

    def _load(self) -> None:
        stamp = self._stamp()
        rules = read_rules(self._store.root)
        allowed: dict[bytes, frozenset[str]] = {}
        for model, rule in rules.items():
            if rule.only is not None:
                for digest in self._objects(model):
                    allowed[digest] = allowed.get(digest, frozenset()) | rule.only
        if allowed:
            for row in self._store.models():
                rule = rules.get(row.digest, Rule())
                if rule.only is None:
                    for digest in self._objects(row.digest):
                        allowed.pop(digest, None)
        self._rules, self._allowed, self._seen = rules, allowed, stamp

    def _objects(self, model: bytes) -> set[bytes]:
        """Return the digests of a model, its objects and their lists, as far as known."""
        manifest = self._store.manifest(model)
        if manifest is None:
            return {model}
        refs = manifest.objects
        lists = {ref.chunk_list for ref in refs if ref.chunk_list}
        return {model, *lists, *(ref.digest for ref in refs)}
