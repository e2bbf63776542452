"""Decode steps of engines in which linears take other tactics: their graphs, and the time these take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import EngineError
from fp8.builder.trial import Job, Operands, WrongResult
from fp8.builder.tune import Site
from fp8.plugins.base import Launcher, StepShape, Tensor, load
from fp8.plugins.compile import compile_all
from fp8.plugins.gemm import few_tokens
from fp8.plugins.timing import captured, seconds_of_each
from fp8.runtime.session import Session
from fp8.scripts import step_search
from fp8.scripts.benchmarks.case_buffers import Functions

if TYPE_CHECKING:
    import torch

LINEARS = ("gemm", "gemm_send", "gemm_swiglu")
OFFERED = 30  # tactics of a linear, the cost model's favourites
LEADERS = 5  # of a race are offered with less deep rings too: beside another kernel's blocks these may find room
REPLAYS, WARM = 6, 1
State = Mapping[str, Any]  # tactics by label of their place


@dataclass
class InPlace:
    """Launches of an engine's decode steps, one after the other, and what takes the place of some of them. All ranks
    make the same calls. An engine has the same tactics for all of `shapes`."""

    session: Session
    shapes: tuple[StepShape, ...]
    functions: Functions = field(default_factory=Functions)

    def __post_init__(self) -> None:
        self.sites: dict[str, Site] = {}  # linears of one shape, by label
        self._places: dict[str, list[int]] = {}  # in the plan
        self._bound: dict[tuple[str, Any, bool], list[Launcher]] = {}
        self._graphs: dict[tuple[tuple[str, Any], ...], torch.cuda.CUDAGraph] = {}
        plan = self.session.plan
        for i, step in enumerate(plan.steps):
            plugin = load(step.plugin)(**step.attributes)
            if step.plugin in LINEARS and plan.buffer(step.outputs[0]).shape[0] == "T":
                types = tuple(
                    Tensor(plan.buffer(n).dtype, tuple(plan.buffer(n).shape)) if n else None for n in step.inputs
                )
                rows = next(c.max_tokens for c in step.tactics if self.shapes[0].tokens <= c.max_tokens)
                site = Site(plugin, types, rows, step.name)
                self.sites.setdefault(site.label, site)
                self._places.setdefault(site.label, []).append(i)

    def chosen(self, label: str) -> Any:
        """The engine's tactic."""
        step, site = self.session.plan.steps[self.places(label)[0]], self.sites[label]
        return site.plugin.tactic(next(c.tactic for c in step.tactics if c.max_tokens == site.max_tokens))

    def places(self, label: str) -> list[int]:
        """Places of its linears in the plan."""
        return self._places[label]

    def exchange(self, value: float) -> float:
        """The largest of all ranks'."""
        ranks = self.session.ranks
        return value if ranks is None else max(map(float, ranks.world.exchange(repr(value))))

    def launches(self, label: str, tactic: Any, in_place: bool = True) -> list[Launcher]:
        key = label, tactic, in_place
        if key not in self._bound:
            self._bound[key] = self._rebound(*key)
        return self._bound[key]

    def _rebound(self, label: str, tactic: Any, in_place: bool) -> list[Launcher]:
        found = []
        for i in self.places(label):
            step = self.session.plan.steps[i]  # one of them may send its rows where another does not
            kernels = load(step.plugin)(**step.attributes).kernels(tactic, self.sites[label].types)
            functions = self.functions.of(kernels)
            found.append(self.session.executor.rebound(i, tactic, functions, in_place))  # type: ignore[union-attr]
        return found

    def forget(self) -> None:
        """The graphs, before another race."""
        self._graphs = {}

    def seconds(self, state: State) -> float:
        """Microseconds of the steps, of several in a row."""
        key = tuple((label, state[label]) for label in self.sites)
        if key not in self._graphs:
            self._graphs[key] = self._captured(dict(key))
        return self._us(self._graphs[key])

    def alone(self, label: str, tactic: Any) -> float:
        """Microseconds of a launch among its like, as the table has them."""
        launches = [partial(launch, self.shapes[0]) for launch in self.launches(label, tactic, False)] * 4
        return self._us(captured(launches)) / len(launches)

    def _captured(self, state: State) -> torch.cuda.CUDAGraph:
        changed: dict[int, Launcher] = {}  # by place in the plan
        for label, tactic in ((s, t) for s, t in state.items() if t != self.chosen(s)):
            changed |= dict(zip(self.places(label), self.launches(label, tactic), strict=True))
        return captured([launch for shape in self.shapes for launch in self._step(changed, shape)])

    def _step(self, changed: Mapping[int, Launcher], shape: StepShape) -> list[Callable[[], object]]:
        """A step without its logits, whose linear takes as long as layers do and is not chosen here."""
        given, plan = self.session.executor.launches(shape), self.session.plan  # type: ignore[union-attr]
        kept = (i for i, step in enumerate(plan.steps) if plan.buffer(step.outputs[0]).shape[0] != "L")
        return [partial(changed.get(i, given[i][0]), given[i][1]) for i in kept]

    def _us(self, graph: torch.cuda.CUDAGraph) -> float:
        import torch

        self.exchange(0.0)
        torch.cuda._sleep(400_000)  # the host gets ahead
        taken = seconds_of_each([graph.replay] * REPLAYS)[WARM:]
        return self.exchange(statistics.median(taken) * 1e6)


@dataclass
class Together:
    """The steps of several engines, whose linears of one shape take one tactic."""

    places: Sequence[InPlace]

    def __post_init__(self) -> None:
        self.sites = {label: site for place in reversed(self.places) for label, site in place.sites.items()}
        self._leads = (ranks := self.places[0].session.ranks) is None or ranks.world.rank == 0

    def _of(self, label: str) -> list[InPlace]:
        return [place for place in self.places if label in place.sites]

    def chosen(self) -> dict[str, Any]:
        """The engines' tactics. Raises EngineError where they have different ones."""
        chosen = {label: {place.chosen(label) for place in self._of(label)} for label in self.sites}
        for label, found in chosen.items():
            if len(found) > 1:
                raise EngineError(f"the engines have different tactics for {label}; build them with the same table")
        return {label: found.pop() for label, found in chosen.items()}

    def offers(self, label: str) -> list[Any]:
        site = self.sites[label]
        return few_tokens.candidates(site.plugin, site.types, site.max_tokens)[:OFFERED]

    def gains(self, state: State, label: str, pool: Sequence[Any]) -> dict[Any, float]:
        """Microseconds that steps take less with other tactics, and with others like the best of them, best first."""
        return self._raced(state, label, pool, step_search.HEATS, partial(self._like, label))

    def sure(self, state: State, label: str, tactic: Any) -> float:
        """Microseconds that steps take less with another tactic."""
        return self._raced(state, label, [tactic], step_search.SURE, lambda leaders: ())[tactic]

    def _raced(
        self,
        state: State,
        label: str,
        pool: Sequence[Any],
        heats: Sequence[tuple[int, int]],
        more: Callable[[Sequence[Any]], Sequence[Any]],
    ) -> dict[Any, float]:
        def time(tactic: Any) -> float:
            return sum(place.seconds({**state, label: tactic}) for place in self._of(label))

        self.compile(label, pool)
        found = step_search.race(state[label], pool, time, heats, more)
        for place in self.places:
            place.forget()
        return found

    def compile(self, label: str, tactics: Sequence[Any]) -> None:
        if self._leads:
            compile_all(k for tactic in tactics for k in self.sites[label].kernels(tactic))
        self.places[0].exchange(0.0)  # the others find them in the cache

    def _like(self, label: str, leaders: Sequence[Any]) -> list[Any]:
        """Tactics like these, with other rings."""
        site, new = self.sites[label], dict[Any, None]()
        for t in (t for t in leaders[:LEADERS] if isinstance(t, few_tokens.FewTokens)):
            rings = (replace(t, STAGES=n) for n in (t.STAGES + 1, t.STAGES - 1, t.STAGES * 3 // 4, t.STAGES // 2))
            new |= dict.fromkeys(r for r in rings if few_tokens.allowed(site.plugin, r, site.types, site.max_tokens))
        self.compile(label, list(new))
        return list(new)

    def alone(self, label: str, tactic: Any) -> float:
        return self._of(label)[0].alone(label, tactic)

    def wrong(self, label: str, tactic: Any) -> str | None:
        """What the reference says against a tactic, on random operands; on all ranks, if it does on one."""
        import torch

        site, place, why = self.sites[label].timed, self.places[0], None
        rows = site.max_tokens
        operands = Operands(Job(site.plugin, site.types, rows, rows, ()), str(place.session.device))
        functions = place.functions.of(site.kernels(tactic))
        try:
            operands.check(site.plugin.bind(tactic, functions, operands.sets[0], None), torch.cuda.synchronize)
        except WrongResult as error:
            why = str(error)
        any_wrong = place.exchange(float(why is not None))
        return why or ("on another rank" if any_wrong else None)
