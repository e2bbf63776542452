"""Quantizing a checkpoint: Hugging Face directory -> calibrated, quantized checkpoint directory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fp8.builder.calibrate import NonFiniteError, State, calibrate
from fp8.builder.calibration_text import CalibrationError, load_encoder, read_samples
from fp8.builder.checkpoint import Checkpoint, CheckpointError
from fp8.builder.e4m3 import scale_of
from fp8.builder.formats.base import Format, FormatError
from fp8.builder.formats.bf16 import Bf16
from fp8.builder.graph import Graph
from fp8.builder.interpret import to_torch
from fp8.builder.output import check_replaceable, workplace, write_config
from fp8.builder.shards import Group, Planned, write_shards

UNREAD = ("rotary_emb.inv_freq",)  # buffers that old checkpoints store; they follow from config.json


class Model(Protocol):
    """A module of `fp8.models`."""

    def read_config(self, config: dict[str, Any]) -> Any: ...

    def emit(
        self, config: Any, checkpoint: Checkpoint, format: Format, dtype: str, layers: range | None = None,
        max_positions: int | None = None,
    ) -> Graph: ...  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much of it."""

    dataset: Path | None
    size: int = 512
    max_seq_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Running:
    """A model as calibration runs it: unquantized, or as another tool has quantized it."""

    model: Model
    config: Any
    checkpoint: Checkpoint
    format: Format
    dtype: str

    def emit(self, layers: range, positions: int) -> Graph:
        return self.model.emit(
            self.config, self.checkpoint, self.format, self.dtype, layers=layers, max_positions=positions
        )


@dataclass(frozen=True)
class Reporter:
    """Where progress goes: (stage, done, total), and remarks."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    remark: Callable[[str], None] = lambda text: None


def quantize_checkpoint(
    model: Model, checkpoint: Checkpoint, format: Format, dtype: str, calibration: Calibration, output: Path,
    device: str = "cpu", resume: bool = True, overwrite: bool = False, report: Reporter = Reporter(),
) -> None:  # fmt: skip
    """Writes the quantized checkpoint.

    Raises CheckpointError, FormatError, CalibrationError, OutputError, and what the model's `read_config` raises.
    """
    output = output.absolute()
    check_replaceable(checkpoint, output, overwrite)
    config = model.read_config(checkpoint.config)
    whole = model.emit(config, checkpoint, Bf16(), dtype)  # finds missing and misshapen tensors before any work
    check_all_read(checkpoint, whole)
    linears = whole.linears
    _check_patterns(format, linears)
    for module in filter(format.quantizes, linears):
        format.check(module, *checkpoint.entry(f"{module}.weight").shape)
    needed = [name for name in whole.activations if format.calibrated(name)]
    with workplace(output, resume) as partial:
        amax: dict[str, float] = {}
        facts: dict[str, Any] | None = None
        if needed:
            try:
                running = Running(model, config, checkpoint, Bf16(), dtype)
                amax, facts = observe(running, format, format.calibrated, calibration, partial, device, report)
            except NonFiniteError:
                for name in whole.axes:  # a damaged weight is the better explanation
                    _finite(checkpoint, name, getattr(torch, dtype), device)
                raise
        groups = [*_weights(checkpoint, whole, set(linears), format, dtype, device), *_scales(amax)]
        write_shards(partial, groups, lambda done, total: report.progress("writing", done, total))
        write_config(checkpoint, format, dtype, linears, facts, partial)


def check_all_read(checkpoint: Checkpoint, graph: Graph, kinds: tuple[str, ...] = ("",)) -> None:
    """Raises CheckpointError if tensors whose names end in one of `kinds` are none of the whole model's graph."""
    extra = [n for n in checkpoint if n not in graph.axes and n.endswith(kinds) and not n.endswith(UNREAD)]
    extra = [n for n in extra if not (n == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings"))]
    if extra:
        raise CheckpointError(
            f"{extra[0]} is in {checkpoint.directory}, but a model of type {checkpoint.config['model_type']} with this "
            f"config.json does not read it ({len(extra)} such tensors); its result would be another model's"
        )


def _check_patterns(format: Format, linears: list[str]) -> None:
    for pattern in format.exclude_modules:
        alone = type(format)(exclude_modules=(pattern,))
        if not any(alone.excludes(m) for m in [*linears, "lm_head"]):
            raise FormatError(f"exclude_modules {pattern!r} matches no linear; they are named like {linears[0]}")


def _fingerprint(checkpoint: Checkpoint, format: Format, dtype: str, c: Calibration) -> str:
    """Identifies everything that the amaxes depend on."""
    h = hashlib.sha256()
    files = {e.file for e in checkpoint.entries.values()}
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    text = (str(c.dataset and c.dataset.resolve()), c.dataset and c.dataset.stat().st_mtime_ns)
    facts = [checkpoint.config, stats, repr(format), dtype, text, c.size, c.max_seq_length, c.seed]
    h.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return h.hexdigest()


def observe(
    running: Running, format: Format, wanted: Callable[[str], bool], c: Calibration, partial: Path, device: str,
    report: Reporter,
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """amax by the name of each wanted scale, and what is told of it in config.json. `format` is what it is made for."""
    config, checkpoint = running.config, running.checkpoint
    if c.dataset is None:
        raise CalibrationError(
            f"qformat {format.name} with kv_cache_dtype {format.kv_cache_dtype} has static scales; give --calib_dataset"
        )
    length = min(c.max_seq_length, config.max_position_embeddings)
    encode = load_encoder(checkpoint.directory)
    samples = read_samples(c.dataset, encode, config.vocab_size, c.size, length, c.seed)
    if len(samples) < c.size:
        report.remark(f"{c.dataset} gives {len(samples)} samples of the {c.size} asked for")
    state = State.open(partial, _fingerprint(checkpoint, format, running.dtype, c))
    if state.finished:
        report.remark(f"continuing an earlier calibration of the same inputs after layer {state.finished - 1}")
    emit = lambda layers: running.emit(layers, length)
    progress = lambda done, total: report.progress("calibrating", done, total)
    amax = calibrate(emit, config.num_layers, samples, wanted, state, device, progress)
    facts = {
        "dataset": c.dataset.name, "samples": len(samples), "tokens": sum(map(len, samples)),
        "max_seq_length": length, "seed": c.seed,
    }  # fmt: skip
    return amax, facts


def _weights(
    checkpoint: Checkpoint, graph: Graph, linears: set[str], format: Format, dtype: str, device: str
) -> Iterator[Group]:
    target = getattr(torch, dtype)
    for name in graph.axes:
        shape = checkpoint.entry(name).shape
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in linears and format.quantizes(module):
            types = format.quantize(torch.empty(shape, dtype=target, device="meta"))
            planned = tuple(Planned(f"{module}.{k}", t.dtype, tuple(t.shape)) for k, t in types.items())
            yield Group(planned, _quantizer(checkpoint, name, format, target, device))
        else:
            yield unquantized(checkpoint, name, dtype)


def _quantizer(
    checkpoint: Checkpoint, name: str, format: Format, dtype: torch.dtype, device: str
) -> Callable[[], dict[str, torch.Tensor]]:
    module = name.removesuffix(".weight")
    return lambda: {f"{module}.{k}": t for k, t in format.quantize(_finite(checkpoint, name, dtype, device)).items()}


def unquantized(checkpoint: Checkpoint, name: str, dtype: str) -> Group:
    """A tensor in the model's dtype."""
    target = getattr(torch, dtype)
    planned = Planned(name, target, checkpoint.entry(name).shape)
    return Group((planned,), lambda: {name: _finite(checkpoint, name, target, "cpu")})


def _finite(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A weight in the model's dtype. Raises CheckpointError if an element is NaN or infinite in it."""
    entry = checkpoint.entry(name)
    weight = to_torch(entry.array(), device).to(dtype)
    if weight.numel() and not all(math.isfinite(x) for x in torch.stack(torch.aminmax(weight)).tolist()):
        raise CheckpointError(f"{name} contains NaN or Inf in {dtype} ({entry.file}); the checkpoint is damaged")
    return weight


def _scales(amax: dict[str, float]) -> Iterator[Group]:
    for name, value in amax.items():
        scale = scale_of(torch.tensor([value]))
        yield Group((Planned(name, torch.float32, (1,)),), lambda name=name, scale=scale: {name: scale})  # type: ignore[misc]
