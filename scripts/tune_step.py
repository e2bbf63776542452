"""Chooses the tactics of a decode step's linears in their place: in the whole step, among the kernels around them.

    python -m fp8.scripts.tune_step --engine_dir ENGINE --output builder/tactics_h200.json
    mpirun -n 2 python -m fp8.scripts.tune_step --engine_dir ENGINE_OF_2_RANKS --output builder/tactics_h200.json

tune_table times launches of one linear in a row. In a step a linear's first weights arrive while other kernels are at
work, as far as shared memory has room beside their blocks: what is fastest there depends on the neighbours. So here one
linear of all layers takes another tactic, and the step with it, a CUDA graph, takes turns with the step so far; what is
faster stays, linear by linear, until nothing is. The choices go into the table, each for the rows that it was made for.
An engine of a few layers will do (python -m fp8.scripts.random_engine --num_layers 8).

Batch sizes that an engine has one tactic for (1 to 8, for instance) are tuned together, for the sum of their steps.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fp8.builder import tactic_table
from fp8.builder.engine import EngineError
from fp8.builder.tactic_table import Entry, TableError, digest_of_kernels, digest_of_tactics
from fp8.builder.tune import Site, tactic_fields
from fp8.plugins.base import Launcher, PluginError, StepShape, Tensor, load
from fp8.plugins.compile import compile_all
from fp8.plugins.gemm import few_tokens
from fp8.plugins.timing import captured, seconds_of_each
from fp8.runtime.launcher import RankError
from fp8.runtime.session import Session
from fp8.scripts.argument_types import new_file, positive
from fp8.scripts.benchmarks.arguments import add_engine_arguments, fill_cache
from fp8.scripts.benchmarks.case_buffers import Functions
from fp8.scripts.benchmarks.roofline import step_rows
from fp8.scripts.ranks import among_peers

if TYPE_CHECKING:
    import torch

LINEARS = ("gemm", "gemm_send", "gemm_swiglu")
OFFERED = 16  # tactics of a linear, the cost model's favourites
SHALLOWER = 6  # of them are offered with less deep rings too: beside another kernel's blocks these may find room
AGAIN = 8  # of which are tried again when others have changed
LEAST = 0.5  # microseconds of a step: a smaller gain is noise
REPLAYS, WARM = 10, 2
Place = TypeVar("Place")
Tactic = TypeVar("Tactic")


def descend(
    state: Mapping[Place, Tactic],
    offers: Mapping[Place, Sequence[Tactic]],
    gain: Callable[[Mapping[Place, Tactic], Place, Tactic], float],
    over: Callable[[], bool],
) -> dict[Place, Tactic]:
    """Gives place after place the tactic with the largest gain over the state so far, if any has LEAST, until a round
    over all places changes nothing, or time is over. Rounds but the first try what did best in the last one."""
    state, known = dict(state), {place: dict[Tactic, float]() for place in offers}
    for turn in itertools.count():
        before = dict(state)
        for place, every in offers.items():
            found: dict[Tactic, float] = {}
            pool = [t for t in every if t != state[place]]
            if turn:
                pool = sorted(pool, key=lambda t, place=place: -known[place].get(t, -1e9))[:AGAIN]  # type: ignore[misc]
            for tactic in pool:
                if over():
                    break
                found[tactic] = gain(state, place, tactic)
            known[place] |= found
            best = max(found, key=lambda t: found[t], default=state[place])
            state[place] = best if found.get(best, 0.0) >= LEAST else state[place]
        if state == before or over():
            return state
    raise AssertionError


@dataclass
class InPlace:
    """Launches of decode steps, one behind the other, and what takes the place of some of them. All ranks make the same
    calls. An engine has the same tactics for all of `shapes`."""

    session: Session
    shapes: tuple[StepShape, ...]
    functions: Functions = field(default_factory=Functions)
    graphs: dict[Any, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites: dict[Site, list[int]] = {}  # linears of one shape, and their places in the plan
        plan = self.session.plan
        for i, step in enumerate(plan.steps):
            plugin = load(step.plugin)(**step.attributes)
            if step.plugin in LINEARS and plan.buffer(step.outputs[0]).shape[0] == "T":
                types = tuple(
                    Tensor(plan.buffer(n).dtype, tuple(plan.buffer(n).shape)) if n else None for n in step.inputs
                )
                rows = next(c.max_tokens for c in step.tactics if self.shapes[0].tokens <= c.max_tokens)
                site = Site(plugin, types, rows, step.name)
                like = next((s for s in self.sites if s.label == site.label), site)
                self.sites.setdefault(like, []).append(i)

    def chosen(self, site: Site) -> Any:
        """The engine's tactic."""
        step = self.session.plan.steps[self.sites[site][0]]
        return site.plugin.tactic(next(c.tactic for c in step.tactics if c.max_tokens == site.max_tokens))

    def offers(self, site: Site) -> list[Any]:
        every = few_tokens.candidates(site.plugin, site.types, site.max_tokens)[:OFFERED]
        chosen = self.chosen(site)
        deep = [t for t in (chosen, *every) if isinstance(t, few_tokens.FewTokens)][:SHALLOWER]
        shallower = [replace(t, STAGES=n) for t in deep for n in {t.STAGES * 3 // 4, t.STAGES // 2} if n >= 2]
        return list(dict.fromkeys([chosen, *every, *shallower]))

    def exchange(self, value: float) -> float:
        """The largest of all ranks'."""
        ranks = self.session.ranks
        return value if ranks is None else max(map(float, ranks.world.exchange(repr(value))))

    def launches(self, site: Site, tactic: Any, in_place: bool = True) -> list[Launcher]:
        found = []
        for i in self.sites[site]:
            step = self.session.plan.steps[i]  # one of them may send its rows where another does not
            kernels = load(step.plugin)(**step.attributes).kernels(tactic, site.types)
            functions = self.functions.of(kernels)
            found.append(self.session.executor.rebound(i, tactic, functions, in_place))  # type: ignore[union-attr]
        return found

    def graph(self, state: Mapping[Site, Any]) -> torch.cuda.CUDAGraph:
        """Of the whole steps."""
        key = tuple(state.items())
        if key not in self.graphs:
            changed: dict[int, Launcher] = {}  # by place in the plan
            for site, tactic in ((s, t) for s, t in state.items() if t != self.chosen(s)):
                changed |= dict(zip(self.sites[site], self.launches(site, tactic), strict=True))
            self.graphs = dict([*self.graphs.items()][-1:])  # the state so far, and the one to be compared
            self.graphs[key] = captured([launch for shape in self.shapes for launch in self.step(changed, shape)])
        return self.graphs[key]

    def step(self, changed: Mapping[int, Launcher], shape: StepShape) -> list[Callable[[], object]]:
        given = self.session.executor.launches(shape)  # type: ignore[union-attr]
        return [partial(changed.get(i, launch), live) for i, (launch, live) in enumerate(given)]

    def seconds(self, graph: torch.cuda.CUDAGraph) -> float:
        """Microseconds of a replay, of several in a row."""
        import torch

        self.exchange(0.0)
        torch.cuda._sleep(1_000_000)  # the host gets ahead
        taken = seconds_of_each([graph.replay] * REPLAYS)[WARM:]
        return self.exchange(statistics.median(taken) * 1e6)

    def gain(self, state: Mapping[Site, Any], site: Site, tactic: Any) -> float:
        """Microseconds that a step takes less with another tactic; more often measured where it may be any."""
        now, other = self.graph(state), self.graph({**state, site: tactic})
        self.graphs = {tuple(state.items()): now}
        for rounds in (2, 7):
            found = statistics.median(self.seconds(now) - self.seconds(other) for _ in range(rounds))
            if found < -LEAST:
                break
        return found

    def alone(self, site: Site, tactic: Any) -> float:
        """Microseconds of a launch among its like, as the table has them."""
        launches = [partial(launch, self.shapes[0]) for launch in self.launches(site, tactic, False)] * 4
        return self.seconds(captured(launches)) / len(launches)


def tuned(place: InPlace, end: float) -> dict[Site, tuple[Any, float]]:
    """The tactics that the step is fastest with, of linears that have others now, and their time alone."""
    offers = {site: place.offers(site) for site in place.sites}
    leads = place.session.ranks is None or place.session.ranks.world.rank == 0
    if leads:
        compile_all(k for site, tactics in offers.items() for t in tactics for k in site.kernels(t))
    place.exchange(0.0)  # the others find them in the cache
    start = {site: place.chosen(site) for site in offers}
    state = descend(start, offers, place.gain, lambda: place.exchange(time.monotonic()) > end)
    before, after = place.seconds(place.graph(start)), place.seconds(place.graph(state))
    changed = {site: tactic for site, tactic in state.items() if tactic != start[site]}
    if leads:
        sizes = ", ".join(str(shape.tokens) for shape in place.shapes)
        print(f"steps of {sizes} took {before:.1f} us, and take {after:.1f}", flush=True)
    return {site: (tactic, place.alone(site, tactic)) for site, tactic in changed.items()}


def together(session: Session, sizes: Sequence[int]) -> list[list[int]]:
    """Batch sizes in order, in groups that the engine's linears have one tactic for."""
    ends = sorted({c.max_tokens for step in session.plan.steps if step.plugin in LINEARS for c in step.tactics})
    return [list(group) for _, group in itertools.groupby(sorted(set(sizes)), lambda n: bisect.bisect_left(ends, n))]


def put(output: Path, found: Mapping[Site, tuple[Any, float]]) -> None:
    """Into the table, with the favourites that they won against. Raises TableError."""
    table = tactic_table.read(output) if output.exists() else tactic_table.Table()
    for site, (tactic, us) in found.items():
        kernels = digest_of_kernels(k for t in site.favourites for k in site.kernels(t))
        entry = Entry(tactic_fields(tactic), us, digest_of_tactics(site.favourites), kernels)
        table.put(site.op, site.max_tokens, entry)
        print(f"{site.module}, up to {site.max_tokens} rows: {json.dumps(entry.tactic)}, {us:.2f} us alone")
    tactic_table.write(output, table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "python -m fp8.scripts.tune_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_arguments(p)
    p.add_argument("--output", type=new_file, required=True, help="the table that the choices go into")
    p.add_argument("--batch_size", type=positive, nargs="+", default=[1], help="sequences of the steps")
    p.add_argument("--context_len", type=positive, default=1088, help="of each of them")
    p.add_argument("--max_seconds", type=float, default=60.0, help="stop then, and write what is found (60)")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    import torch

    begin = time.monotonic()
    try:
        memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
        session = Session(args.engine_dir, args.device, *memory, world=args.world, make_weight=args.make_weight)
        if session.device.type != "cuda" or session.stages > 1:
            raise EngineError("tactics are timed on a GPU, in an engine of one pipeline stage")
        fill_cache(session)
        groups = together(session, args.batch_size)
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
            for left, sizes in zip(range(len(groups), 0, -1), groups, strict=True):
                end = time.monotonic() + (begin + args.max_seconds - time.monotonic()) / left
                rows = [step_rows(session, [(args.context_len, 1)] * n, args.seed) for n in sizes]
                shapes = [session.place(r) for r in rows]  # the largest comes last, and begins with the others' rows
                found = tuned(InPlace(session, tuple(shapes)), end)
                if args.world is None or args.world.rank == 0:
                    put(args.output, found)
    except (EngineError, OSError, PluginError, RankError, TableError) as error:
        print(f"tune_step: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return among_peers("tune_step", parse(argv), lambda args, _: run(args))


if __name__ == "__main__":
    sys.exit(main())
