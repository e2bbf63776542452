"""fp8-bench throughput: in-flight batching with all requests queued, output tokens per second.

Whole: from the first step to the last token of `num_requests` requests, filling up and running dry included. Steady
(`--max_seconds`): what a queue that never ends gives, over a window of about that length, from one request's end to
another's. For that, the first sequences start where a long-running engine would have them, spread evenly over their
output, with random K and V in the pool for their past; the rest is computed as ever, prompts of the requests that
follow included.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fp8.runtime.kv_cache import BlockPool, blocks_for, extend_keys
from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.session import Session
from fp8.scripts import argument_types
from fp8.scripts.benchmarks.arguments import add_engine_arguments, engine_facts, fill_cache, open_llm, random_tokens
from fp8.scripts.benchmarks.device_clock import CoreClock, DeviceClock
from fp8.scripts.run import positive

WARM_STEPS = 24  # of the steady state, before its window: CUDA graphs of its sizes are captured
QUEUED = 256  # requests that wait at any time in the steady state, at least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser)
    parser.set_defaults(prepare=_prepare)
    parser.add_argument("--input_len", type=positive, nargs="+", default=[1000], help="tokens of each prompt")
    parser.add_argument(
        "--output_len",
        type=positive,
        nargs="+",
        default=[1000],
        help="tokens of each output, one number for each input_len",
    )
    parser.add_argument(
        "--num_requests",
        type=positive,
        nargs="+",
        default=[1024],
        help="requests in the queue; one number, or one for each input_len",
    )
    parser.add_argument(
        "--max_batch_size",
        type=positive,
        nargs="+",
        help="sequences at the same time; one number, or one for each input_len (default: the engine's)",
    )
    parser.add_argument(
        "--max_seconds", type=argument_types.seconds, help="measure the steady state instead, for so long"
    )


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per pair of lengths."""
    if len(args.input_len) != len(args.output_len):
        raise RequestError(f"{len(args.input_len)} values of --input_len and {len(args.output_len)} of --output_len")
    counts = _one_for_each(args.input_len, args.num_requests, "num_requests")
    llm = open_llm(args, reuse_prefixes=True)
    built = llm.session.limits.max_batch_size
    batches = _one_for_each(args.input_len, args.max_batch_size or [built], "max_batch_size")
    if max(batches) > built:
        raise RequestError(f"--max_batch_size {max(batches)} exceeds the engine's, {built}")
    lengths = list(zip(args.input_len, args.output_len, strict=True))
    for pair in lengths:
        if sum(pair) > llm.session.limits.max_seq_len:
            raise RequestError(
                f"--input_len {pair[0]} and --output_len {pair[1]} exceed the engine's max_seq_len "
                f"{llm.session.limits.max_seq_len}"
            )
    _prepare(args, llm.session)
    rows: list[dict[str, Any]] = []
    facts = {"engine": engine_facts(llm.session.plan, args.engine_dir)}
    for pair, count, batch in zip(lengths, counts, batches, strict=True):
        load = Load(llm, *pair, random.Random(args.seed), count, batch)
        rows.append(_steady(load, args.max_seconds) if args.max_seconds else _whole(load))
        args.save(rows, facts)
        llm.worker.drop_all()
    return rows, facts


def _one_for_each(lengths: Sequence[int], given: Sequence[int], name: str) -> Sequence[int]:
    values = given if len(given) > 1 else list(given) * len(lengths)
    if len(values) != len(lengths):
        raise RequestError(f"{len(lengths)} values of --input_len and {len(values)} of --{name}")
    return values


def _prepare(args: argparse.Namespace, session: Session) -> None:
    if args.max_seconds:
        fill_cache(session)


class Load:
    """Requests of one shape. Prompts are windows of one row of random tokens: no two begin with the same block."""

    def __init__(
        self,
        llm: LLM,
        input_len: int,
        output_len: int,
        source: random.Random,
        requests: int,
        max_batch_size: int | None = None,
    ) -> None:
        self.llm, self.worker = llm, llm.worker
        self.max_batch_size = max_batch_size or llm.session.limits.max_batch_size
        self.worker.scheduler.most_running = self.max_batch_size
        self.clock, self.core = DeviceClock(llm.session), CoreClock(llm.session)
        self.input_len, self.output_len, self.num_requests = input_len, output_len, requests
        self._tokens = random_tokens(source, input_len + output_len + (1 << 20), llm.session.model.vocab_size)
        self._ids = itertools.count()

    def request(self, age: int = 0) -> Request:
        """A request that has `age` tokens of its output in its prompt."""
        i = next(self._ids)
        at = i % (1 << 20)
        prompt = self._tokens[at : at + self.input_len + age]
        params = SamplingParams(max_tokens=self.output_len - age, ignore_eos=True)
        return Request(i, prompt, params, params.max_tokens)


@dataclass
class Window:
    """Sums over the steps of a measurement."""

    steps: int = 0
    tokens: int = 0  # output
    computed: int = 0  # those and prompts'
    rows: int = 0
    host: float = 0.0  # seconds of scheduling, packing, enqueueing and taking in
    wait: float = 0.0  # seconds that the host waited for tokens
    seconds: float = 0.0
    mhz: float | None = None  # the mean SM clock

    def step(self, load: Load) -> None:
        begin = time.perf_counter()
        got = load.worker.step()
        taken = time.perf_counter() - begin
        record = load.worker.statistics.steps[-1]
        self.steps += 1
        self.tokens += len(got)
        self.computed += record.tokens
        self.rows += record.rows
        self.wait += record.read_seconds
        self.host += taken - record.read_seconds
        self.seconds += taken


def _whole(load: Load) -> dict[str, Any]:
    window = Window()
    for _ in range(load.num_requests):
        load.worker.submit(load.request())
    before = load.worker.scheduler.preemptions
    load.clock.restart()
    stamp, begin = load.core.stamp(), time.perf_counter()
    while load.worker.busy:
        window.step(load)
    window.seconds = time.perf_counter() - begin
    window.mhz = load.core.mhz(stamp, load.core.stamp())
    return _result(load, "whole", window, before)


def _steady(load: Load, max_seconds: float) -> dict[str, Any]:
    begin = time.perf_counter()
    first = _start_midway(load)
    while any(r.slot < 0 and not r.finish_reason for r in first) and load.worker.busy:
        _top_up(load)
        load.worker.step()
    for _ in range(WARM_STEPS):
        _top_up(load)
        load.worker.step()
    _until_one_ends(load, Window(), 0.0, max_seconds)
    window, before, warm = Window(), load.worker.scheduler.preemptions, time.perf_counter() - begin
    load.clock.restart()
    stamp = load.core.stamp()
    _until_one_ends(load, window, max_seconds, 2 * max_seconds)
    window.mhz = load.core.mhz(stamp, load.core.stamp())
    return {**_result(load, "steady", window, before), "warmup_seconds": warm}


def _until_one_ends(load: Load, window: Window, least: float, most: float) -> None:
    """Steps for `least` seconds and on until a request ends, for `most` if none does: with a window from one end to
    another, each of its requests brings one prompt along, however few they are."""
    begin = time.perf_counter()
    while True:
        ended = _ended(load)
        _top_up(load)
        window.step(load)
        window.seconds = time.perf_counter() - begin
        if window.seconds >= most or (window.seconds >= least and _ended(load) > ended):
            return


def _ended(load: Load) -> int:
    return load.worker.statistics.finished.total()


def _top_up(load: Load) -> None:
    while len(load.worker.scheduler.waiting) < QUEUED:
        load.worker.submit(load.request())


def _start_midway(load: Load) -> list[Request]:
    """Starts as many sequences as fit, of evenly spread ages, the oldest first; their past lies in the pool as if
    shared."""
    session, pool = load.llm.session, load.worker.pool
    ages = list(_ages(load, session, pool))
    requests = [load.request(age) for age in ages]
    for request in requests:
        full = (len(request.prompt) - 1) // pool.block_size
        extend_keys(request.keys, request.prompt, pool.block_size, full)
        blocks = pool.allocate(full)
        for block, key in zip(blocks, request.keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)
        load.worker.submit(request)
    return requests


def _ages(load: Load, session: Session, pool: BlockPool) -> Iterator[int]:
    """Tokens that each of the first sequences has generated: as many as the batch takes, as the pool holds with
    a block to spare for each, and as the prompts that a step has room for keep up. Of n sequences n / output_len end in
    a step, so n + n / output_len * input_len tokens of max_num_tokens are for them and for those that follow."""
    size, out, most = pool.block_size, load.output_len, session.limits.max_num_tokens
    count = min(load.max_batch_size, pool.free_blocks, max(1, most * out // (load.input_len + out)))
    while count > 1:
        ages = [out * (2 * i + 1) // (2 * count) for i in reversed(range(count))]
        need = sum(blocks_for(load.input_len + age + 1, size) + 1 for age in ages)
        if need <= pool.free_blocks:
            return iter(ages)
        count = min(count - 1, count * pool.free_blocks // need)
    return iter([0])


def _result(load: Load, measured: str, window: Window, preemptions: int) -> dict[str, Any]:
    steps, worker = max(window.steps, 1), load.worker
    return {
        "input_len": load.input_len, "output_len": load.output_len, "measured": measured,
        "requests": load.num_requests if measured == "whole" else None, "max_batch_size": load.max_batch_size,
        "output_tokens_per_second": window.tokens / window.seconds, "seconds": window.seconds,
        "computed_tokens_per_second": window.computed / window.seconds, "steps": window.steps,
        "ms_per_step": window.seconds / steps * 1e3, "host_ms_per_step": window.host / steps * 1e3,
        "wait_ms_per_step": window.wait / steps * 1e3, **load.clock.facts(), "mhz": window.mhz,
        "rows_per_step": window.rows / steps,
        "preemptions": worker.scheduler.preemptions - preemptions, "kv_blocks": worker.pool.num_blocks,
    }  # fmt: skip
