"""Types of command line arguments: a value out of its range is refused by argparse, with the flag's name."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number of seconds above 0")
    return value


def new_file(text: str) -> Path:
    """Where a result is to be written: known to be possible before it is computed."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        why = "is a directory" if path.is_dir() else f"cannot be written: there is no directory {path.parent}"
        raise argparse.ArgumentTypeError(f"{path} {why}")
    return path


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is not a port, 0 to 65535")
    return value
