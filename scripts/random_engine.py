"""Builds an engine of a given shape without its matrices, which fp8-bench fills with random values on the device.

    python -m fp8.scripts.random_engine --model llama-2-70b --kv_cache_dtype fp8 --tp_size 2 --output_dir engine
    mpirun -n 2 fp8-bench latency --engine_dir engine --batch_size 1

For speed benchmarks of shapes whose weights take minutes to write and read: the kernels, the plan and the memory are
those of `fp8-build` on `python -m fp8.scripts.random_checkpoint`. No other command opens such an engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fp8.builder import build
from fp8.builder.checkpoint import DTYPES, Checkpoint, CheckpointError, Entry
from fp8.builder.formats.base import Format
from fp8.builder.formats.base import load as load_format
from fp8.builder.parallel import ranks
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.shards import Planned
from fp8.builder.target import TARGETS
from fp8.builder.workplace import check_output
from fp8.models.config import load as load_model
from fp8.scripts import build as command
from fp8.scripts.random_checkpoint import (
    ACTIVATION_AMAX,
    PRESETS,
    SIGMAS,
    WEIGHT_STD,
    add_shape_arguments,
    checkpoint_config,
    random_groups,
    shape_config,
)  # fmt: skip


class Unwritten(Entry):
    """A tensor of no file: scales as random_checkpoint writes them, ones for norms, no matrices."""

    def array(self) -> np.ndarray:
        if self.name.endswith(".weight_scale"):
            return np.full(self.shape, WEIGHT_STD * SIGMAS / 448, self.dtype)
        if self.name.endswith("_scale"):
            return np.full(self.shape, ACTIVATION_AMAX / 448, self.dtype)
        if self.name.endswith("norm.weight"):
            return np.ones(self.shape, self.dtype)
        assert not self.name.endswith(".weight"), f"{self.name} is not to be read"
        return np.zeros(self.shape, self.dtype)


class Imagined(Checkpoint):
    """The random checkpoint of a shape, without a file."""

    def __init__(self, config: dict[str, Any], format: Format) -> None:
        groups, linears = random_groups(config, format, 0)
        self.directory = Path("imagined")
        self.config = checkpoint_config(config, format, linears)
        self._planned = {t.name: t for group in groups for t in group.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._planned

    def __iter__(self) -> Iterator[str]:
        return iter(self._planned)

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        planned = self._planned.get(name)
        if planned is None or (shape is not None and planned.shape != shape):
            raise CheckpointError(f"{name} {shape} is no tensor of this shape")
        return Unwritten(name, self.directory, 0, planned.nbytes, _dtype(planned), planned.shape)


def _dtype(planned: Planned) -> np.dtype:
    names = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    return DTYPES[names[str(planned.dtype).removeprefix("torch.")]]


def imagine(config: dict[str, Any], format: Format) -> Source:
    checkpoint = Imagined(config, format)
    return Source(load_model(checkpoint.config), checkpoint)


def write_random_engine(
    output: Path, config: dict[str, Any], format: Format, request: Request, reporter: Reporter, workers: int = 1
) -> None:
    """Builds every rank. Raises one of fp8-build's errors."""
    check_output(output)
    request = dataclasses.replace(request, hollow=True)
    if len(request.places) == 1:
        source = imagine(config, format)
        build.write(build.compile(source, request, reporter), source, output, reporter)
    else:
        again = functools.partial(imagine, config, format)
        ranks.build_ranks(again, request, output, reporter, workers, command.ERRORS)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m fp8.scripts.random_engine", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_shape_arguments(p)
    p.add_argument("--max_batch_size", type=int, default=64)
    p.add_argument("--max_seq_len", type=int)
    p.add_argument("--max_num_tokens", type=int, default=8192)
    p.add_argument("--tp_size", type=int, default=1)
    p.add_argument("--pp_size", type=int, default=1)
    p.add_argument("--workers", type=int, default=1, help="ranks that are built side by side")
    p.add_argument("--target", default="sm_90a", choices=TARGETS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        limits = args.max_batch_size, args.max_seq_len, args.max_num_tokens, args.target
        request = Request(*limits, tp_size=args.tp_size, pp_size=args.pp_size)
        format = load_format(args.qformat)(kv_cache_dtype=args.kv_cache_dtype)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)

            write_random_engine(args.output_dir, shape_config(args), format, request, Reporter(show), args.workers)
    except (*command.ERRORS, OSError) as error:
        print(f"random_engine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("random_engine: interrupted; nothing was written", file=sys.stderr)
        return 130
    shape = args.model if args.model in PRESETS else Path(args.model).name
    print(f"{args.output_dir}: {shape}, {args.qformat}, kv_cache_dtype {args.kv_cache_dtype}, no matrices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
