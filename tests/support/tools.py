"""Tools a test cannot do without: found, or the test is skipped - or, in CI, fails.

On a developer's machine a missing tool skips the test and says which tool. With
``CI=true`` in the environment it fails the test instead, so that a run that is green
there has left nothing out for want of a tool.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest

SERVER_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where servers such as nginx lie; these are not on an ordinary user's PATH."""


def running_in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def lacking(reason: str) -> NoReturn:
    """Skip the running test for `reason`; in CI, fail it."""
    if running_in_ci():
        pytest.fail(f"{reason} (CI=true, where this may not be skipped)", pytrace=False)
    pytest.skip(reason)


def require_tool(name: str) -> str:
    """Return the path of a program, or leave the test through `lacking`."""
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":" + SERVER_FOLDERS)
    if found is None:
        lacking(f"needs the program {name!r}")
    return found


def require_module(name: str) -> None:
    """Return when module `name` can be imported; otherwise leave through `lacking`."""
    if importlib.util.find_spec(name) is None:
        lacking(f"needs the Python module {name!r}")
