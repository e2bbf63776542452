"""fp8-bench startup: fp8-build with an empty and with a filled kernel cache, and an engine's start to its first token.

Each is a process of its own, as a user runs it: Python's start and imports are part of the time. The peak is what the
kernel says of that process (ru_maxrss), pages of mapped files included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8.builder import engine as engine_format
from fp8.builder.engine import EngineError
from fp8.scripts.benchmarks.arguments import engine_facts

WHAT = ("build, cold kernel cache", "build, warm kernel cache", "start to first token")


@dataclass(frozen=True)
class Ran:
    """Wall time and peak resident memory of a process."""

    seconds: float
    peak_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="as fp8-quantize writes it")
    parser.add_argument("--engine_dir", type=Path, help="keep the engine here (default: a temporary folder)")
    parser.add_argument("--device", default="auto", help="where the engine starts: auto (default), cpu, cuda or cuda:N")
    parser.add_argument("build_flags", nargs="*", help="flags for fp8-build, after --, such as -- --max_batch_size 64")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Three rows. Raises EngineError if a process fails."""
    with tempfile.TemporaryDirectory(prefix="fp8-startup-") as folder:
        work = Path(folder)
        engine = args.engine_dir or work / "engine"
        environment = {**os.environ, "FP8_CACHE_DIR": str(work / "cache")}
        build = ["build", "--checkpoint_dir", args.checkpoint_dir, "--output_dir", engine, "--log_level", "warning"]
        start = ["run", "--engine_dir", engine, "--device", args.device, "--input_tokens", "1,2,3"]
        commands = [[*build, *args.build_flags]] * 2 + [[*start, "--max_output_len", "1", "--output", "json"]]
        rows: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        for what, command in zip(WHAT, commands, strict=True):
            ran = _run(environment, *command)
            facts = facts or {"engine": engine_facts(engine_format.load(engine, verify_weights=False).plan, engine)}
            rows.append(_row(what, ran, (engine / "rank0.safetensors").stat().st_size))
            args.save(rows, facts)
    return rows, facts


def _row(what: str, ran: Ran, weights: int) -> dict[str, Any]:
    return {
        "what": what, "seconds": ran.seconds, "peak_gb": ran.peak_bytes / 1e9, "weights_gb": weights / 1e9,
        "peak_of_weights": ran.peak_bytes / weights,
    }  # fmt: skip


def _run(environment: Mapping[str, str], name: object, *arguments: object) -> Ran:
    line = [sys.executable, "-m", f"fp8.scripts.{name}", *map(str, arguments)]
    begin = time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise EngineError(f"{' '.join(line[1:])}: ended with status {process.returncode}")
    return Ran(seconds, usage.ru_maxrss * 1024)
