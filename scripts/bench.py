"""fp8-bench: how fast an engine is.

fp8-bench latency --engine_dir E --batch_size 1 8 64 --input_len 1024 --output_len 128   a batch at once, whole
fp8-bench profile --engine_dir E --batch_size 64 --context_len 1024                      one decode step, by plugin
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8.builder.engine import Plan, write_atomically
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts.provenance import add_argument, provenance
from fp8.scripts.run import ERRORS, add_session_arguments, positive

# What one H200 sustains in large operations, measured: the yardstick of "fraction of the bound", not a data sheet.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = {"float8_e4m3fn": 1300e12, "bfloat16": 690e12, "float16": 690e12}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("fp8-bench", description="Measures an engine.")
    modes = p.add_subparsers(dest="mode", required=True)
    latency = modes.add_parser("latency", help="batches of random prompts, started together and run to the end")
    latency.add_argument("--input_len", type=positive, default=1024)
    latency.add_argument("--output_len", type=positive, default=128)
    latency.add_argument("--runs", type=positive, default=3, help="the median is reported")
    latency.add_argument("--warmup", type=int, default=1, help="runs before those that count")
    profile = modes.add_parser("profile", help="time per plugin of a decode step, launched one by one (GPU only)")
    profile.add_argument("--context_len", type=positive, default=1024)
    profile.add_argument("--runs", type=positive, default=10, help="the median is reported")
    for mode in (latency, profile):
        mode.add_argument("--engine_dir", required=True)
        mode.add_argument("--batch_size", type=positive, nargs="+", default=[1])
        mode.add_argument("--seed", type=int, default=0)
        mode.add_argument("--output", type=Path, help="write the result as JSON")
        add_argument(mode)
        add_session_arguments(mode)
    return p


def latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per batch size."""
    # Prompts are random, but a batch size draws the same ones as the one before: none may come from the cache.
    memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
    llm = LLM(args.engine_dir, args.device, *memory, reuse_prefixes=False)
    _check_latency(args, llm.session)
    return [_latency(llm, args, batch) for batch in args.batch_size]


def _check_latency(args: argparse.Namespace, session: Session) -> None:
    limits = session.limits
    if max(args.batch_size) > limits.max_batch_size:
        raise RequestError(
            f"--batch_size {max(args.batch_size)} exceeds the engine's max_batch_size {limits.max_batch_size}"
        )
    if args.input_len + args.output_len > limits.max_seq_len:
        raise RequestError(
            f"--input_len {args.input_len} and --output_len {args.output_len} exceed the engine's max_seq_len "
            f"{limits.max_seq_len}"
        )
    need = max(args.batch_size) * blocks_for(args.input_len + args.output_len, limits.block_size)
    if need > session.num_blocks:
        raise RequestError(
            f"--batch_size {max(args.batch_size)} needs {need} KV blocks at once, and the pool has "
            f"{session.num_blocks}; a batch that does not fit is not a latency measurement"
        )


def _latency(llm: LLM, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    source = random.Random(args.seed)
    runs = []
    for run in range(args.warmup + args.runs):
        prompts = [_random_tokens(source, args.input_len, llm.session.model.vocab_size) for _ in range(batch)]
        timings = [c.timing for c in llm.generate(prompts, params)]
        if run >= args.warmup:
            runs.append((max(t.first_token for t in timings), max(t.total for t in timings)))
    first, total = (statistics.median(r[i] for r in runs) for i in (0, 1))
    per_token = statistics.median((t - f) / max(args.output_len - 1, 1) for f, t in runs)
    limit = bound(llm.session.plan, batch, args.input_len, args.output_len)
    rate = batch * args.output_len / total
    on_gpu = llm.session.device.type == "cuda"
    return {
        "batch_size": batch, "input_len": args.input_len, "output_len": args.output_len, "tokens_per_second": rate,
        "seconds": total, "first_token_ms": first * 1e3, "time_per_output_token_ms": per_token * 1e3,
        "bound_tokens_per_second": limit if on_gpu else None, "fraction_of_bound": rate / limit if on_gpu else None,
        "all_seconds": [t for _, t in runs],
    }  # fmt: skip


def _random_tokens(source: random.Random, count: int, vocab_size: int) -> list[int]:
    return [source.randrange(vocab_size) for _ in range(count)]


def bound(plan: Plan, batch: int, input_len: int, output_len: int) -> float:
    """Tokens/s if nothing but these took time: linears at their tensor-core rate for the prompts, then per output token
    all linears' weights and the cached K and V once from memory. Attention's own arithmetic is left out."""
    flops_seconds, weight_bytes = 0.0, 0.0
    for step in plan.steps:
        if step.plugin not in ("gemm", "gemm_swiglu"):
            continue
        w = plan.buffer(step.inputs[1])
        n, k = (int(d) for d in w.shape)
        rows = batch if plan.buffer(step.outputs[0]).shape[0] == "L" else batch * input_len
        flops_seconds += 2.0 * n * k * rows / FLOPS_PER_SECOND.get(w.dtype, FLOPS_PER_SECOND["bfloat16"])
        weight_bytes += n * k * (1 if w.dtype == "float8_e4m3fn" else 2)
    model = plan.model
    width = 1 if model.kv_cache_dtype in ("fp8", "float8_e4m3fn") else 2
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
    context = input_len + output_len / 2
    decode = (output_len - 1) * (weight_bytes + batch * context * token_bytes) / BYTES_PER_SECOND
    return batch * output_len / (flops_seconds + decode)


def profile(args: argparse.Namespace) -> list[dict[str, Any]]:
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
    return rows


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
        tokens = _random_tokens(source, context, session.model.vocab_size)
        blocks = list(range(i * each, (i + 1) * each))
        request = Request(i, tokens, SamplingParams(), 1, blocks=blocks, slot=i, computed=context - 1)
        rows.append(Row(request, context - 1, 1, True, 0))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text, their keys as the head; lists are left out."""
    keys = [k for k, v in rows[0].items() if not isinstance(v, list)]
    cells = [keys] + [
        ["-" if r[k] is None else f"{r[k]:.3f}" if isinstance(r[k], float) else str(r[k]) for k in keys] for r in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows = {"latency": latency, "profile": profile}[args.mode](args)
        result = {
            "mode": args.mode,
            "engine_dir": str(args.engine_dir),
            **provenance("fp8-bench", argv, args.commit),
            "ran_on": args.device,
            "results": rows,
        }
        if args.output:
            write_atomically(args.output, [json.dumps(result, indent=2).encode() + b"\n"])
    except ERRORS as error:
        print(f"fp8-bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-bench: interrupted", file=sys.stderr)
        return 130
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
