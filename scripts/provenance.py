"""What a measured figure belongs to: command, commit, device, driver, versions, date."""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", default="", help="recorded in the output; asked of git by default")


def provenance(program: str, argv: Sequence[str] | None, commit: str = "") -> dict[str, Any]:
    """Facts for the head of a results file; None for what cannot be found out."""
    import torch

    here = str(Path(__file__).resolve().parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join([program, *map(str, sys.argv[1:] if argv is None else argv)]),
        "commit": commit or _output("git", "-C", here, "rev-parse", "HEAD"),
        "device": gpu or platform.processor() or platform.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "max_sm_clock": _output("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader"),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str | None:
    """First line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
