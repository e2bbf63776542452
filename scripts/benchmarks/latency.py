"""fp8-bench latency: batches of random prompts, started together and run to the end; and their first tokens.

Tokens/s and times per token are of whole runs. First tokens are of the prompts alone, under steady load: each batch is
submitted when the one before has its first tokens, for a second before any of them counts. A card that was at rest, or
decoded, runs prompts of 10 to 400 ms at clocks that its power limit does not sustain; how far above them differs from
card to card and from run to run. That first token is reported, too (`first_token_ms_in_runs`).

A run before those that count loads the kernels and captures the CUDA graphs: the same prompts, and as many tokens as it
takes until all of them decode together. The load before first tokens takes two steps' worth of prompt at most.

Beside times stand the mean SM clocks meanwhile (`mhz` of whole runs, `decode_mhz` after their prompts,
`first_token_mhz`), counted on the device: how far two cards are apart is mostly that.

Behind them all, a decode step of all of them and a step of one prompt run again and again: where the logits are not the
same bits each time, or not finite, the row says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM
from fp8.runtime.request import RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts import argument_types
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, open_llm, random_tokens
from fp8.scripts.benchmarks.bound import bound
from fp8.scripts.benchmarks.device_clock import CoreClock
from fp8.scripts.benchmarks.roofline import step_rows
from fp8.scripts.benchmarks.values import repeated, wrong
from fp8.scripts.run import positive

WARM_STEPS = 4  # of decoding
LOAD_SECONDS = 1.0  # of prompts before first tokens count: the power limit acts within tenths of a second
COUNTED_SECONDS = 1.5  # of prompts that count, at least: the clock swings by 5% in tenths of a second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="sequences at the same time")
    parser.add_argument("--input_len", type=positive, nargs="+", default=[1024], help="tokens of each prompt")
    parser.add_argument("--output_len", type=positive, default=128, help="tokens of each output")
    parser.add_argument("--runs", type=positive, default=3, help="whole runs, for tokens/s; the median is reported")
    parser.add_argument(
        "--prompt_runs",
        type=positive,
        default=7,
        help="runs of the prompts alone under steady load, for first tokens; more if they take less than 1.5 s",
    )
    parser.add_argument(
        "--max_seconds", type=argument_types.seconds, help="start no further run of a row after so many seconds"
    )


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per batch size and length of the prompts."""
    # Prompts are random, but a batch size draws the same ones as the one before: none may come from the cache.
    llm = open_llm(args, reuse_prefixes=False)
    _check(args, llm.session)
    rows: list[dict[str, Any]] = []
    facts = {"engine": engine_facts(llm.session.plan, args.engine_dir), "failed": False}
    for length in args.input_len:
        for batch in args.batch_size:
            rows.append(_measure(llm, args, batch, length))
            facts["failed"] |= wrong(rows[-1], f"batch {batch}, {length} in, {args.output_len} out")
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
    short = _prompts(llm, source, batch, min(length, 2 * limits.max_num_tokens))
    prompts = _prompts(llm, source, batch, length)
    clock, runs = CoreClock(llm.session), list[Run]()
    if args.output_len > 1:
        _run(llm, prompts, min(args.output_len, steps + WARM_STEPS))
        runs = _several(lambda: _whole(llm, clock, prompts, args.output_len), args.runs, 0.0, args.max_seconds)
    on_gpu = llm.session.device.type == "cuda"  # a CPU needs no load: its clock is not measured
    _several(lambda: _run(llm, short, 1), 1, LOAD_SECONDS * on_gpu)
    begin = clock.stamp()
    alone = _several(lambda: _run(llm, prompts, 1), args.prompt_runs, COUNTED_SECONDS * on_gpu, args.max_seconds)
    first_mhz = clock.mhz(begin, clock.stamp())
    runs = runs or [replace(run, mhz=first_mhz) for run in alone]
    first = statistics.median(r.first_token for r in alone)
    total = statistics.median(r.total for r in runs)
    per_token = statistics.median((r.total - r.first_token) / max(args.output_len - 1, 1) for r in runs)
    limit = bound(llm.session.plan, batch, length, args.output_len)
    rate = batch * args.output_len / total
    return {
        "batch_size": batch, "input_len": length, "output_len": args.output_len, "tokens_per_second": rate,
        "seconds": total, "first_token_ms": first * 1e3, "time_per_output_token_ms": per_token * 1e3,
        "bound_tokens_per_second": limit if on_gpu else None, "fraction_of_bound": rate / limit if on_gpu else None,
        "mhz": _mhz((r.total, r.mhz) for r in runs),
        "decode_mhz": _mhz((r.total - r.first_token, r.decode_mhz) for r in runs),
        "first_token_mhz": first_mhz, "first_token_ms_in_runs": statistics.median(r.first_token for r in runs) * 1e3,
        **repeated(llm.session, *_steps(llm.session, args, batch, length)),
        "all_seconds": [r.total for r in runs], "all_first_token_ms": [r.first_token * 1e3 for r in alone],
    }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Seconds from the submission of a batch to its last first token, and to the end; the mean SM clock meanwhile, and
    after the last step that takes in prompts (None on a CPU)."""

    first_token: float
    total: float
    mhz: float | None = None
    decode_mhz: float | None = None


def _steps(session: Session, args: argparse.Namespace, batch: int, length: int) -> Iterator[list[Row]]:
    """Steps of the kinds that were timed."""
    if args.output_len > 1:
        yield step_rows(session, [(length + args.output_len, 1)] * batch, args.seed)
    most = min(length, session.limits.max_num_tokens, session.max_logits_rows if session.stages > 1 else length)
    yield step_rows(session, [(most, most)], args.seed)


def _prompts(llm: LLM, source: random.Random, batch: int, length: int) -> list[list[int]]:
    return [random_tokens(source, length, llm.session.model.vocab_size) for _ in range(batch)]


def _several(run: Callable[[], Run], count: int, seconds: float, most: float | None = None) -> list[Run]:
    """One after the other: at least `count`, for at least `seconds`; but only those that begin within `most`."""
    runs: list[Run] = []
    begin, taken = time.perf_counter(), 0.0
    while not runs or ((len(runs) < count or taken < seconds) and (most is None or taken <= most)):
        runs.append(run())
        taken = time.perf_counter() - begin
    return runs


def _run(llm: LLM, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
    timings = [c.timing for c in llm.generate(prompts, SamplingParams(max_tokens=output_len, ignore_eos=True))]
    return Run(max(t.first_token for t in timings), max(t.total for t in timings))


def _whole(llm: LLM, clock: CoreClock, prompts: Sequence[Sequence[int]], output_len: int) -> Run:
    """A whole run, with its clocks."""
    with clock.behind_prompts() as behind:
        begin, run, end = clock.stamp(), _run(llm, prompts, output_len), clock.stamp()
    return replace(run, mhz=clock.mhz(begin, end), decode_mhz=clock.mhz([begin, *behind][-1], end))


def _mhz(counted: Iterable[tuple[float, float | None]]) -> float | None:
    """From pairs of (seconds, mean clock): the median of clocks over that of seconds. None on a CPU."""
    known = [(seconds, mhz) for seconds, mhz in counted if mhz is not None]
    if not known:
        return None
    return statistics.median(s * mhz for s, mhz in known) / statistics.median(s for s, _ in known)
