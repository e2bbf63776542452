"""What another tool quantized -> a checkpoint of the same codes and scales, as fp8-quantize lays it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fp8.builder.calibrate import NonFiniteError
from fp8.builder.checkpoint import Checkpoint, CheckpointError
from fp8.builder.e4m3 import scale_of
from fp8.builder.formats.base import Format, FormatError
from fp8.builder.graph import Graph
from fp8.builder.imported import Imported
from fp8.builder.imports.base import ORIGINAL, Scheme
from fp8.builder.interpret import to_torch
from fp8.builder.output import check_replaceable, workplace, write_config
from fp8.builder.quantize import Calibration, Model, Reporter, Running, check_all_read, observe, unquantized
from fp8.builder.query_scale import query_scale
from fp8.builder.shards import Group, Planned, write_shards
from fp8.plugins.base import SCALE_BLOCK

ATTENTION = (".q_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, to be held against what the checkpoint is; None: whatever that is."""

    qformat: str | None = None
    kv_cache_dtype: str | None = None
    dtype: str = "bfloat16"  # of everything unquantized
    calibration: Calibration = Calibration(None)  # noqa: RUF009 (frozen): of the KV cache, where that has no scales
    device: str = "cpu"  # that calibrates
    resume: bool = True
    overwrite: bool = False


def convert(
    model: Model, checkpoint: Checkpoint, scheme: Scheme, wanted: Wanted, output: Path, report: Reporter
) -> Format:
    """Writes the checkpoint, and returns its format. No value is rounded but those that were not quantized, to `dtype`.

    Raises CheckpointError, FormatError, CalibrationError, OutputError, and what the model's `read_config` raises.
    """
    output = output.absolute()
    check_replaceable(checkpoint, output, wanted.overwrite)
    _check_wanted(checkpoint, scheme, wanted)
    imported = Imported(checkpoint, scheme)
    running = Running(model, model.read_config(checkpoint.config), imported, imported.format("auto"), wanted.dtype)
    graph = model.emit(running.config, imported, running.format, wanted.dtype)  # asks for every weight and scale
    format = imported.format(_kv_cache(imported, graph, wanted))
    missing = _attention_scales(imported, graph, format, wanted)
    check_all_read(imported, graph)
    _remark(imported, graph, missing, report)
    facts = None
    with workplace(output, wanted.resume) as partial:
        if missing:
            facts = _calibrate(running, imported, format, missing, wanted, partial, report)
        groups = [*_weights(imported, graph, wanted.dtype), *_scales(imported)]
        write_shards(partial, groups, lambda done, total: report.progress("writing", done, total))
        write_config(checkpoint, format, wanted.dtype, graph.linears, facts, partial, scheme.tool)
    return format


def _check_wanted(checkpoint: Checkpoint, scheme: Scheme, wanted: Wanted) -> None:
    if "fp8_engine" in checkpoint.config:
        raise FormatError(
            f"{checkpoint.directory} is quantized already, by fp8-quantize; give it to fp8-build, or the original model"
        )
    if wanted.qformat not in (None, scheme.format):
        raise FormatError(
            f"{checkpoint.directory} was quantized by {scheme.tool}, which here is qformat {scheme.format}, not "
            f"{wanted.qformat}; leave --qformat out, or {ORIGINAL}"
        )
    if scheme.departure and wanted.qformat is None:
        raise FormatError(
            f"{checkpoint.directory} was quantized by {scheme.tool}: {scheme.departure}. --qformat {scheme.format} "
            f"takes the weights as they are and the activations so; or {ORIGINAL}"
        )


def _kv_cache(imported: Imported, graph: Graph, wanted: Wanted) -> str:
    """auto or fp8: as asked, else whether the configuration says so or scales of K and V are there."""
    if wanted.kv_cache_dtype is not None:
        return wanted.kv_cache_dtype
    return "fp8" if _has_kv_scales(imported, graph) else "auto"


def _has_kv_scales(imported: Imported, graph: Graph) -> bool:
    """Whether there are any, or should be."""
    named = any(imported.source(n) for n in graph.activations if n.endswith(ATTENTION[1:]))
    return named or imported.scheme.fp8_kv_cache


def _attention_scales(imported: Imported, graph: Graph, format: Format, wanted: Wanted) -> list[str]:
    """Asks for the scales of Q, K and V, as far as the KV cache is FP8 and they are stored; a scale of Q alone follows
    from the weights. Returns the names of those that a calibration is to give. Raises FormatError if it has no text."""
    names = [n for n in graph.activations if n.endswith(ATTENTION)]
    if not format.fp8_kv_cache:
        for name in names:
            imported.leave(name)
        return []
    has = _has_kv_scales(imported, graph)
    missing = [n for n in names if imported.source(n) is None and (n.endswith(ATTENTION[0]) or not has)]
    for name in names:
        if name not in missing:
            imported.scale(name)
    if wanted.calibration.dataset is not None:
        return missing
    if not has:
        raise FormatError(
            f"{imported.directory} has no scales of K and V, which --kv_cache_dtype fp8 needs; give --calib_dataset to "
            "calibrate them, or leave the flag out"
        )
    for name in missing:
        scale = query_scale(graph, name.removesuffix(ATTENTION[0]), lambda module: dequantized(imported, module))
        imported.found[name] = np.array([scale], np.float32)
    return []


def _calibrate(
    running: Running, imported: Imported, format: Format, missing: list[str], wanted: Wanted, partial: Path,
    report: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Puts the missing scales into `imported.found`; returns what is told of the calibration."""
    observed = frozenset(missing).__contains__
    try:
        amax, facts = observe(running, format, observed, wanted.calibration, partial, wanted.device, report)
    except NonFiniteError:
        for module in sorted(imported.quantized):  # a damaged weight is the better explanation
            codes(imported, f"{module}.weight")
        raise
    for name in missing:
        imported.found[name] = scale_of(torch.tensor([amax[name]])).numpy()
    return facts


def dequantized(imported: Imported, module: str) -> torch.Tensor:
    """A linear's weight [N, K] in float32."""
    weight = to_torch(imported.entry(f"{module}.weight").array()).float()
    scale = imported.found.get(f"{module}.weight_scale")
    if scale is None:
        return weight
    spread = torch.from_numpy(scale.copy())
    if imported.scheme.format == "fp8_block":
        spread = spread.repeat_interleave(SCALE_BLOCK, 0)[: weight.shape[0]].repeat_interleave(SCALE_BLOCK, 1)
    return weight * spread


def _remark(imported: Imported, graph: Graph, missing: list[str], report: Reporter) -> None:
    """Says what is kept, what is made, and where one activation has scales that differ."""
    scheme, found = imported.scheme, imported.found
    plain = [m for m in graph.linears if m not in imported.quantized]
    left = f", {len(plain)} left as they are ({plain[0]}{', ...' if len(plain) > 1 else ''})" if plain else ""
    made = [n for n in found if n.endswith(ATTENTION[0]) and imported.source(n) is None]
    kinds = ", ".join(kind[1:] for kind in ATTENTION if any(name.endswith(kind) for name in missing))
    rest = (
        f"{kinds} of every layer's attention are calibrated" if missing
        else "nothing is calibrated; scales of Q, which FP8 attention needs beside those of K and V, are made from the "
        "weights, so that no query saturates" if made
        else "nothing is calibrated"
    )  # fmt: skip
    report.remark(
        f"{imported.directory} was quantized by {scheme.tool}: {len(graph.linears) - len(plain)} linears keep their "
        f"codes and scales{left}; {rest}"
    )
    readers: dict[str, set[float]] = {}
    for name, activation in graph.activations.items():
        if name.endswith(".input_scale") and name in found:
            readers.setdefault(activation, set()).add(found[name].item())
    if differ := [activation for activation, scales in readers.items() if len(scales) > 1]:
        report.remark(
            f"{len(differ)} activations ({differ[0]}{', ...' if len(differ) > 1 else ''}) have a scale per linear that "
            "reads them, and these differ: fp8-build takes the largest of each, which saturates none"
        )


def _weights(imported: Imported, graph: Graph, dtype: str) -> Iterator[Group]:
    for name in graph.axes:
        if name.removesuffix(".weight") in imported.quantized:
            planned = Planned(name, torch.float8_e4m3fn, imported.entry(name).shape)
            yield Group((planned,), lambda name=name: {name: codes(imported, name)})  # type: ignore[misc]
        else:
            yield unquantized(imported, name, dtype)


def codes(imported: Imported, name: str) -> torch.Tensor:
    """The codes of an e4m3 weight. Raises CheckpointError for a NaN."""
    entry = imported.entry(name)
    weight = to_torch(entry.array())
    if ((weight.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{name} contains NaN ({entry.file}); the checkpoint is damaged, fetch it again")
    return weight


def _scales(imported: Imported) -> Iterator[Group]:
    for name, values in imported.found.items():
        planned = Planned(name, torch.float32, values.shape)
        yield Group((planned,), lambda name=name, values=values: {name: torch.from_numpy(values.copy())})  # type: ignore[misc]
