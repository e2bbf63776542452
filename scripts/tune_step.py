"""Chooses the tactics of a decode step's linears in their place: in the whole step, among the kernels around them.

    python -m fp8.scripts.tune_step --engine_dir ENGINE --output builder/tactics_h200.json
    python -m fp8.scripts.tune_step --engine_dir 7B --also 8B --kv_cache_free_gpu_memory_fraction 0.4 \\
        --batch_size 1 8 16 32 64 --output builder/tactics_h200.json
    mpirun -n 2 python -m fp8.scripts.tune_step --engine_dir ENGINE_OF_2_RANKS --output builder/tactics_h200.json

tune_table times launches of one linear in a row. In a step a linear's first weights arrive while other kernels are at
work, as far as shared memory has room beside their blocks: what is fastest there depends on the neighbours. So here one
linear of all layers takes another tactic, and the step with it, a CUDA graph, takes turns with the step so far; what is
faster stays, linear by linear, until nothing is. At last each change is held against what was there once more, and
against the reference. The choices go into the table, each for the rows that it was made for. An engine of a few layers
will do (python -m fp8.scripts.random_engine --num_layers 8).

Batch sizes that an engine has one tactic for (2 to 8, for instance) are tuned together, for the sum of their steps. So
are linears that several engines have (--also): the table has one tactic for all of them.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8.builder import tactic_table
from fp8.builder.engine import EngineError
from fp8.builder.tactic_table import Entry, TableError, digest_of_kernels, digest_of_tactics
from fp8.builder.tune import Site, tactic_fields
from fp8.plugins.base import PluginError, StepShape
from fp8.runtime.launcher import RankError
from fp8.runtime.sampling_params import RequestError
from fp8.runtime.session import Session
from fp8.scripts.argument_types import new_file, positive
from fp8.scripts.benchmarks.arguments import add_engine_arguments, fill_cache
from fp8.scripts.benchmarks.case_buffers import Functions
from fp8.scripts.benchmarks.roofline import step_rows
from fp8.scripts.in_place import LINEARS, InPlace, State, Together
from fp8.scripts.ranks import among_peers
from fp8.scripts.step_search import SURE, descend, race, settled

Found = dict[Site, tuple[Any, float]]  # tactics, and their microseconds alone


def tuned(steps: Together, end: float, tell: bool) -> Found:
    """The tactics that the steps are fastest with, of linears that have others now."""
    first = steps.places[0]
    start = steps.chosen()
    offers = {label: steps.offers(label) for label in steps.sites}
    state = descend(start, offers, steps.gains, lambda: first.exchange(time.monotonic()) > end)
    worth = settled(start, _right(steps, start, state), steps.sure)
    final = {label: state[label] if label in worth else start[label] for label in start}
    found = {steps.sites[label]: (final[label], steps.alone(label, final[label])) for label in worth}
    for place in steps.places:
        sizes, before, less = ", ".join(str(shape.tokens) for shape in place.shapes), *_compared(place, start, final)
        if tell:
            print(f"{_model(place.session)}: steps of {sizes} took {before:.1f} us, now {less:.1f} less", flush=True)
    for (site, (tactic, us)), gain in zip(found.items(), worth.values(), strict=True):
        if tell:
            what = f"{site.module}, up to {site.max_tokens} rows: {json.dumps(tactic_fields(tactic))}"
            print(f"{what}: {gain:.1f} us less, {us:.2f} us alone", flush=True)
    return found


def _compared(place: InPlace, start: State, final: State) -> tuple[float, float]:
    """Microseconds of an engine's steps, and what they take less in the end."""
    (less,) = race(0, [1], lambda new: place.seconds(final if new else start), SURE).values()
    before = place.seconds(start)
    place.forget()
    return before, less


def _right(steps: Together, start: State, state: State) -> dict[str, Any]:
    """`state` without what the reference contradicts."""
    right = dict(state)
    for label in [label for label in state if state[label] != start[label]]:
        why = steps.wrong(label, state[label])
        if why is not None:
            module = steps.sites[label].module
            print(f"tune_step: {module} keeps its tactic, as {state[label]} is wrong: {why}", file=sys.stderr)
            right[label] = start[label]
    return right


def _model(session: Session) -> str:
    model = session.model
    return f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads}/{model.num_kv_heads} heads"


def together(sessions: Sequence[Session], sizes: Sequence[int]) -> list[list[int]]:
    """Batch sizes in order, in groups that the engines' linears have one tactic for."""
    steps = (step for session in sessions for step in session.plan.steps if step.plugin in LINEARS)
    ends = sorted({c.max_tokens for step in steps for c in step.tactics})
    return [list(group) for _, group in itertools.groupby(sorted(set(sizes)), lambda n: bisect.bisect_left(ends, n))]


def put(output: Path, found: Mapping[Site, tuple[Any, float]]) -> None:
    """Into the table, with the favourites that they won against. Raises TableError."""
    table = tactic_table.read(output) if output.exists() else tactic_table.Table()
    for site, (tactic, us) in found.items():
        kernels = digest_of_kernels(k for t in site.favourites for k in site.kernels(t))
        entry = Entry(tactic_fields(tactic), us, digest_of_tactics(site.favourites), kernels)
        table.put(site.op, site.max_tokens, entry)
    tactic_table.write(output, table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "python -m fp8.scripts.tune_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(p)
    p.add_argument("--also", nargs="+", default=[], metavar="ENGINE_DIR", help="engines whose steps are tuned as well")
    p.add_argument("--output", type=new_file, required=True, help="the table that the choices go into")
    p.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="sequences of the steps")
    p.add_argument("--context_len", type=positive, default=1088, help="of each of them")
    p.add_argument("--max_seconds", type=float, default=60.0, help="stop then, and write what is found (60)")
    return p.parse_args(argv)


def opened(args: argparse.Namespace) -> list[Session]:
    """Raises EngineError."""
    if args.also and args.world is not None:
        raise EngineError("--also takes engines of one rank, and this is one of several")
    sessions = []
    for directory in (args.engine_dir, *args.also):
        memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
        session = Session(directory, args.device, *memory, world=args.world, make_weight=args.make_weight)
        if session.device.type != "cuda" or session.stages > 1:
            raise EngineError("tactics are timed on a GPU, in an engine of one pipeline stage")
        fill_cache(session)
        sessions.append(session)
    return sessions


def run(args: argparse.Namespace) -> int:
    import torch

    begin, functions = time.monotonic(), Functions()
    tell = args.world is None or args.world.rank == 0
    try:
        sessions = opened(args)
        groups = together(sessions, args.batch_size)
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
            for left, sizes in zip(range(len(groups), 0, -1), groups, strict=True):
                end = time.monotonic() + (begin + args.max_seconds - time.monotonic()) / left
                places = [InPlace(session, shapes_of(session, sizes, args), functions) for session in sessions]
                found = tuned(Together(places), end, tell)
                if tell:
                    put(args.output, found)
    except (EngineError, OSError, PluginError, RankError, RequestError, TableError) as error:
        print(f"tune_step: {error}", file=sys.stderr)
        return 1
    return 0


def shapes_of(session: Session, sizes: Sequence[int], args: argparse.Namespace) -> tuple[StepShape, ...]:
    """The largest comes last, and begins with the others' rows. Raises RequestError."""
    rows = [step_rows(session, [(args.context_len, 1)] * n, args.seed) for n in sizes]
    return tuple(session.probing.place(r) for r in rows)


def main(argv: Sequence[str] | None = None) -> int:
    return among_peers("tune_step", parse(argv), lambda args, _: run(args))


if __name__ == "__main__":
    sys.exit(main())
