"""fp8-build: a checkpoint becomes an engine directory. Emit, rewrite, check, compile, place, write."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from fp8.builder import engine, joins, measure, pipeline, plan, report, taps, tune, weights
from fp8.builder.engine import Compatibility, Plan
from fp8.builder.graph import Graph
from fp8.builder.output import copy_beside
from fp8.builder.parallel import tensor
from fp8.builder.parallel.pipeline import Place
from fp8.builder.pattern import load_all
from fp8.builder.quantize import check_all_read
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.rewrite import apart
from fp8.builder.taps import Taps
from fp8.builder.target import Journal
from fp8.builder.verify import Verifier
from fp8.builder.workplace import BuildError, workplace


@dataclass
class Compiled:
    """An engine in memory, but for its weights."""

    graph: gs.Graph
    plan: Plan
    cubins: dict[str, bytes]
    constants: dict[str, gs.Constant]
    journal: Journal
    taps: Taps = field(default_factory=Taps)


def choose_taps(source: Source, request: Request, place: Place) -> tuple[Taps, frozenset[str]]:
    """The debug taps that the request asks for, and the tensors that no fusion may swallow. Raises TapError."""
    if request.debug_tensors is None:
        return Taps(), frozenset()
    limits = source.limits(request)

    def fused(kept: frozenset[str]) -> tuple[gs.Graph, dict[str, tuple[str, int, int]]]:
        parts: dict[str, tuple[str, int, int]] = {}
        graph = source.emit(limits, place)
        target = source.passes_target(request, place, kept=kept)
        pipeline.run(graph, target, lambda *done: parts.update(taps.columns(done[2])))
        return graph, parts

    emitted = source.emit(limits, place)
    if place.tp_size > 1:
        pipeline.tensor_parallel(emitted, source.passes_target(request, place))
    return taps.plan(emitted, request.debug_tensors, fused)


def fuse(
    source: Source, request: Request, reporter: Reporter, kept: frozenset[str] = frozenset(), place: Place | None = None
) -> tuple[Graph, Journal, list[report.Pair]]:
    """Emits the graph of a rank (default: the first) and runs the passes, dumping and verifying as asked."""
    place = place or request.place()
    limits = source.limits(request)
    graph = source.emit(limits, place)
    if place.pp_size == 1:  # else it is a part of the model
        check_all_read(source.checkpoint, graph, (".weight", ".bias"))
    pairs = report.pairs(graph)
    target = source.passes_target(request, place, Journal(explain=request.explain), kept)
    if request.explain:
        _check_explained(graph, request.explain)
    alone = place.world_size == 1  # several are verified together: `fp8.builder.parallel.ranks`
    verifier = (
        Verifier(graph, source.config.vocab_size, limits, source.format.rounds_to_fp8)
        if request.verify and alone
        else None
    )
    folder = request.dump_passes and (request.dump_passes if alone else request.dump_passes / f"rank{place.rank}")
    stages = itertools.count(1)

    def after(name: str, count: int, graph: gs.Graph) -> None:
        if folder:
            pipeline.dump(graph, folder, next(stages), name)
        text = f"pass {name}: {count} rewritten, {len(graph.nodes)} nodes left"
        reporter.remark(f"{text}, SQNR {verifier.check(name, graph):.1f} dB" if verifier else text)

    if folder:
        pipeline.dump(graph, folder, 0, "emit")
    pipeline.run(graph, target, after)
    return graph, target.journal, pairs


def _check_explained(graph: gs.Graph, name: str) -> None:
    names = [n.name for n in graph.nodes]
    if not any(n == name or n.startswith((f"{name}/", f"{name}.")) for n in names):
        near = difflib.get_close_matches(name, names, 3)
        raise BuildError(
            f"no node is named {name!r}"
            + (f"; there are {', '.join(near)}" if near else "; --dump_passes DIR lists them in 0_emit.txt")
        )


def explain(source: Source, request: Request, place: Place | None = None) -> list[str]:
    """Per pattern, one sentence: why it did or did not match at the node `request.explain`."""
    _, journal, _ = fuse(source, request, Reporter(), place=place)
    assert request.explain is not None
    lines = [f"{pattern}: {sentence}" for pattern, (_, sentence) in sorted(journal.attempts.items())]
    starts: dict[str, set[str]] = {}
    for variant in load_all():
        starts.setdefault(variant.pattern, set()).add(variant.root)
    for name in sorted(set(starts) - set(journal.attempts)):
        lines.append(f"{name}: begins with {' or '.join(sorted(starts[name]))}, and no such node leads here")
    homes = {p for p, originals in journal.replaced.items() if any(_named(o, request.explain) for o in originals)}
    return [*lines, f"taken by: {', '.join(sorted(homes)) or 'no plugin'} (of those that match, the largest)"]


def _named(node: str, wanted: str) -> bool:
    return any(n == wanted or n.startswith((f"{wanted}/", f"{wanted}.")) for n in apart(node))


def compile(
    source: Source, request: Request, reporter: Reporter, dry_run: bool = False, place: Place | None = None
) -> Compiled:
    """Everything but writing, of one rank (default: the first). Raises LegalityError before any kernel is compiled; a
    dry run stops there."""
    place = place or request.place()
    tapped, kept = choose_taps(source, request, place)
    graph, journal, pairs = fuse(source, request, reporter, kept, place)
    limits = source.limits(request)
    nodes = plan.nodes(graph)
    found = plan.buffers(graph)
    steps = plan.steps(nodes)
    cubins: dict[str, tune.Cubin] = {}
    joined: tuple[engine.Join, ...] = ()
    sums: tuple[engine.Sum, ...] = ()
    workspace, merged, unmerged = 0, None, ""
    if request.target != "cpu":
        plan.check(nodes)
        merged, unmerged = plan.merge(nodes, found)
        tactics = plan.Tactics(nodes, limits, merged)
        if dry_run:
            tactics.assume()
        else:
            measured = {}
            if request.tune:
                measured = measure.measure(tactics, _stage(reporter, "candidates"), reporter.remark, reporter.warn)
            tactics.choose(measured, _stage(reporter, "kernels"), reporter.warn)
        steps, merged, cubins = tactics.steps(), tactics.merged(), tactics.cubins()
        workspace = tactics.workspace_bytes
        if not dry_run:
            joined, more = joins.join(nodes, steps, _stage(reporter, "kernels"), reporter.warn)
            sums, summing = joins.add(nodes, steps, _stage(reporter, "kernels"), reporter.warn)
            cubins |= {**more, **summing}
    buffers, arena = plan.place(found, steps, limits, joins.early(nodes))
    constants = plan.constants(graph)
    if request.hollow:
        constants = {n: c for n, c in constants.items() if not (n.endswith(".weight") and len(c.shape) > 1)}
    version = importlib.metadata.version("fp8-engine")
    compatibility = Compatibility(
        engine.FORMAT_VERSION, version, request.target, place.rank, place.world_size, place.tp_size, place.pp_size
    )
    built = Plan(
        compatibility, source.info(request.dtype), limits, buffers, tuple(steps), arena, workspace, "",
        {k: tune.kernel_facts(c) for k, c in sorted(cubins.items())}, report.report(pairs, journal),
        tuple(tapped.taken), _share(source, graph, place), joined, merged, unmerged, sums,
    )  # fmt: skip
    return Compiled(graph, built, {k: c.code for k, c in cubins.items()}, constants, journal, tapped)


def _stage(reporter: Reporter, name: str) -> Callable[[int, int], None]:
    return lambda done, total: reporter.progress(name, done, total)


def _share(source: Source, graph: Graph, place: Place) -> engine.Share | None:
    if place.world_size == 1:
        return None
    layers = place.layers(source.config.num_layers)
    columns: dict[str, int] = {}
    for name, axes in graph.axes.items():
        columns |= dict(zip(axes, source.checkpoint.entry(name).shape, strict=True))
    if place.stage < place.pp_size - 1:
        columns.pop("vocab", None)  # lm_head is in the last stage; the table of embeddings is on every rank whole
    return engine.Share((layers.start, layers.stop), tensor.shares(columns, source.tensor_parallel(place)))


def write(compiled: Compiled, source: Source, output: Path, reporter: Reporter) -> Plan:
    """Writes the directory of a one-rank engine, all of it or nothing. Raises BuildError if `output` is something else
    already."""
    with workplace(output) as partial:
        built = write_rank(compiled, partial, reporter)
        write_common([built], source, partial)
    return built


def write_rank(compiled: Compiled, directory: Path, reporter: Reporter) -> Plan:
    """Writes one rank's two files."""
    total = sum(weights.size(c) for c in compiled.constants.values())
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        reporter.progress("weights", done, total)

    name = f"rank{compiled.plan.compatibility.rank}"
    digest = weights.write(directory / f"{name}.safetensors", compiled.constants.values(), progress)
    built = dataclasses.replace(compiled.plan, weights_digest=digest)
    engine.write_atomically(directory / f"{name}.engine", [engine.engine_bytes(built, compiled.cubins)])
    return built


def write_common(plans: Sequence[Plan], source: Source, directory: Path) -> None:
    """Writes what all ranks share: config.json, which says how the model is divided, and the tokenizer."""
    facts: dict[str, Any] = {k: dataclasses.asdict(getattr(plans[0], k)) for k in ("compatibility", "model", "limits")}
    if len(plans) > 1:
        facts["ranks"] = [{**dataclasses.asdict(p.share), "weights_digest": p.weights_digest} for p in plans if p.share]
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    engine.write_atomically(directory / "config.json", [text.encode()])
    copy_beside(source.checkpoint, directory)
