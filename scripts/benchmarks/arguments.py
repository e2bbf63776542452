"""What the modes of fp8-bench that open an engine share: arguments, prompts, a filled KV pool, facts of the engine."""

from __future__ import annotations

import argparse
import gc
import random
from dataclasses import asdict
from typing import Any

from fp8.builder.engine import Plan
from fp8.runtime.llm import LLM
from fp8.runtime.reference import kv_buffers
from fp8.runtime.session import Session
from fp8.scripts.run import add_session_arguments


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine_dir", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    add_session_arguments(parser)


def open_llm(args: argparse.Namespace, reuse_prefixes: bool) -> LLM:
    memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
    llm = LLM(args.engine_dir, args.device, *memory, reuse_prefixes=reuse_prefixes, world=args.world)
    gc.collect()
    gc.freeze()  # the modules and the engine stay; going through them costs the loop tens of milliseconds now and then
    return llm


def engine_facts(plan: Plan) -> dict[str, Any]:
    """Which engine a figure is of."""
    model = asdict(plan.model)
    kept = ("architecture", "format", "kv_cache_dtype", "num_layers", "hidden_size", "num_heads", "num_kv_heads")
    return {**{name: model[name] for name in (*kept, "vocab_size")}, "mlp_size": _mlp_size(plan), **asdict(plan.limits)}


def _mlp_size(plan: Plan) -> int | None:
    """Columns of the first down projection."""
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
