"""--help that teaches: every flag's default after its help, examples as they are written."""

from __future__ import annotations

import argparse
from typing import Any


class Teaching(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or not action.option_strings or "default" in action.help or _is_plain(action.default):
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else str(action.default)
        return f"{action.help} (default: {shown.replace('%', '%%')})"


def _is_plain(default: Any) -> bool:
    """One that a flag's help goes without: it is off, or absent."""
    return default in (None, argparse.SUPPRESS) or isinstance(default, bool) or default in ([], (), "")
