"""The whole way on the bundled example, by the command lines that a user types, and one table of what came out.

bash scripts/quickstart.sh
python -m fp8.scripts.quickstart --model_dir HF_DIR --calib_dataset TEXT --data TEXT --work_dir DIR   # your own model
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPTS = ["def main():\n    parser =", "class Stack:\n    ", "import os\nimport ", "    def read(self", "try:\n    "]
CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a choice of fp8-quantize's flags."""

    name: str
    qformat: str
    kv_cache_dtype: str = "auto"


VARIANTS = [
    Variant("BF16", "bf16"),
    Variant("FP8", "fp8"),
    Variant("FP8 rowwise", "fp8_rowwise"),
    Variant("FP8 + FP8 KV", "fp8", "fp8"),
]


@dataclass(frozen=True)
class Measured:
    variant: Variant
    perplexity: float
    tokens: int  # that the perplexity is over
    checkpoint_bytes: int
    engine_bytes: int
    tokens_per_second: float
    text: str


class StepFailed(Exception):
    """A command line ended with a status other than 0; its own message is on stderr already."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    work = args.work_dir or Path(tempfile.mkdtemp(prefix="fp8-quickstart-"))
    begin = time.monotonic()
    try:
        rows = [measure(variant, args, work / variant.name.replace(" ", "")) for variant in VARIANTS]
    except StepFailed as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    finally:
        if args.work_dir is None:
            shutil.rmtree(work, ignore_errors=True)
    report(rows, args, time.monotonic() - begin)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("quickstart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=EXAMPLES / "tiny-python-llama")
    parser.add_argument("--calib_dataset", type=Path, default=EXAMPLES / "calibration.txt")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "heldout.txt", help="text to measure perplexity on")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--max_tokens", type=int, help="of --data; default: all on a GPU, 16384 on a CPU")
    parser.add_argument("--work_dir", type=Path, help="keep checkpoints, engines and results here")
    args = parser.parse_args(argv)
    args.gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    args.max_tokens = args.max_tokens or (None if args.gpu else 16384)
    return args


def measure(variant: Variant, args: argparse.Namespace, work: Path) -> Measured:
    """Quantize, build, evaluate, run."""
    checkpoint, engine, result = work / "checkpoint", work / "engine", work / "result.json"
    device = "cuda" if args.gpu else "cpu"
    command(
        variant, "quantize", "--model_dir", args.model_dir, "--qformat", variant.qformat,
        "--kv_cache_dtype", variant.kv_cache_dtype, "--calib_dataset", args.calib_dataset, "--calib_size", 64,
        "--output_dir", checkpoint, "--overwrite",
    )  # fmt: skip
    command(
        variant, "build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--target",
        "sm_90a" if args.gpu else "cpu", "--max_batch_size", 8, "--max_seq_len", args.max_seq_len,
        "--max_num_tokens", 2048, "--log_level", "warning",
    )  # fmt: skip
    part = ["--max_tokens", args.max_tokens] if args.max_tokens else []
    command(
        variant, "evaluate", "--engine_dir", engine, "--data", args.data, "--output", result, "--device", device, *part
    )
    printed = command(
        variant, "run", "--engine_dir", engine, "--max_output_len", 64, "--ignore_eos", "--device", device,
        "--output", "json", "--input_text", *PROMPTS,
    )  # fmt: skip
    run = json.loads(printed)
    found = json.loads(result.read_text())
    return Measured(
        variant,
        found["perplexity"],
        found["tokens"],
        size(checkpoint),
        size(engine),
        run["tokens_per_second"],
        run["completions"][0]["prompt"] + run["completions"][0]["text"],
    )


def command(variant: Variant, name: str, *arguments: object) -> str:
    """Runs one command line in a process of its own, as a user would; returns what it printed."""
    CONSOLE.print(f"[bold]{variant.name}[/bold]: fp8-{'eval' if name == 'evaluate' else name}")
    line = [sys.executable, "-m", f"fp8.scripts.{name}", *map(str, arguments)]
    # One thread: the example's tensors are small, and OpenMP's waiting threads are ruinous on a machine that is busy.
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise StepFailed(f"{' '.join(line[1:])}: ended with status {done.returncode}")
    return done.stdout


def size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.suffix in (".safetensors", ".engine"))


def report(rows: list[Measured], args: argparse.Namespace, seconds: float) -> None:
    where = torch.cuda.get_device_name() if args.gpu else "CPU, by reference execution: right, not fast"
    caption = f"perplexity of {rows[0].tokens} tokens of {args.data.name}"
    table = Table(title=f"{args.model_dir.name} on {where}", caption=caption)
    for column in ("format", "perplexity", "vs BF16", "checkpoint", "engine", "tokens/s"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for row in rows:
        table.add_row(
            row.variant.name,
            f"{row.perplexity:.3f}",
            f"{row.perplexity / rows[0].perplexity - 1:+.2%}",
            f"{row.checkpoint_bytes / 1e6:.2f} MB",
            f"{row.engine_bytes / 1e6:.2f} MB",
            f"{row.tokens_per_second:.0f}",
        )
    console = Console(width=max(Console().width, 100))
    console.print(table)
    for row in rows:
        console.rule(f"text from {row.variant.name}", align="left")
        console.print(row.text, markup=False, highlight=False)
    console.rule()
    console.print(f"{seconds:.0f} s in all; tokens/s: {len(PROMPTS)} prompts at once, 64 tokens each")


if __name__ == "__main__":
    sys.exit(main())
