"""fp8-bench latency: batches of random prompts, started together and run to the end."""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM
from fp8.runtime.request import RequestError, SamplingParams
from fp8.runtime.session import Session
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, open_llm, random_tokens
from fp8.scripts.benchmarks.bound import bound
from fp8.scripts.run import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1])
    parser.add_argument("--input_len", type=positive, nargs="+", default=[1024])
    parser.add_argument("--output_len", type=positive, default=128)
    parser.add_argument("--runs", type=positive, default=3, help="the median is reported")
    parser.add_argument("--warmup", type=int, default=1, help="runs before those that count")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per batch size and length of the prompts."""
    # Prompts are random, but a batch size draws the same ones as the one before: none may come from the cache.
    llm = open_llm(args, reuse_prefixes=False)
    _check(args, llm.session)
    rows = [_measure(llm, args, batch, length) for length in args.input_len for batch in args.batch_size]
    return rows, {"engine": engine_facts(llm.session.plan)}


def _check(args: argparse.Namespace, session: Session) -> None:
    limits, batch, longest = session.limits, max(args.batch_size), max(args.input_len)
    if batch > limits.max_batch_size:
        raise RequestError(f"--batch_size {batch} exceeds the engine's max_batch_size {limits.max_batch_size}")
    if longest + args.output_len > limits.max_seq_len:
        raise RequestError(
            f"--input_len {longest} and --output_len {args.output_len} exceed the engine's max_seq_len "
            f"{limits.max_seq_len}"
        )
    need = batch * blocks_for(longest + args.output_len, limits.block_size)
    if need > session.num_blocks:
        raise RequestError(
            f"--batch_size {batch} needs {need} KV blocks at once, and the pool has "
            f"{session.num_blocks}; a batch that does not fit is not a latency measurement"
        )


def _measure(llm: LLM, args: argparse.Namespace, batch: int, length: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    source = random.Random(args.seed)
    runs = []
    for run in range(args.warmup + args.runs):
        prompts = [random_tokens(source, length, llm.session.model.vocab_size) for _ in range(batch)]
        timings = [c.timing for c in llm.generate(prompts, params)]
        if run >= args.warmup:
            runs.append((max(t.first_token for t in timings), max(t.total for t in timings)))
    first, total = (statistics.median(r[i] for r in runs) for i in (0, 1))
    per_token = statistics.median((t - f) / max(args.output_len - 1, 1) for f, t in runs)
    limit = bound(llm.session.plan, batch, length, args.output_len)
    rate = batch * args.output_len / total
    on_gpu = llm.session.device.type == "cuda"
    return {
        "batch_size": batch, "input_len": length, "output_len": args.output_len, "tokens_per_second": rate,
        "seconds": total, "first_token_ms": first * 1e3, "time_per_output_token_ms": per_token * 1e3,
        "bound_tokens_per_second": limit if on_gpu else None, "fraction_of_bound": rate / limit if on_gpu else None,
        "all_seconds": [t for _, t in runs],
    }  # fmt: skip
