"""Hugging Face models as references: which directories transformers computes rightly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8.builder.checkpoint import CheckpointError, read_json
from fp8.builder.formats.base import FormatError
from fp8.builder.imports.base import quantization_of

if TYPE_CHECKING:
    import torch


class HuggingFaceError(ValueError):
    """A model directory that is no reference: says why."""


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """The model in this directory as transformers has it, on the CPU. Raises HuggingFaceError."""
    import transformers

    if wrong := _misread(directory):
        raise HuggingFaceError(wrong)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()
    except Exception as error:  # of a damaged file, of another architecture, of sizes that contradict config.json
        why = str(error).strip().partition("\n")[0]
        raise HuggingFaceError(f"{directory} cannot be read by transformers: {why}") from error


def _misread(directory: Path) -> str | None:
    """Why transformers is no reference for the model in this directory (which has a config.json), None if it is one.

    Of quantized models it computes those of compressed-tensors in any type and on any device. Others fail in the middle
    of a load or of a product, or lose their scales.
    """
    try:
        quantization = quantization_of(directory, read_json(directory / "config.json"))
    except (CheckpointError, FormatError) as error:
        return str(error)
    method = quantization and quantization.get("quant_method")
    if quantization is None or method == "compressed-tensors":
        return None
    return (
        f"{directory} is quantized ({method or 'quantization_config without a quant_method'}), which transformers does "
        f"not compute in every type and on every device; give the original model, or what fp8-quantize --model_dir "
        f"{directory} makes of it"
    )
