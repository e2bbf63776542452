"""The commands that pyproject.toml names: each is the `main` of the module of its name, which is imported here."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path


def __getattr__(name: str) -> Callable[..., int]:
    if name.startswith("_"):
        raise AttributeError(name)
    return functools.partial(_run, name)


def _run(name: str, *arguments: list[str]) -> int:
    """The exit status. Ctrl-C in the seconds that imports take is no more of an error than it is later."""
    try:
        return int(importlib.import_module(f"fp8.scripts.{name}").main(*arguments))
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 130
