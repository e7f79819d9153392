"""The command line; `tensorswarm.__main__` is where it begins."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell's own commands."""
