"""fp8-bench host: what the host does in a step, without a device: scheduling, packing, taking tokens in."""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fp8.builder.engine import Limits
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.policy import POLICIES
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.sampling_options import History, options_of
from fp8.runtime.scheduler import Row
from fp8.runtime.step_inputs import Packer, layout
from fp8.runtime.worker import Worker
from fp8.scripts.benchmarks.arguments import random_tokens
from fp8.scripts.run import positive

VOCABULARY, USERS = 32000, 16


class HostSession:
    """Does of a session what needs no device; every token is 7."""

    def __init__(self, limits: Limits, num_blocks: int) -> None:
        self.limits, self.num_blocks = limits, num_blocks
        self.device = SimpleNamespace(type="cuda")  # so that the worker runs one step ahead
        self.stages = 1
        self._packer, self._history = Packer(limits), History()
        self._host = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(limits).items()}

    def enqueue(self, rows: Sequence[Row], copies: Mapping[int, int] | None = None) -> SimpleNamespace:
        shape, options = self._packer.pack(rows, self._host), options_of(rows, self._history)
        return SimpleNamespace(rows=rows, count=shape.logits_rows, options=options, wants_logprobs=False)

    def read(self, ticket: SimpleNamespace) -> list[int]:
        return [7] * ticket.count

    def read_logprobs(self, ticket: SimpleNamespace) -> list[None]:
        return [None] * ticket.count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch_size", type=positive, nargs="+", default=[64, 512, 1024], help="sequences at the same time"
    )
    parser.add_argument("--input_len", type=positive, default=128, help="tokens of each prompt")
    parser.add_argument("--output_len", type=positive, default=128, help="tokens of each output")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="throughput", help="how requests share a step")
    parser.add_argument(
        "--num_requests", type=positive, help="requests in the queue at the start (default: 4 x batch_size)"
    )
    parser.add_argument("--max_num_tokens", type=positive, default=8192, help="tokens per step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random prompts")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per batch size: medians over the steps that only decode, and the mean over all."""
    gc.collect()
    gc.freeze()  # as the commands that serve do once the engine is loaded
    return [_measure(args, batch) for batch in args.batch_size], {}


def _measure(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    longest = args.input_len + args.output_len
    limits = Limits(batch, longest, max(args.max_num_tokens, batch))
    session = HostSession(limits, batch * (blocks_for(longest, limits.block_size) + 1))
    worker = Worker(session, policy=POLICIES[args.policy]())  # type: ignore[arg-type]
    source, params = random.Random(args.seed), SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    for i in range(args.num_requests or 4 * batch):
        prompt = random_tokens(source, args.input_len, VOCABULARY)
        worker.submit(Request(i, prompt, params, args.output_len, user=str(i % USERS)))
    steps, took = [], []
    while worker.busy:
        begin = time.perf_counter()
        worker.step()
        took.append((time.perf_counter() - begin) * 1e3)
        steps.append(worker.statistics.steps[-1])
    full = [i for i, s in enumerate(steps) if s.rows == s.decode_rows == batch]

    def median(times: Sequence[float]) -> float | None:
        return statistics.median(times[i] for i in full) if full else None

    parts = {
        f"{name}_ms": median([getattr(s, f"{name}_seconds") * 1e3 for s in steps])
        for name in ("schedule", "enqueue", "read")
    }
    return {
        "batch_size": batch, "steps": len(steps), "decode_steps": len(full), "decode_ms": median(took), **parts,
        "mean_ms_of_all_steps": statistics.mean(took), "longest_ms": max(took),
    }  # fmt: skip
