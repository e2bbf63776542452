"""fp8-bench roofline: where the time of a step of decode rows, prompts or both goes, and what of it the card would not
ask for.

Every step of the plan is launched and timed by itself, so that kernels do not overlap; "whole step" beside them is the
step as it runs when serving: as a CUDA graph (decode), kernels overlapping. So it runs again and again after that:
where its logits are not the same bits each time, or not finite, its row says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fp8.plugins.base import StepShape
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts.benchmarks import ceilings
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, fill_cache, random_tokens
from fp8.scripts.benchmarks.ceilings import Ceilings
from fp8.scripts.benchmarks.values import repeated, wrong
from fp8.scripts.benchmarks.work import Work, label, work_of
from fp8.scripts.run import positive

MIXTURE = re.compile(r"(\d+)x(\d+)((?:\+\d+x\d+(?:@\d+)?)+)")
PROMPTS = re.compile(r"(\d+)x(\d+)(?:@(\d+))?")


@dataclass(frozen=True)
class Mixture:
    """A step of decode rows and prompts: (context, new tokens) of each sequence."""

    name: str
    sequences: tuple[tuple[int, int], ...]


def mixture(text: str) -> Mixture:
    """`1016x192+8x128@500`: decode rows x their context, then prompts x their new tokens @ their context with these
    (without @, nothing comes before them). Raises argparse.ArgumentTypeError for anything else."""
    found = MIXTURE.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not ROWSxCONTEXT+PROMPTSxTOKENS[@CONTEXT]")
    sequences = [(int(found[2]), 1)] * int(found[1])
    for count, tokens, context in PROMPTS.findall(found[3]):
        if not 2 <= int(tokens) <= int(context or tokens):
            raise argparse.ArgumentTypeError(f"{text}: a prompt has 2 tokens or more, and no more than its context")
        sequences += [(int(context or tokens), int(tokens))] * int(count)
    return Mixture(f"mixed {text}", tuple(sequences))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.set_defaults(prepare=lambda args, session: fill_cache(session))
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="sequences of a decode step")
    parser.add_argument("--context_len", type=positive, default=1024, help="tokens of context of each sequence")
    parser.add_argument(
        "--prompt_len", type=positive, nargs="*", default=[1024], help="prompts, each a step of its own"
    )
    parser.add_argument(
        "--mixed", type=mixture, nargs="*", default=[], metavar="MIXTURE",
        help="steps of both: 1016x192+8x128 is 1016 decode rows of context 192 and 8 prompts of 128 tokens; "
        "88x21000+1x900@9000 has the last 900 of a prompt's first 9000",
    )  # fmt: skip
    parser.add_argument("--runs", type=positive, default=10, help="times of each step; the median is reported")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of every step asked for: the step as a whole, then its kernels, the largest losses first."""
    memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
    session = Session(args.engine_dir, args.device, *memory, world=args.world, make_weight=args.make_weight)
    if session.stages > 1:
        raise RequestError(
            "fp8-bench roofline times all launches of a step in turn; a pipeline stage has only some of them"
        )
    fill_cache(session)
    found = ceilings.measure()[0] if session.device.type == "cuda" else None
    rows: list[dict[str, Any]] = []
    facts = {
        "engine": engine_facts(session.plan, args.engine_dir),
        "ceilings": found and found.as_dict(),
        "failed": False,
    }
    for asked in _asked(args):
        step = step_rows(session, asked.sequences, args.seed)
        measured = _measure(session, found, asked.name, step, args.runs)
        facts["failed"] |= wrong(measured[0], asked.name)
        rows += measured
        args.save(rows, facts)
    return rows, facts


def _asked(args: argparse.Namespace) -> Iterator[Mixture]:
    for batch in args.batch_size:
        yield Mixture(f"decode {batch} x {args.context_len}", ((args.context_len, 1),) * batch)
    for length in args.prompt_len:
        yield Mixture(f"prompt {length}", ((length, length),))
    yield from args.mixed


def step_rows(session: Session, sequences: Sequence[tuple[int, int]], seed: int) -> list[Row]:
    """Rows of (context, new tokens) each, as if what comes before the new ones had been taken in.

    Raises RequestError for what the engine does not hold."""
    limits, source = session.limits, random.Random(seed)
    each = [blocks_for(context, limits.block_size) for context, _ in sequences]
    tokens, longest = sum(count for _, count in sequences), max(context for context, _ in sequences)
    over = len(sequences) > limits.max_batch_size or longest > limits.max_seq_len or tokens > limits.max_num_tokens
    if over or sum(each) > session.num_blocks:
        raise RequestError(
            f"{len(sequences)} sequences of {longest} tokens, {tokens} of them new, exceed the engine (max_batch_size "
            f"{limits.max_batch_size}, max_seq_len {limits.max_seq_len}, max_num_tokens {limits.max_num_tokens}) or "
            f"its KV pool ({session.num_blocks} blocks of {limits.block_size} tokens)"
        )
    drawn = random_tokens(source, longest + len(sequences), session.model.vocab_size)
    rows, first = [], 0
    for i, ((context, count), blocks) in enumerate(zip(sequences, each, strict=True)):
        prompt = drawn[i : i + context]  # no two begin alike
        params, held = SamplingParams(ignore_eos=True), list(range(first, first + blocks))
        request = Request(i, prompt, params, 1, blocks=held, slot=i, computed=context - count)
        rows.append(Row(request, context - count, count, True, 0))
        first += blocks
    return rows


def _measure(
    session: Session, found: Ceilings | None, name: str, rows: Sequence[Row], runs: int
) -> list[dict[str, Any]]:
    singles = sum(row.count == 1 for row in rows)
    counts = [row.count for row in rows]
    longest = max(row.start + row.count for row in rows)
    shape = StepShape(sum(counts), len(rows), singles, max(counts) if singles < len(rows) else 0, longest, len(rows))
    whole = _whole(session, rows, runs)
    groups: dict[tuple[str, str], list[tuple[float, float, float, float | None]]] = defaultdict(list)
    times, shapes = session.probing.time_launches(rows, runs), session.executor.shapes(shape)
    for step, seconds, live in zip(session.executor.as_run(shape), times, shapes, strict=True):
        work = work_of(session.plan, step, live, rows)
        least = None if found is None else _least(found, work)
        groups[label(step), step.plugin].append((seconds, work.bytes, work.flops, least))
    alone = sum(one[0] for group in groups.values() for one in group)
    kernels = [_row(name, *key, group, alone) for key, group in groups.items()]
    kernels.sort(key=lambda row: -(row["loss_us"] if row["loss_us"] is not None else row["us"]))
    total = [one for group in groups.values() for one in group]
    values = repeated(session, rows)
    return [{**_row(name, "whole step", "", total, alone), **_timed(whole, kernels), **values}, *kernels]


def _least(found: Ceilings, work: Work) -> float:
    """Seconds."""
    return max(found.memory_seconds(work.bytes, work.written), found.product_seconds(work.flops, work.dtype))


def _row(name: str, kernel: str, plugin: str, group: list[tuple], alone: float) -> dict[str, Any]:
    seconds, moved, flops = (sum(one[i] for one in group) for i in range(3))
    least = None if group[0][3] is None else sum(one[3] for one in group)
    return {
        "step": name, "kernel": kernel, "plugin": plugin, "launches": len(group), "us": seconds * 1e6,
        "us_each": seconds / len(group) * 1e6, "megabytes": moved / 1e6, "gflop": flops / 1e9,
        "bound_us": None if least is None else least * 1e6, "fraction": None if least is None else least / seconds,
        "loss_us": None if least is None else (seconds - least) * 1e6, "share": seconds / alone,
    }  # fmt: skip


def _timed(whole: float, kernels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole step's time in place of the sum over its kernels alone."""
    us, alone = whole * 1e6, sum(row["us"] for row in kernels)
    bounds = [row["bound_us"] for row in kernels]
    least = None if None in bounds else sum(bounds)
    return {
        "us": us, "us_each": us / len(kernels), "fraction": least and least / us, "loss_us": least and us - least,
        "share": us / alone,
    }  # fmt: skip


def _whole(session: Session, rows: Sequence[Row], runs: int) -> float:
    """Seconds of a step among its like, one enqueued after the other."""
    for _ in range(2):  # runs it, captures its graph
        session.read(session.enqueue(rows))
    times, open_ticket = [], session.enqueue(rows)
    for _ in range(runs):
        begin = time.perf_counter()
        next_ticket = session.enqueue(rows)
        session.read(open_ticket)
        times.append(time.perf_counter() - begin)
        open_ticket = next_ticket
    session.read(open_ticket)
    return statistics.median(times)
