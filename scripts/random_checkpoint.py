"""Writes a checkpoint of a given shape with random weights, quantized already, laid out as fp8-quantize lays it out.

For speed benchmarks: the shape decides the speed, and nothing is downloaded, calibrated or kept twice in memory. Values
are normal, taken from one table of 2^24, each tensor from elsewhere in it: that is as random to the card, and takes no
longer than writing the file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from fp8.builder.checkpoint import DTYPES, Checkpoint, CheckpointError, Entry, read_json
from fp8.builder.formats.base import Format, FormatError
from fp8.builder.formats.base import load as load_format
from fp8.builder.formats.bf16 import Bf16
from fp8.builder.graph import Graph
from fp8.builder.quantization_config import write_engine_section, write_quantization
from fp8.builder.shards import Group, Planned, write_shards
from fp8.models.config import ConfigError
from fp8.models.config import load as load_model

ERRORS = (CheckpointError, ConfigError, FormatError, OSError)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_3 = {
    **LLAMA, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "llama-7b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-2-13b": {
        **LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-2-70b": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-3.1-8b": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.1-70b": {
        **LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.1-405b": {
        **LLAMA_3, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8,
    },
}  # fmt: skip
ACTIVATION_AMAX = 8.0  # of normalized activations, queries, keys and values; what calibration finds is near it
WEIGHT_STD = 0.02
SIGMAS = 5.0  # the largest of some 10^7 normal numbers
TABLE = 1 << 24


class Shapes(Checkpoint):
    """Stands for a checkpoint of any shape: every tensor asked for is there."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        self.config = config
        self._dtype = DTYPES["BF16" if dtype == torch.bfloat16 else "F16"]

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        assert shape is not None, name
        return Entry(name, Path("random"), 0, math.prod(shape) * 2, self._dtype, shape)


class Normal:
    """Normal numbers of one scale and type, without a bound on how many."""

    def __init__(self, dtype: torch.dtype, deviation: float, generator: torch.Generator) -> None:
        self._dtype, self._deviation, self._generator = dtype, deviation, generator

    @functools.cached_property
    def _table(self) -> torch.Tensor:
        values = torch.randn(TABLE, generator=self._generator).mul_(self._deviation)
        values = values.clamp_(-448, 448) if self._dtype == torch.float8_e4m3fn else values
        return values.to(self._dtype).view(torch.uint8)

    def take(self, shape: Sequence[int]) -> torch.Tensor:
        """The table from a random place on, over and over."""
        wanted = math.prod(shape) * self._dtype.itemsize
        at = int(torch.randint(TABLE, (), generator=self._generator)) * self._dtype.itemsize
        out = torch.empty(wanted, dtype=torch.uint8)
        done = 0
        while done < wanted:
            part = self._table[at:][: wanted - done]
            out[done : done + len(part)] = part
            done, at = done + len(part), 0
        return out.view(self._dtype).view(*shape)


def write_random_checkpoint(
    output: Path, config: dict[str, Any], format: Format, seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes config.json and safetensors shards into `output`, which must not hold a checkpoint yet."""
    if (output / "config.json").exists():
        raise FormatError(f"{output} holds a checkpoint already; remove it or choose another --output_dir")
    groups, linears = random_groups(config, format, seed)
    output.mkdir(parents=True, exist_ok=True)
    write_shards(output, groups, progress)
    text = json.dumps(checkpoint_config(config, format, linears), indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")


def random_groups(config: dict[str, Any], format: Format, seed: int) -> tuple[list[Group], list[str]]:
    """All tensors of a checkpoint of that shape, and its linears."""
    dtype = format.dtype or "bfloat16"
    model = load_model(config)
    shapes = Shapes(config, getattr(torch, dtype))
    graph = model.emit(model.read_config(config), shapes, Bf16(), dtype, max_positions=1)
    scales = [name for name in graph.activations if format.calibrated(name)]
    return [*_weights(graph, graph.linears, format, getattr(torch, dtype), seed), *map(_scale, scales)], graph.linears


def _weights(graph: Graph, linears: Sequence[str], format: Format, dtype: torch.dtype, seed: int) -> Iterator[Group]:
    stored, generator = graph.tensors(), torch.Generator().manual_seed(seed)
    plain, codes = Normal(dtype, WEIGHT_STD, generator), Normal(torch.float8_e4m3fn, 448 / SIGMAS, generator)
    for name in graph.axes:
        shape = tuple(stored[name].shape)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in linears and format.quantizes(module):
            types = format.quantize(torch.empty(shape, dtype=dtype, device="meta"))
            planned = tuple(Planned(f"{module}.{k}", t.dtype, tuple(t.shape)) for k, t in types.items())
            yield Group(planned, lambda planned=planned: _quantized(planned, codes))  # type: ignore[misc]
        else:
            plan = Planned(name, dtype, shape)
            yield Group((plan,), lambda plan=plan: {plan.name: _plain(plan, plain)})  # type: ignore[misc]


def _quantized(planned: Sequence[Planned], codes: Normal) -> dict[str, torch.Tensor]:
    """Codes that fill e4m3's range, and the scale that gives them a standard deviation of WEIGHT_STD."""
    return {
        p.name: codes.take(p.shape)
        if p.dtype == torch.float8_e4m3fn
        else torch.full(p.shape, WEIGHT_STD * SIGMAS / 448, dtype=p.dtype)
        for p in planned
    }


def _plain(plan: Planned, normal: Normal) -> torch.Tensor:
    """Ones for a norm's weight, else normal."""
    if len(plan.shape) == 1 and plan.name.endswith("norm.weight"):
        return torch.ones(plan.shape, dtype=plan.dtype)
    return normal.take(plan.shape)


def _scale(name: str) -> Group:
    return Group((Planned(name, torch.float32, (1,)),), lambda: {name: torch.full((1,), ACTIVATION_AMAX / 448)})


def checkpoint_config(config: dict[str, Any], format: Format, linears: Sequence[str]) -> dict[str, Any]:
    """config.json of the quantized checkpoint."""
    dtype = format.dtype or "bfloat16"
    config = {**config, "dtype": dtype, "torch_dtype": dtype}
    if quantization := write_quantization(format, linears):
        config["quantization_config"] = quantization
    config["fp8_engine"] = write_engine_section(format, importlib.metadata.version("fp8-engine"), None)
    return config


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m fp8.scripts.random_checkpoint", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_shape_arguments(p)
    p.add_argument("--seed", type=int, default=0)
    return p


def add_shape_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}, or a config.json")
    p.add_argument("--output_dir", required=True, type=Path)
    p.add_argument("--qformat", default="fp8")
    p.add_argument("--kv_cache_dtype", default="auto", choices=("auto", "fp8"))
    p.add_argument("--num_layers", type=int, help="fewer (or more) layers than the model has")
    p.add_argument("--max_position_embeddings", type=int, help="longer (or shorter) sequences than the model takes")


def shape_config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the shape that the arguments name. Raises CheckpointError if there is no such file."""
    config = dict(PRESETS[args.model]) if args.model in PRESETS else read_json(Path(args.model))
    if args.num_layers:
        config["num_hidden_layers"] = args.num_layers
    if args.max_position_embeddings:
        config["max_position_embeddings"] = args.max_position_embeddings
    return config


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        config = shape_config(args)
        format = load_format(args.qformat)(kv_cache_dtype=args.kv_cache_dtype)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("writing", total=None)
            show = lambda done, total: bar.update(task, completed=done, total=total)
            write_random_checkpoint(args.output_dir, config, format, args.seed, show)
    except ERRORS as error:
        print(f"random_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("random_checkpoint: interrupted", file=sys.stderr)
        return 130
    size = sum(f.stat().st_size for f in args.output_dir.iterdir())
    print(f"{args.output_dir}: {size / 1e9:.2f} GB, {args.qformat}, kv_cache_dtype {args.kv_cache_dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
