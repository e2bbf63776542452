"""fp8-bench latency: batches of random prompts, started together and run to the end.

A run before those that count loads the kernels and captures the CUDA graphs: the same prompts, and as many tokens as it
takes until all of them decode together. Where nothing is decoded (`--output_len 1`), two steps' worth of prompt do.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM
from fp8.runtime.request import RequestError, SamplingParams
from fp8.runtime.session import Session
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, open_llm, random_tokens
from fp8.scripts.benchmarks.bound import bound
from fp8.scripts.run import positive

WARM_STEPS = 4  # of decoding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="sequences at once")
    parser.add_argument("--input_len", type=positive, nargs="+", default=[1024], help="tokens of each prompt")
    parser.add_argument("--output_len", type=positive, default=128, help="tokens of each output")
    parser.add_argument("--runs", type=positive, default=3, help="the median is reported")
    parser.add_argument("--max_seconds", type=float, help="of a row: begin no further run after so many")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per batch size and length of the prompts."""
    # Prompts are random, but a batch size draws the same ones as the one before: none may come from the cache.
    llm = open_llm(args, reuse_prefixes=False)
    _check(args, llm.session)
    rows: list[dict[str, Any]] = []
    facts = {"engine": engine_facts(llm.session.plan, args.engine_dir)}
    for length in args.input_len:
        for batch in args.batch_size:
            rows.append(_measure(llm, args, batch, length))
            args.save(rows, facts)
    return rows, facts


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
    source, limits = random.Random(args.seed), llm.session.limits
    steps = -(-batch * length // limits.max_num_tokens)  # that the prompts take
    warm = length if args.output_len > 1 else min(length, 2 * limits.max_num_tokens)
    _run(llm, source, batch, warm, min(args.output_len, steps + WARM_STEPS))
    runs: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(runs) < args.runs and not (runs and args.max_seconds and time.perf_counter() - begin > args.max_seconds):
        runs.append(_run(llm, source, batch, length, args.output_len))
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


def _run(llm: LLM, source: random.Random, batch: int, length: int, output_len: int) -> tuple[float, float]:
    """Seconds to the last request's first token, and to the end."""
    prompts = [random_tokens(source, length, llm.session.model.vocab_size) for _ in range(batch)]
    timings = [c.timing for c in llm.generate(prompts, SamplingParams(max_tokens=output_len, ignore_eos=True))]
    return max(t.first_token for t in timings), max(t.total for t in timings)
