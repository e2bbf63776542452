"""fp8-quantize: Hugging Face directory -> quantized checkpoint.

A model that another tool has quantized to FP8 (AutoFP8, llm-compressor, ModelOpt, TensorRT-LLM, transformers) is
recognized: its codes and scales are kept as they are; only scales of an FP8 KV cache that it lacks are calibrated.
docs/checkpoint.md says what is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fp8.builder.calibration_text import CalibrationError
from fp8.builder.checkpoint import Checkpoint, CheckpointError
from fp8.builder.convert import Wanted, convert
from fp8.builder.formats.base import Format, FormatError, load, names
from fp8.builder.imports.base import Scheme, read_scheme
from fp8.builder.output import OutputError
from fp8.builder.quantization_config import read_dtype
from fp8.builder.quantize import Calibration, Reporter, quantize_checkpoint
from fp8.builder.unified import UnifiedCheckpoint, open_checkpoint
from fp8.models import config as models
from fp8.models.config import ConfigError
from fp8.scripts.argument_types import positive
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.progress import stages
from fp8.scripts.teaching import Teaching

EXAMPLES = """\
examples:
  fp8-quantize --model_dir HF_DIR --qformat fp8_rowwise --output_dir ckpt
  fp8-quantize --model_dir HF_DIR --qformat fp8 --kv_cache_dtype fp8 --calib_dataset text.txt --output_dir ckpt
  fp8-quantize --model_dir HF_DIR --calib_dataset text.txt --exclude_modules '*.down_proj' --output_dir ckpt
  fp8-quantize --model_dir FP8_DIR --output_dir ckpt               what another tool quantized, code for code
  fp8-quantize --model_dir FP8_DIR --kv_cache_dtype fp8 --calib_dataset text.txt --output_dir ckpt

Then: fp8-build --checkpoint_dir ckpt --output_dir engine
"""
ERRORS = (CheckpointError, ConfigError, FormatError, CalibrationError, OutputError)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        "fp8-quantize",
        description=__doc__,
        epilog=f"formats:\n{format_texts()}\n\n{EXAMPLES}",
        formatter_class=Teaching,
    )
    parser.add_argument("--model_dir", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the quantized checkpoint goes")
    parser.add_argument(
        "--qformat", help=f"one of {', '.join(names())} (default: fp8; of a model that is quantized, what it is)"
    )
    parser.add_argument(
        "--kv_cache_dtype", help="auto: the model's type; fp8: E4M3, calibrated (default: auto; of a model that is "
        "quantized, what it has scales for)",
    )  # fmt: skip
    parser.add_argument("--exclude_modules", nargs="+", default=[], metavar="GLOB", help="linears to leave unquantized")
    parser.add_argument(
        "--activation_scale_ub", help="fp8_rowwise: bound of a token's largest magnitude, or none (default: 1200)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="what is not quantized: bfloat16, float16, or auto: the checkpoint's"
    )
    parser.add_argument("--calib_dataset", type=Path, help=".txt, .jsonl or .parquet with a `text` column")
    parser.add_argument("--calib_size", type=positive, default=512, help="samples")
    parser.add_argument("--calib_max_seq_length", type=positive, default=512, help="tokens per sample")
    parser.add_argument("--seed", type=int, default=0, help="choice of samples")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="that calibrates")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output directory")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="continue an interrupted calibration of the same inputs (kept in OUTPUT_DIR.partial)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def format_texts() -> str:
    """What each module of `builder/formats` says of itself first."""
    texts = ((sys.modules[load(name).__module__].__doc__ or name).split("\n\n")[0] for name in names())
    return "\n".join(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    ") for text in texts)


def make_format(options: argparse.Namespace) -> Format:
    kind = load("fp8" if options.qformat is None else options.qformat)
    own = {}
    if options.activation_scale_ub is not None:
        if "activation_scale_ub" not in kind.option_names():
            raise FormatError(f"--activation_scale_ub does not apply to qformat {kind.name}")
        own["activation_scale_ub"] = _bound(options.activation_scale_ub)
    return kind(
        "auto" if options.kv_cache_dtype is None else options.kv_cache_dtype, tuple(options.exclude_modules), **own
    )


def _bound(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError as error:
        raise FormatError(f"--activation_scale_ub {text} is neither a number nor none") from error


def choose_dtype(requested: str, format: Format, checkpoint: Checkpoint) -> str:
    """The dtype of everything unquantized. With auto, float32 checkpoints become bfloat16."""
    if requested not in ("auto", "bfloat16", "float16"):
        raise FormatError(f"--dtype {requested} is not one of auto, bfloat16, float16")
    if format.dtype and requested not in ("auto", format.dtype):
        raise FormatError(f"--dtype {requested} contradicts qformat {format.name}")
    stored = read_dtype(checkpoint.config)
    if requested != "auto":
        return requested
    return format.dtype or ("float16" if stored == "float16" else "bfloat16")


def make_wanted(options: argparse.Namespace, scheme: Scheme, checkpoint: Checkpoint) -> Wanted:
    """What is asked of a model that is quantized. Raises FormatError for flags that would have to quantize it again."""
    for flag in ("exclude_modules", "activation_scale_ub"):
        if getattr(options, flag):
            raise FormatError(
                f"--{flag} does not apply to {options.model_dir}, which {scheme.tool} has quantized; leave it out, or "
                "give the original model"
            )
    dtype = choose_dtype(options.dtype, load(scheme.format)(), checkpoint)
    return Wanted(
        options.qformat, options.kv_cache_dtype, dtype, make_calibration(options), choose_device(options.device),
        options.resume, options.overwrite,
    )  # fmt: skip


def make_calibration(options: argparse.Namespace) -> Calibration:
    return Calibration(options.calib_dataset, options.calib_size, options.calib_max_seq_length, options.seed)


def choose_device(requested: str) -> str:
    if requested == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu"


def run(options: argparse.Namespace, console: Console) -> None:
    """Quantizes as asked, with a progress bar. Raises one of ERRORS."""
    format = make_format(options)  # bad flags are refused before anything is read
    checkpoint = open_checkpoint(options.model_dir)
    model = models.load(checkpoint.config)
    scheme = read_scheme(checkpoint)
    if scheme is not None and isinstance(checkpoint, UnifiedCheckpoint):
        scheme = dataclasses.replace(scheme, tool="TensorRT-LLM")
    with stages(console) as (show, above):
        report = Reporter(show, functools.partial(above.print, markup=False, soft_wrap=True))
        if scheme is not None:
            wanted = make_wanted(options, scheme, checkpoint)
            dtype = wanted.dtype
            format = convert(model, checkpoint, scheme, wanted, options.output_dir, report)
        else:
            dtype = choose_dtype(options.dtype, format, checkpoint)
            quantize_checkpoint(
                model, checkpoint, format, dtype, make_calibration(options), options.output_dir,
                choose_device(options.device), options.resume, options.overwrite, report,
            )  # fmt: skip
    if isinstance(checkpoint, UnifiedCheckpoint):
        told = f"{options.model_dir} has no tokenizer and no end-of-sequence ids: copy the model's tokenizer files and "
        console.print(f"{told}generation_config.json to {options.output_dir}", markup=False, soft_wrap=True)
    told = f"{options.output_dir}: {format.name}, KV cache {format.kv_cache_dtype}, {dtype}"
    console.print(told, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run(options, Console(stderr=True))
    except ERRORS as error:
        print(f"fp8-quantize: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-quantize: interrupted; the same command continues after the last finished layer", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
