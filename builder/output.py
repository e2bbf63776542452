"""Writing a checkpoint directory: it is made in `<output>.partial`, which becomes `<output>` by a rename at the end.

If the work is interrupted, only the calibration state stays there, and the same call continues from it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8.builder.calibrate import STATE, State
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.engine import unwritable
from fp8.builder.formats.base import Format
from fp8.builder.quantization_config import write_engine_section, write_quantization
from fp8.builder.workplace import alone, beside, clear, is_here, put, recover

COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


class OutputError(RuntimeError):
    """The output directory cannot be written."""


def check_replaceable(checkpoint: Checkpoint, output: Path, overwrite: bool) -> None:
    """Raises OutputError for a directory that is there, but for a checkpoint that may be replaced."""
    try:
        _check(checkpoint, output, overwrite)
    except OSError as error:  # a name that is too long, a directory that may not be listed
        raise OutputError(unwritable(output, error)) from error


def _check(checkpoint: Checkpoint, output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already; remove it, or pass --overwrite")
    if checkpoint.directory.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} is the model to be quantized, or holds it; give another output directory")
    if is_here(output):
        raise OutputError(f"{output} is the current directory, which would be replaced; give another output directory")
    if output.exists() and not (output / "config.json").is_file():
        raise OutputError(f"{output} is not a checkpoint, --overwrite does not replace it; remove it yourself")


@contextlib.contextmanager
def workplace(output: Path, resume: bool) -> Iterator[Path]:
    """`<output>.partial`, renamed to `output` on success. An interruption or a full disk leaves the calibration state
    in it, an error in the inputs nothing."""
    try:
        with alone(beside(output, "partial")) as partial:
            try:
                recover(output)
                _clear(partial, resume)
                yield partial
                for path in (partial / STATE, *partial.glob("hidden.*.bin")):
                    path.unlink(missing_ok=True)
                put(partial, output)
            except BaseException as error:  # of ValueErrors the inputs are the cause: what they gave is of no use
                with contextlib.suppress(OSError):
                    _clear(partial, keep=not isinstance(error, ValueError))
                    partial.rmdir()
                raise
    except OSError as error:
        raise OutputError(unwritable(output, error)) from error


def _clear(partial: Path, keep: bool) -> None:
    """Removes what is there, but for the calibration state if that is to be kept."""
    state = State.stored(partial) if keep else None
    clear(partial, state.files if state else ())


def write_config(
    checkpoint: Checkpoint, format: Format, dtype: str, linears: list[str], facts: dict[str, Any] | None, partial: Path,
    quantized_by: str | None = None,
) -> None:  # fmt: skip
    """config.json and the files beside the tensors. `facts`: of the calibration; `quantized_by`: the other tool."""
    config = {**checkpoint.config, "dtype": dtype, "torch_dtype": dtype}
    for key in ("quantization_config", "compression_config"):  # of another tool
        config.pop(key, None)
    quantization = write_quantization(format, linears)
    if quantization is not None:
        config["quantization_config"] = quantization
    config["fp8_engine"] = write_engine_section(format, importlib.metadata.version("fp8-engine"), facts)
    if quantized_by:
        config["fp8_engine"]["quantized_by"] = quantized_by
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_beside(checkpoint, partial)


def copy_beside(checkpoint: Checkpoint, directory: Path) -> None:
    """The tokenizer's files and what else goes along with a model unchanged, as far as they are there."""
    for name in COPIED:
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, directory / name)
