"""fp8-bench profile: where the time of a decode step goes, by plugin."""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, random_tokens
from fp8.scripts.run import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1])
    parser.add_argument("--context_len", type=positive, default=1024)
    parser.add_argument("--runs", type=positive, default=10, help="the median is reported")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per batch size and plugin (the lm_head apart): median time of all its launches in a decode step."""
    session = Session(args.engine_dir, args.device, args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction)
    if session.device.type != "cuda":
        raise RequestError("fp8-bench profile times kernels; it needs a GPU")
    rows = []
    for batch in args.batch_size:
        step_rows = decode_rows(session, batch, args.context_len, args.seed)
        times: dict[str, list[float]] = {}
        for step, seconds in zip(session.plan.steps, session.time_launches(step_rows, args.runs), strict=True):
            times.setdefault("lm_head" if step.outputs[0] == "logits" else step.plugin, []).append(seconds)
        total = sum(map(sum, times.values()))
        for name, values in sorted(times.items(), key=lambda item: -sum(item[1])):
            rows.append({
                "batch_size": batch, "plugin": name, "launches": len(values), "us": sum(values) * 1e6,
                "us_each": statistics.mean(values) * 1e6, "share": sum(values) / total,
            })  # fmt: skip
    return rows, {"engine": engine_facts(session.plan)}


def decode_rows(session: Session, batch: int, context: int, seed: int) -> list[Row]:
    """A decode step of `batch` sequences of `context` tokens, as if their prompts had been taken in."""
    limits, source = session.limits, random.Random(seed)
    each = blocks_for(context, limits.block_size)
    if batch > limits.max_batch_size or context > limits.max_seq_len or batch * each > session.num_blocks:
        raise RequestError(
            f"--batch_size {batch} with --context_len {context} exceeds the engine (max_batch_size "
            f"{limits.max_batch_size}, max_seq_len {limits.max_seq_len}) or its KV pool ({session.num_blocks} "
            f"blocks of {limits.block_size} tokens)"
        )
    rows = []
    for i in range(batch):
        tokens = random_tokens(source, context, session.model.vocab_size)
        blocks = list(range(i * each, (i + 1) * each))
        request = Request(i, tokens, SamplingParams(), 1, blocks=blocks, slot=i, computed=context - 1)
        rows.append(Row(request, context - 1, 1, True, 0))
    return rows
