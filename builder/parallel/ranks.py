"""The engine directory of several ranks, one rank after the other."""

from __future__ import annotations

from pathlib import Path

from fp8.builder import build
from fp8.builder.build import Reporter, Request, Source
from fp8.builder.engine import Plan
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
