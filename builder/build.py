"""fp8-build: a checkpoint becomes an engine directory. Emit, rewrite, check, compile, place, write."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from fp8.builder import engine, measure, memory, pipeline, plan, report, taps, tune, weights
from fp8.builder.checkpoint import Checkpoint, read_json
from fp8.builder.engine import Compatibility, Limits, ModelInfo, Plan
from fp8.builder.formats.base import Format
from fp8.builder.graph import Graph
from fp8.builder.pattern import load_all
from fp8.builder.quantization_config import read_dtype, read_format
from fp8.builder.quantize import COPIED, Model
from fp8.builder.rewrite import apart
from fp8.builder.taps import Taps
from fp8.builder.target import TARGETS, Journal, Target
from fp8.builder.verify import Verifier


class BuildError(ValueError):
    """A flag or a directory with which no engine can be built: what was found, what is expected."""


@dataclass(frozen=True)
class Reporter:
    """Where progress goes: (stage, done, total), remarks and warnings."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    remark: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Request:
    """What to build. Without `max_seq_len` it is the model's."""

    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    target: str = "sm_90a"
    verify: bool = False
    tune: bool = False
    dump_passes: Path | None = None
    explain: str | None = None
    debug_tensors: tuple[str, ...] | None = None  # globs; None: no debug output

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BuildError(f"target {self.target!r} is not known; expected {' or '.join(TARGETS)}")
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}, expected at least 1")
        if self.max_num_tokens < self.max_batch_size:
            raise BuildError(
                f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}: a step of one "
                "token per sequence would not fit"
            )


@dataclass
class Source:
    """A checkpoint with what it says of itself."""

    model: Model
    checkpoint: Checkpoint
    format: Format = field(init=False)
    dtype: str = field(init=False)
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.model.read_config(self.checkpoint.config)
        self.format = read_format(self.checkpoint.config)
        dtype = self.format.dtype or read_dtype(self.checkpoint.config)
        self.dtype = "bfloat16" if dtype == "float32" else dtype  # the kernels' activations have 16 bits

    def limits(self, request: Request) -> Limits:
        """Raises BuildError if max_seq_len exceeds the model's."""
        most = self.config.max_position_embeddings
        wanted = request.max_seq_len or most
        if wanted > most:
            raise BuildError(
                f"max_seq_len {wanted} exceeds the model's max_position_embeddings {most}; rotary positions beyond it "
                "were never trained"
            )
        return Limits(request.max_batch_size, wanted, request.max_num_tokens)

    def emit(self, limits: Limits) -> Graph:
        return self.model.emit(self.config, self.checkpoint, self.format, self.dtype, max_positions=limits.max_seq_len)

    def info(self) -> ModelInfo:
        c, raw = self.config, self.checkpoint.config
        path = self.checkpoint.directory / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        kv_dtype = "float8_e4m3fn" if self.format.fp8_kv_cache else self.dtype
        return ModelInfo(
            raw["model_type"], self.dtype, self.format.name, c.vocab_size, c.num_layers, c.num_heads, c.num_kv_heads,
            c.head_dim, c.hidden_size, c.max_position_embeddings, kv_dtype, raw.get("bos_token_id"), tuple(ids),
        )  # fmt: skip


@dataclass
class Compiled:
    """An engine in memory, but for its weights."""

    graph: gs.Graph
    plan: Plan
    cubins: dict[str, bytes]
    constants: dict[str, gs.Constant]
    journal: Journal
    taps: Taps = field(default_factory=Taps)


def choose_taps(source: Source, request: Request) -> tuple[Taps, frozenset[str]]:
    """The debug taps that the request asks for, and the tensors that no fusion may swallow. Raises TapError."""
    if request.debug_tensors is None:
        return Taps(), frozenset()
    limits = source.limits(request)

    def fused(kept: frozenset[str]) -> tuple[gs.Graph, dict[str, tuple[str, int, int]]]:
        parts: dict[str, tuple[str, int, int]] = {}
        graph = source.emit(limits)
        pipeline.run(
            graph, Target(request.target, limits, kept=kept), lambda *done: parts.update(taps.columns(done[2]))
        )
        return graph, parts

    return taps.plan(source.emit(limits), request.debug_tensors, fused)


def fuse(
    source: Source, request: Request, reporter: Reporter, kept: frozenset[str] = frozenset()
) -> tuple[Graph, Journal, list[report.Pair]]:
    """Emits the graph and runs the passes, dumping and verifying as asked."""
    limits = source.limits(request)
    graph = source.emit(limits)
    pairs = report.pairs(graph)
    target = Target(request.target, limits, Journal(explain=request.explain), kept)
    if request.explain:
        _check_explained(graph, request.explain)
    quantized = source.format.scheme is not None or source.format.fp8_kv_cache
    verifier = Verifier(graph, source.config.vocab_size, limits, quantized) if request.verify else None
    stages = itertools.count(1)

    def after(name: str, count: int, graph: gs.Graph) -> None:
        if request.dump_passes:
            pipeline.dump(graph, request.dump_passes, next(stages), name)
        text = f"pass {name}: {count} rewritten, {len(graph.nodes)} nodes left"
        reporter.remark(f"{text}, SQNR {verifier.check(name, graph):.1f} dB" if verifier else text)

    if request.dump_passes:
        pipeline.dump(graph, request.dump_passes, 0, "emit")
    pipeline.run(graph, target, after)
    return graph, target.journal, pairs


def _check_explained(graph: gs.Graph, name: str) -> None:
    names = [n.name for n in graph.nodes]
    if not any(n == name or n.startswith((f"{name}/", f"{name}.")) for n in names):
        near = difflib.get_close_matches(name, names, 3)
        raise BuildError(f"no node is named {name!r}" + (f"; there are {', '.join(near)}" if near else ""))


def explain(source: Source, request: Request) -> list[str]:
    """Per pattern, one sentence: why it did or did not match at the node `request.explain`."""
    _, journal, _ = fuse(source, request, Reporter())
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


def compile(source: Source, request: Request, reporter: Reporter, dry_run: bool = False) -> Compiled:
    """Everything but writing. Raises LegalityError before any kernel is compiled; a dry run stops there."""
    tapped, kept = choose_taps(source, request)
    graph, journal, pairs = fuse(source, request, reporter, kept)
    limits = source.limits(request)
    nodes = plan.nodes(graph)
    found = plan.buffers(graph)
    steps = plan.steps(nodes)
    cubins: dict[str, tune.Cubin] = {}
    workspace = 0
    if request.target != "cpu":
        plan.check(nodes)
        tactics = plan.Tactics(nodes, limits)
        if dry_run:
            tactics.assume()
        else:
            measured = {}
            if request.tune:
                measured = measure.measure(tactics, _stage(reporter, "candidates"), reporter.remark, reporter.warn)
            tactics.choose(measured, _stage(reporter, "kernels"), reporter.warn)
        steps, cubins = tactics.steps(), tactics.cubins()
        workspace = tactics.workspace_bytes
    buffers, arena = plan.place(found, steps, limits)
    version = importlib.metadata.version("fp8-engine")
    built = Plan(
        Compatibility(engine.FORMAT_VERSION, version, request.target), source.info(), limits, buffers, tuple(steps),
        arena, workspace, "", {k: tune.kernel_facts(c) for k, c in sorted(cubins.items())},
        report.report(pairs, journal), tuple(tapped.taken),
    )  # fmt: skip
    return Compiled(graph, built, {k: c.code for k, c in cubins.items()}, plan.constants(graph), journal, tapped)


def _stage(reporter: Reporter, name: str) -> Callable[[int, int], None]:
    return lambda done, total: reporter.progress(name, done, total)


def write(compiled: Compiled, source: Source, output: Path, reporter: Reporter) -> Plan:
    """Writes the engine directory, all of it or nothing. Raises BuildError if `output` is something else already."""
    with _workplace(output) as partial:
        total = sum(weights.size(c) for c in compiled.constants.values())
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            reporter.progress("weights", done, total)

        digest = weights.write(partial / "rank0.safetensors", compiled.constants.values(), progress)
        built = dataclasses.replace(compiled.plan, weights_sha256=digest)
        engine.write_atomically(partial / "rank0.engine", [engine.engine_bytes(built, compiled.cubins)])
        facts = {k: dataclasses.asdict(getattr(built, k)) for k in ("compatibility", "model", "limits")}
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        engine.write_atomically(partial / "config.json", [text.encode()])
        for name in COPIED:
            if (source.checkpoint.directory / name).is_file():
                shutil.copyfile(source.checkpoint.directory / name, partial / name)
    return built


def check_output(output: Path) -> None:
    """Raises BuildError unless `output` is new, empty, or an engine directory, which is replaced."""
    if output.is_dir() and (not any(output.iterdir()) or (output / "rank0.engine").is_file()):
        return
    if output.exists():
        raise BuildError(f"{output} exists and is no engine directory; remove it, or choose another --output_dir")


@contextlib.contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """`<output>.partial`, renamed to `output` on success, removed on any failure."""
    check_output(output)
    partial, replaced = (output.with_name(f"{output.name}.{end}") for end in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            os.replace(output, replaced)
        os.replace(partial, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        _undo(output, partial, replaced)
        full = "; the disk is full, free some space and run again" if error.errno == errno.ENOSPC else ""
        raise BuildError(f"{output} cannot be written: {error.strerror or error}{full}") from error
    except BaseException:
        _undo(output, partial, replaced)
        raise


def _undo(output: Path, partial: Path, replaced: Path) -> None:
    if replaced.exists() and not output.exists():  # stopped between the two renames
        os.replace(replaced, output)
    shutil.rmtree(partial, ignore_errors=True)


def budget_lines(built: Plan, gpu_memory: int) -> list[tuple[str, str]]:
    """The memory budget as rows (what, how much)."""
    b = memory.budget(built)
    per_sequence = -(-built.limits.max_seq_len // built.limits.block_size)
    blocks, batch = b.blocks(gpu_memory), built.limits.max_batch_size
    rows = {
        "weights": b.weights, "activations": b.activations, "workspace": b.workspace,
        "inputs and outputs": b.inputs_and_outputs, f"KV block of {built.limits.block_size} tokens": b.kv_block,
        f"KV cache of {batch} full sequences": b.kv_block * per_sequence * batch,
    }  # fmt: skip
    fits = (
        f"{blocks} ({blocks // per_sequence} sequences of {built.limits.max_seq_len})" if blocks > 0 else "does not fit"
    )
    return [*((k, size_text(v)) for k, v in rows.items()), (f"KV blocks in {size_text(gpu_memory)}", fits)]


def size_text(count: int) -> str:
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.2f} {unit}"
    return f"{count} B"
