"""Whole steps of wide models among several GPUs: each way in which ranks launch and add up gives the same logits.

    python -m fp8.scripts.random_engine --model llama-2-70b --num_layers 4 --kv_cache_dtype fp8 --tp_size 2 \\
        --max_seq_len 2048 --output_dir 70b
    mpirun -n 2 python -m fp8.scripts.gpu_wide --output wide.json 70b

One step of prompts, then decode steps of 1, 8 and 16 of them, replayed as CUDA graphs as in serving, each step several
times: by one launch for all layers where there is one; by a launch for each kernel, to which ranks' rows come through
peer memory; through NCCL, where no kernel starts to write before the one before it has ended. Asked for, in every
step and row: the same bits each time, on all ranks, all of them finite; and as near to NCCL's as executions are whose
sums differ in their order. A place that is written while another kernel still reads it shows in all three. Exits with 1
if what is asked for is missed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fp8.builder.engine import EngineError
from fp8.plugins.base import StepShape
from fp8.plugins.timing import captured
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts.argument_types import new_file, positive
from fp8.scripts.benchmarks.arguments import make_weight, random_tokens
from fp8.scripts.benchmarks.rank_targets import NEAR_NCCL
from fp8.scripts.provenance import add_argument, save_results
from fp8.scripts.ranks import OPENING_ERRORS, add_rank_arguments, among_peers

if TYPE_CHECKING:
    import torch

    from fp8.runtime.compiled import CompiledExecutor

BATCHES = (1, 8, 16)  # one launch; rows that linears send; rows that the sum's own kernel fetches
LENGTHS = (1000, 1, 65, 300, 128, 63, 700, 64, 17, 129, 256, 40, 511, 90, 33, 200)  # tokens of the prompts
NCCL, APART, TOGETHER = "nccl", "launches", "one launch"
NEEDED_DB = NEAR_NCCL  # of every row: codes of e4m3 flip where sums differ in their order (15.3 at least was seen); a
# wrong row has 0 or less
COLUMNS = ("step", "way", "steps", "not_finite", "unsteady", "ranks_differ", "same_bits", "worst_db", "met")


@dataclass
class Steps:
    """What one way gives in one kind of step: logits f32 [steps, rows, V] of the first time, and in how many steps
    another time gave other bits."""

    logits: torch.Tensor
    unsteady: int


def worst_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The least SQNR of a row [..., V], in dB: -inf where a value of either is not finite, inf where all are equal."""
    import torch

    if not torch.isfinite(found).all() or not torch.isfinite(expected).all():
        return float("-inf")
    signal, noise = expected.square().sum(-1), (found - expected).square().sum(-1)
    return float((10 * torch.log10(signal / noise)).nan_to_num(nan=float("inf"), posinf=float("inf")).min())


def verdict(found: Steps, base: Steps, ranks_differ: bool) -> dict[str, Any]:
    """The figures of a row, and whether they are as asked for."""
    import torch

    finite = torch.isfinite(found.logits).flatten(1).all(1)
    same = (found.logits == base.logits).flatten(1).all(1)
    row: dict[str, Any] = {
        "steps": len(found.logits), "not_finite": int((~finite).sum()), "unsteady": found.unsteady,
        "ranks_differ": ranks_differ, "same_bits": int(same.sum()), "worst_db": worst_db(found.logits, base.logits),
        "needed_db": NEEDED_DB,
    }  # fmt: skip
    row["met"] = not (row["not_finite"] or found.unsteady or ranks_differ) and row["worst_db"] >= NEEDED_DB
    return row


class Model:
    """One engine's session, and the ways through it."""

    def __init__(self, session: Session, steps: int, times: int) -> None:
        self.session, self.steps, self.times = session, steps, times
        self.requests = _requests(session, steps)

    def ways(self) -> Iterator[tuple[str, CompiledExecutor]]:
        """NCCL first."""
        yield NCCL, self.session.another_executor(peer_memory=False)
        apart = self.session.another_executor()
        apart.launch_apart()
        yield APART, apart
        executor: Any = self.session.executor
        if executor.one_launch:
            yield TOGETHER, executor

    def kinds(self) -> dict[str, list[list[Row]]]:
        """The steps of each kind, in order."""
        order = sorted(self.requests, key=lambda r: len(r.prompt) > self.steps + 1)  # single tokens come first
        prompt = [Row(r, 0, len(r.prompt) - self.steps, True, 0) for r in order]
        found = {f"{sum(LENGTHS)} of prompts": [prompt]}
        for batch in BATCHES:
            chosen = self.requests[:batch]
            found[f"decode {batch}"] = [
                [Row(r, len(r.prompt) - self.steps + i, 1, True, 0) for r in chosen] for i in range(self.steps)
            ]
        return found

    def run(self, executor: CompiledExecutor, steps: Sequence[Sequence[Row]]) -> Steps:
        """Each step several times: it writes the same K and V to the same places. Prompts run as they are, decode steps
        as graphs."""
        import torch

        graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        kept, unsteady = [], 0
        for rows in steps:
            shape = self.session.probing.place(rows)
            launch: Callable[[], object] = partial(executor.run, shape)
            if shape.decode_sequences == shape.sequences:
                if shape not in graphs:
                    graphs[shape] = captured([launch])
                launch = graphs[shape].replay
            found = []
            for _ in range(self.times):
                launch()
                found.append(executor.result[: len(rows)].clone())
            kept.append(found[0])
            bits = [logits.view(torch.int32) for logits in found]
            unsteady += not all(torch.equal(bits[0], other) for other in bits[1:])
        return Steps(torch.stack(kept), unsteady)


def _requests(session: Session, steps: int) -> list[Request]:
    """Raises RequestError for an engine that is too small for them."""
    limits, source = session.limits, random.Random(0)
    longest, batch = max(LENGTHS) + steps, max(BATCHES)
    fits = limits.max_seq_len >= longest and limits.max_batch_size >= batch and limits.max_num_tokens >= sum(LENGTHS)
    blocks = [blocks_for(n + steps, limits.block_size) for n in LENGTHS]
    if not fits or session.num_blocks < sum(blocks):
        raise RequestError(
            f"the engine has max_seq_len {limits.max_seq_len}, max_batch_size {limits.max_batch_size}, max_num_tokens "
            f"{limits.max_num_tokens} and {session.num_blocks} KV blocks, expected at least {longest}, {batch}, "
            f"{sum(LENGTHS)} and {sum(blocks)}"
        )
    found: list[Request] = []
    for i, (length, count) in enumerate(zip(LENGTHS, blocks, strict=True)):
        first = sum(blocks[:i])
        prompt = random_tokens(source, length + steps, session.model.vocab_size)
        found.append(Request(i, prompt, SamplingParams(), 1, blocks=list(range(first, first + count)), slot=i))
    return found


def compare(args: argparse.Namespace, directory: str) -> list[dict[str, Any]]:
    """A row for each way and kind of step, on all ranks."""
    import torch

    world = args.world
    session = Session(directory, args.device, blocks_needed(args.steps), world=world, make_weight=make_weight)
    if session.device.type != "cuda" or session.stages > 1:
        raise EngineError(f"{directory}: steps are compared on GPUs, in an engine of one pipeline stage")
    model, tp_size = Model(session, args.steps, args.times), session.plan.compatibility.tp_size
    rows: list[dict[str, Any]] = []
    base: dict[str, Steps] = {}
    with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
        for way, executor in model.ways():
            for kind, steps in model.kinds().items():
                world.begin(f"{kind} by {way} of {directory}")
                found = model.run(executor, steps)
                told = world.exchange(str(int(found.logits.view(torch.int32).long().sum())))
                row = verdict(found, base.setdefault(kind, found), len(set(told)) > 1)
                row["met"] = all(text == "True" for text in world.exchange(str(row["met"])))
                rows.append({"engine": directory, "tp_size": tp_size, "step": kind, "way": way, **row})
    world.rest()
    return rows


def blocks_needed(steps: int, block_size: int = 64) -> int:
    return sum(blocks_for(n + steps, block_size) for n in LENGTHS) + 16


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    if args.world is None:
        print("gpu_wide: start it with mpirun -n RANKS", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    leads = args.world.rank == 0
    try:
        for directory in args.engines:
            begin = time.monotonic()
            rows += compare(args, directory)
            if leads:
                print(f"{directory}: {time.monotonic() - begin:.1f} s", flush=True)
    except (*OPENING_ERRORS, RequestError) as error:
        print(f"gpu_wide: rank {args.world.rank}: {error}", file=sys.stderr)
        return 1
    if leads:
        table = Table("engine", *(name.replace("_", " ") for name in COLUMNS), box=None)
        for row in rows:
            table.add_row(row["engine"], *(f"{v:.1f}" if isinstance(v := row[c], float) else str(v) for c in COLUMNS))
        Console(width=160).print(table)
        if args.output:
            save_results(args.output, "gpu_wide", argv, args.commit, {"rows": [_json(row) for row in rows]})
    return 0 if all(row["met"] for row in rows) else 1


def _json(row: dict[str, Any]) -> dict[str, Any]:
    """The row without infinities, which JSON does not have."""
    worst = row["worst_db"]
    return row | {"worst_db": max(-300.0, min(300.0, worst))}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m fp8.scripts.gpu_wide", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("engines", nargs="+", metavar="ENGINE_DIR", help="of several ranks; random_engine makes them")
    p.add_argument("--device", default="auto", help="auto (default), cuda")
    p.add_argument("--steps", type=positive, default=40, help="of decoding, of each batch size (40)")
    p.add_argument("--times", type=positive, default=4, help="that each step runs (4)")
    p.add_argument("--output", type=new_file, help="write the rows as JSON")
    add_rank_arguments(p)
    add_argument(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    return among_peers("gpu_wide", parser().parse_args(argv), lambda args, _: run(args, argv))


if __name__ == "__main__":
    sys.exit(main())
