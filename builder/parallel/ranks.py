"""The engine directory of several ranks: built side by side, verified together, written all or nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8.builder import budget, build, pipeline
from fp8.builder.engine import Plan, unwritable
from fp8.builder.parallel import workers
from fp8.builder.parallel.pipeline import Place
from fp8.builder.parallel.workers import Tell
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.verify import Verifier
from fp8.builder.workplace import BuildError, workplace
from fp8.plugins import base

Open = Callable[[], Source]  # opens the checkpoint, in whatever process; picklable


@dataclass(frozen=True)
class Built:
    """One rank's engine, on disk but for a dry run."""

    plan: Plan
    remarks: list[str]  # on debug tensors


def build_ranks(
    open_source: Open,
    request: Request,
    output: Path,
    reporter: Reporter,
    side_by_side: int = 1,
    expected: tuple[type[Exception], ...] = (),
) -> list[Built]:
    """Builds and writes every rank, or nothing; so many at a time, each in a process that reads its own slices of the
    weights. `expected` are the errors that are reported as they are."""
    if side_by_side < 1:
        raise BuildError(f"workers is {side_by_side}, expected at least 1")
    if side_by_side > 1 and request.tune:
        raise BuildError("--tune times kernels, which ranks built beside would disturb; build with --workers 1")
    source = open_source()
    request.place().layers(source.config.num_layers)  # refused here, before any process is started
    if request.target != "cpu":  # the last rank has the remainders, which a kernel may not take
        plain = dataclasses.replace(request, verify=False, dump_passes=None)
        build.compile(source, plain, Reporter(), dry_run=True, place=request.places[-1])
    if request.verify:
        verify_ranks(source, request, reporter)
        request = dataclasses.replace(request, verify=False)
    with workplace(output) as partial:
        tasks = [functools.partial(_build, open_source, request, place, partial) for place in request.places]
        if side_by_side == 1:
            built = [task(functools.partial(_hear, reporter, rank)) for rank, task in enumerate(tasks)]
        else:
            built = workers.run(tasks, side_by_side, functools.partial(_hear, reporter), expected)
        plans = [b.plan for b in built]
        check_collectives(plans, request.tp_size)
        build.write_common(plans, source, partial)
    return built


def dry_run(source: Source, request: Request, reporter: Reporter) -> list[Built]:
    """Checks and places every rank; compiles and writes nothing."""
    found = []
    for done, place in enumerate(request.places, 1):
        compiled = build.compile(source, request, _of_rank(reporter, place.rank), dry_run=True, place=place)
        found.append(Built(compiled.plan, compiled.taps.lines() if compiled.taps.taken else []))
        reporter.progress("ranks", done, len(request.places))
    return found


def largest(plans: Sequence[Plan]) -> Plan:
    """The rank that needs most memory, with one full sequence for every place of the batch."""

    def need(plan: Plan) -> int:
        taken, limits = budget.of(plan), plan.limits
        blocks = limits.sequence_blocks * limits.max_batch_size
        return taken.fixed + taken.kv_block * blocks

    return max(plans, key=need)


def _build(open_source: Open, request: Request, place: Place, directory: Path, tell: Tell) -> Built:
    reporter = Reporter(
        lambda *values: tell("progress", *values), lambda text: tell("remark", text), lambda text: tell("warn", text)
    )
    compiled = build.compile(open_source(), request, reporter, place=place)
    lines = compiled.taps.lines() if compiled.taps.taken else []
    try:
        return Built(build.write_rank(compiled, directory, reporter), lines)
    except OSError as error:  # in a process of its own, where it would be told with a traceback
        raise BuildError(unwritable(directory, error)) from error


def _hear(reporter: Reporter, rank: int, kind: str, *values: object) -> None:
    getattr(_of_rank(reporter, rank), kind)(*values)


def _of_rank(reporter: Reporter, rank: int) -> Reporter:
    return Reporter(
        lambda stage, done, total: reporter.progress(f"rank {rank} {stage}", done, total),
        lambda text: reporter.remark(f"rank {rank}: {text}"),
        lambda text: reporter.warn(f"rank {rank}: {text}"),
    )


def check_collectives(plans: Sequence[Plan], tp_size: int) -> None:
    """Raises BuildError if two ranks of a stage would not meet: all have the same collectives in the same order."""

    def collectives(plan: Plan) -> list[tuple]:
        return [(s.name, s.plugin, s.attributes) for s in plan.steps if base.load(s.plugin).collective]

    for first in range(0, len(plans), tp_size):
        wanted = collectives(plans[first])
        for rank in range(first + 1, first + tp_size):
            pairs = zip(wanted, collectives(plans[rank]), strict=False)
            differ = next((a[0] for a, b in pairs if a != b), "the last one")
            if collectives(plans[rank]) != wanted:
                raise BuildError(f"ranks {first} and {rank} part at the collective {differ}: please report this")


def verify_ranks(source: Source, request: Request, reporter: Reporter) -> None:
    """Interprets the whole model and, after every pass, the graphs of all ranks together. Raises VerificationError."""
    limits = source.limits(request)
    verifier = Verifier(source.emit(limits), source.config.vocab_size, limits, source.format.rounds_to_fp8)
    graphs = [source.emit(limits, place) for place in request.places]
    targets = [source.passes_target(request, place) for place in request.places]
    for rewrite in pipeline.passes(targets[0]):
        counts = [rewrite(graph, target) for graph, target in zip(graphs, targets, strict=True)]
        name = rewrite.__name__
        found = verifier.check(name, *graphs, tp_size=request.tp_size, bound=pipeline.LOSSY.get(name))
        reporter.remark(f"pass {name}: {sum(counts)} rewritten in {len(graphs)} ranks, SQNR {found:.1f} dB")
