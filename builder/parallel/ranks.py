"""The engine directory of several ranks, and the verification of all of them together."""

from __future__ import annotations

from pathlib import Path

from fp8.builder import build, pipeline
from fp8.builder.build import Reporter, Request, Source
from fp8.builder.engine import Plan
from fp8.builder.verify import Verifier
from fp8.builder.workplace import workplace


def build_ranks(source: Source, request: Request, output: Path, reporter: Reporter) -> list[Plan]:
    """Builds and writes every rank, all of them or nothing."""
    with workplace(output) as partial:
        plans = [
            build.write_rank(build.compile(source, request, reporter, place=place), partial, reporter)
            for place in request.places
        ]
        build.write_common(plans, source, partial)
    return plans


def verify_ranks(source: Source, request: Request, reporter: Reporter) -> None:
    """Interprets the whole model and, after every pass, the graphs of all ranks together. Raises VerificationError."""
    limits = source.limits(request)
    verifier = Verifier(source.emit(limits), source.config.vocab_size, limits, source.format.rounds_to_fp8)
    graphs = [source.emit(limits, place) for place in request.places]
    targets = [source.passes_target(request, place) for place in request.places]
    for rewrite in pipeline.passes(targets[0]):
        counts = [rewrite(graph, target) for graph, target in zip(graphs, targets, strict=True)]
        found = verifier.check(rewrite.__name__, *graphs, tp_size=request.tp_size)
        reporter.remark(f"pass {rewrite.__name__}: {sum(counts)} rewritten in {len(graphs)} ranks, SQNR {found:.1f} dB")
