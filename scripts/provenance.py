"""What a measured figure belongs to: command, commit, device, driver, versions, date."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8.builder.engine import write_atomically


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", default="", help="to record in the output (default: git's)")


def provenance(program: str, argv: Sequence[str] | None, commit: str = "") -> dict[str, Any]:
    """Facts for the head of a results file; None for what cannot be found out. The command is recorded without where it
    worked, where its results went and of which commit they are."""
    import torch

    here = str(Path(__file__).resolve().parent)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join([program, *_telling(list(map(str, sys.argv[1:] if argv is None else argv)))]),
        "commit": commit or _output("git", "-C", here, "rev-parse", "HEAD"),
        "device": gpu or platform.processor() or platform.machine(),
        **card(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save_results(output: Path, program: str, argv: Sequence[str] | None, commit: str, facts: Mapping[str, Any]) -> None:
    """A results file of `facts` after their provenance. Raises OSError, and then leaves what was there."""
    found = {**provenance(program, argv, commit), **facts}
    write_atomically(output, [json.dumps(found, indent=1).encode()])


def _telling(arguments: list[str]) -> list[str]:
    places = [i for i, word in enumerate(arguments) if word in ("--output", "--commit", "--work_dir")]
    untold = {i + j for i in places for j in (0, 1)}
    return [word for i, word in enumerate(arguments) if i not in untold]


def card() -> dict[str, str | None]:
    """Facts of the first GPU that CUDA sees; clocks and power as they are right now."""
    fields = {
        "driver": "driver_version", "max_sm_clock": "clocks.max.sm", "sm_clock": "clocks.sm",
        "memory_clock": "clocks.mem", "power_limit": "power.limit", "power_draw": "power.draw",
        "temperature": "temperature.gpu",
    }  # fmt: skip
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    which = ["-i", seen] if seen else []
    line = _output("nvidia-smi", *which, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader")
    found = [text.strip() for text in line.split(",")] if line else []
    return dict(zip(fields, found, strict=True)) if len(found) == len(fields) else dict.fromkeys(fields)


def _output(*command: str) -> str | None:
    """First line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
