"""Where the command begins: ``python -m tensorswarm``, and the console script."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell's own commands."""


def run() -> int:
    """Run one command; return its exit code.

    The imports take a third of a second, in which Ctrl-C is to be no traceback either.
    """
    try:
        from .cli.main import main

        return main()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
