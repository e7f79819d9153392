"""Where the command begins: ``python -m tensorswarm``, and the console script."""

from __future__ import annotations

import sys

from .cli import INTERRUPTED


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
