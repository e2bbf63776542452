"""What the modes of fp8-bench that open an engine share: arguments, prompts, a filled KV pool, facts of the engine."""

from __future__ import annotations

import argparse
import gc
import json
import random
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Buffer, Plan
from fp8.runtime.llm import LLM
from fp8.runtime.reference import kv_buffers
from fp8.runtime.session import Session
from fp8.scripts.random_checkpoint import SIGMAS, WEIGHT_STD
from fp8.scripts.run import add_session_arguments

if TYPE_CHECKING:
    import torch


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine_dir", required=True, help="as fp8-build writes it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random prompts")
    add_session_arguments(parser)
    parser.set_defaults(make_weight=make_weight)


def make_weight(buffer: Buffer, device: torch.device) -> torch.Tensor:
    """A matrix of an engine that random_engine built: normal numbers as random_checkpoint's, the same on every rank
    that has it whole."""
    import torch

    out = torch.empty(tuple(map(int, buffer.shape)), dtype=getattr(torch, buffer.dtype), device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(buffer.name.encode()))
    deviation = 448 / SIGMAS if out.dtype == torch.float8_e4m3fn else WEIGHT_STD
    for rows in out.split(max(1, (1 << 26) // out.shape[1])):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device).mul_(deviation).clamp_(-448, 448))
    return out


def open_llm(args: argparse.Namespace, reuse_prefixes: bool) -> LLM:
    memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
    llm = LLM(
        args.engine_dir,
        args.device,
        *memory,
        reuse_prefixes=reuse_prefixes,
        world=args.world,
        make_weight=args.make_weight,
    )
    gc.collect()
    gc.freeze()  # the modules and the engine stay; going through them costs the loop tens of milliseconds now and then
    return llm


def engine_facts(plan: Plan, directory: str | Path) -> dict[str, Any]:
    """Which engine a figure is of."""
    model, place = asdict(plan.model), plan.compatibility
    kept = ("architecture", "format", "kv_cache_dtype", "num_layers", "hidden_size", "num_heads", "num_kv_heads")
    return {
        **{name: model[name] for name in (*kept, "vocab_size")}, "mlp_size": _mlp_size(plan, Path(directory)),
        "tp_size": place.tp_size, "pp_size": place.pp_size, **asdict(plan.limits),
    }  # fmt: skip


def _mlp_size(plan: Plan, directory: Path) -> int | None:
    """Columns of the first down projection, all ranks' together."""
    if plan.compatibility.tp_size > 1:
        ranks = json.loads((directory / "config.json").read_text())["ranks"]
        return max(int(rank["axes"]["mlp"][1]) for rank in ranks)
    found = (b.shape[1] for b in plan.buffers if b.kind == "weight" and b.name.endswith("down_proj.weight"))
    return next((int(n) for n in found), None)


def random_tokens(source: random.Random, count: int, vocab_size: int) -> list[int]:
    return source.choices(range(vocab_size), k=count)


def fill_cache(session: Session) -> None:
    """Random finite values everywhere: zeros would draw less power than a model's K and V do."""
    import torch

    for buffer in kv_buffers(session.plan):
        cache = session.executor.weight(buffer.name)
        for part in cache.view(-1).split(1 << 26):
            values = torch.randn(part.shape, device=part.device, dtype=torch.bfloat16)
            part.copy_((values * 100).clamp_(-448, 448) if cache.element_size() == 1 else values)
    if session.device.type == "cuda":
        torch.cuda.synchronize()
