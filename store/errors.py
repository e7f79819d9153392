"""Every error that tensorswarm raises on purpose, under one root.

Two families: ``LocalError`` is about what the caller asked for or what this
machine can do; ``RemoteError`` is about what a peer or an origin did. Errors of
other libraries are translated into one of these where they enter the project.

``exit_code`` is the command line's exit status for the error, as the contract
in ``docs/design.md`` has it.
"""

from __future__ import annotations


class TensorswarmError(Exception):
    """Root of all errors raised by tensorswarm."""

    exit_code = 1


class LocalError(TensorswarmError):
    """The request, the input or this machine is at fault."""

    exit_code = 2


class RemoteError(TensorswarmError):
    """A peer or an origin is at fault."""

    exit_code = 4


class BadInput(LocalError):
    """An argument, a file or a manifest breaks its rules (exit 2)."""

    exit_code = 2


class NotFound(LocalError):
    """Nobody who could be asked has it (exit 3)."""

    exit_code = 3


class NoRoom(LocalError):
    """The disk is full, or would be (exit 6)."""

    exit_code = 6


class StoreDamaged(LocalError):
    """The store's own files contradict its index, and could not be mended."""

    exit_code = 1


class NoSource(RemoteError):
    """No source could be reached in time (exit 4)."""

    exit_code = 4


class HashMismatch(RemoteError):
    """Bytes did not match their digest and no good source was left (exit 5)."""

    exit_code = 5


class Refused(RemoteError):
    """A peer or an origin refused us access (exit 7)."""

    exit_code = 7


class ProtocolError(RemoteError):
    """A peer or an origin broke the protocol; it is dropped."""
