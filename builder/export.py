"""--export_onnx: the emitted graph as a standard ONNX file whose weights stay in the checkpoint's safetensors.

ONNX wants the location of external data relative to the model file, inside its directory, and no symbolic link. So the
checkpoint's files must lie in the model file's directory or below it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs

from fp8.builder.engine import write_atomically

if TYPE_CHECKING:
    from fp8.builder.request import Source


class ExportError(ValueError):
    """A file that cannot be an ONNX model over this checkpoint: says where it can lie."""


def export(source: Source, path: Path, dtype: str, max_positions: int) -> None:
    """Writes the model, checked by onnx.checker. Raises ExportError."""
    folder = path.resolve().parent
    if not source.checkpoint.directory.resolve().is_relative_to(folder):
        raise ExportError(
            f"{path} must lie in the checkpoint's directory or above it, since ONNX finds external data only below the "
            f"model's own directory; for example --export_onnx {source.checkpoint.directory / path.name}"
        )
    graph = source.model.emit(source.config, source.checkpoint, source.format, dtype, max_positions=max_positions)
    model = gs.export_onnx(graph)
    for proto in model.graph.initializer:
        for entry in proto.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(entry.value, folder)
    try:
        write_atomically(path, [model.SerializeToString()])
        onnx.checker.check_model(str(path))
    except (OSError, onnx.checker.ValidationError) as error:
        path.unlink(missing_ok=True)
        raise ExportError(f"{path} cannot be written: {error}") from error
