"""The choice of tactics in place: what a plan's linears are offered, whose steps count, what the table gets."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoint as tiny
import tiny_engine

from fp8.builder import build, tactic_table
from fp8.builder.engine import EngineError, Plan
from fp8.builder.request import Reporter, Request
from fp8.plugins.base import StepShape
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.scripts import tune_step
from fp8.scripts.in_place import InPlace, Together

WIDE = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 768}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> InPlace:
    """Of an engine for a GPU, whose launches are not made."""
    source = tiny.source(tmp_path_factory.mktemp("model"), tiny.qformat("fp8"), **WIDE)
    plan = build.compile(source, Request(16, 128, 64, "sm_90a"), Reporter()).plan
    return InPlace(types.SimpleNamespace(plan=plan, ranks=None), (StepShape(3, 3, 3, 0, 128, 3),))  # type: ignore[arg-type]


def test_linears_of_one_shape_change_together(place: InPlace) -> None:
    layers, together = 2, Together([place])
    assert len(place.sites) == 4, "qkv, o, gate and up, down; lm_head has other rows"
    for label, site in place.sites.items():
        steps = [place.session.plan.steps[i] for i in place.places(label)]
        assert site.max_tokens == 8 and len(steps) == layers and len({step.plugin for step in steps}) == 1
        offered = together.offers(label)
        assert place.chosen(label) == together.chosen()[label] == site.candidates()[0]
        assert len(set(offered)) == len(offered) > 4
        assert all(site.plugin.legal(t, site.types, 8) for t in offered)


def test_leaders_get_other_rings_that_are_legal(place: InPlace) -> None:
    together = Together([place])
    for label, site in place.sites.items():
        leaders = together.offers(label)[:3]
        found = together._like(label, leaders)
        assert found and all(site.plugin.legal(t, site.types, 8) for t in found)
        assert all(any(t == replace(like, STAGES=t.STAGES) for like in leaders) for t in found)


def rebinding(plan: Plan, us: Callable[[dict[int, Any]], float]) -> InPlace:
    """Launches tell their place and tactic; a step takes `us` of them."""
    given = lambda shape: [(lambda live, i=i: (i, None), shape) for i in range(len(plan.steps))]
    rebound = lambda i, tactic, functions, in_place: lambda live: (i, tactic)
    executor = types.SimpleNamespace(launches=given, rebound=rebound)
    session = types.SimpleNamespace(plan=plan, ranks=None, executor=executor)
    place = InPlace(session, (StepShape(3, 3, 3, 0, 128, 3),), types.SimpleNamespace(of=list))  # type: ignore[arg-type]
    place._us = us  # type: ignore[method-assign, assignment]
    return place


def test_a_tactic_is_for_the_sum_of_the_engines_that_have_the_linear(monkeypatch, place: InPlace) -> None:
    """One gains 3 us by it, the other loses 5; an engine without that linear has no say."""
    monkeypatch.setattr("fp8.scripts.in_place.captured", lambda launches: dict(launch() for launch in launches))
    plan = place.session.plan
    label = next(iter(place.sites))
    new = next(t for t in Together([place]).offers(label) if t != place.chosen(label))
    taken = lambda steps: new in steps.values()
    gaining = rebinding(plan, lambda steps: 100.0 - 3 * taken(steps))
    losing = rebinding(plan, lambda steps: 100.0 + 5 * taken(steps))
    state = Together([gaining]).chosen()
    assert Together([gaining]).sure(state, label, new) == 3.0
    both = Together([gaining, losing])
    assert both.sure(state, label, new) == -2.0 and both.gains(state, label, [new])[new] == -2.0
    del losing.sites[label]
    assert both.sure(state, label, new) == 3.0
    gaining.seconds(state)
    (found,) = gaining._graphs.values()
    steps: Any = found
    assert len(steps) < len(plan.steps)
    assert not any("lm_head" in plan.steps[i].name for i in steps), "without the logits"


def test_engines_of_different_tables_are_refused(place: InPlace) -> None:
    other = rebinding(place.session.plan, lambda steps: 0.0)
    other.chosen = lambda label: None  # type: ignore[method-assign, assignment]
    with pytest.raises(EngineError, match=r"different tactics for .*; build them with the same table"):
        Together([place, other]).chosen()


def test_linears_that_send_and_one_that_does_not_change_together(tmp_path: Path) -> None:
    """The last down_proj's sum is no norm's: each is bound with the kernels of its own plugin."""
    source = tiny.source(tmp_path, tiny.qformat("fp8"), **WIDE)
    plan = build.compile(source, Request(16, 128, 64, "sm_90a", tp_size=2), Reporter()).plan
    bound: list[tuple] = []
    executor = types.SimpleNamespace(rebound=lambda i, tactic, functions, _: bound.append((i, functions)))
    session = types.SimpleNamespace(plan=plan, ranks=None, executor=executor)
    shape = StepShape(3, 3, 3, 0, 128, 3)
    place = InPlace(session, (shape,), types.SimpleNamespace(of=list))  # type: ignore[arg-type]
    label = next(label for label, site in place.sites.items() if site.module.endswith("down_proj"))
    place.launches(label, place.chosen(label))
    assert [plan.steps[i].plugin for i, _ in bound] == ["gemm_send", "gemm"]
    assert [["SEND" in dict(k.constants) for k in kernels] for _, kernels in bound] == [[True, False], [False]]


def test_choices_go_into_the_table_for_their_rows(place: InPlace, tmp_path: Path) -> None:
    label, site = next(iter(place.sites.items()))
    tactic = next(t for t in Together([place]).offers(label) if isinstance(t, FewTokens) and t != place.chosen(label))
    table = tmp_path / "table.json"
    for us in (3.0, 2.5):
        tune_step.put(table, {site: (tactic, us)})
    found = tactic_table.read(table)
    assert len(found) == 1 and found.entries[site.op][8].us == 2.5
    assert site.restored(found.nearest(site.op, 8).tactic) == tactic  # type: ignore[union-attr]


class Steps:
    """Of one engine, as `tuned` asks: the last tactic offered is 2 us faster than the first, for every place."""

    def __init__(self, place: InPlace, wrong: str) -> None:
        self.sites, self.found_wrong, together = place.sites, wrong, Together([place])
        self.first = {label: together.offers(label)[0] for label in self.sites}
        self.offers = lambda label: together.offers(label)[:3]
        shape = types.SimpleNamespace(tokens=8)
        session = types.SimpleNamespace(model=place.session.plan.model)
        self.places = [types.SimpleNamespace(
            exchange=lambda value: value, session=session, shapes=[shape], forget=lambda: None,
            seconds=lambda state: 100.0 - sum(t == self.offers(label)[-1] for label, t in state.items()) * 2.0,
        )]  # fmt: skip

    def chosen(self) -> dict:
        return dict(self.first)

    def gains(self, state: dict, label: str, pool: list) -> dict:
        return dict(sorted(((t, self.sure(state, label, t)) for t in pool), key=lambda found: -found[1]))

    def sure(self, state: dict, label: str, tactic: Any) -> float:
        return self.places[0].seconds({**state, label: tactic}) * -1 + self.places[0].seconds(state)

    def wrong(self, label: str, tactic: Any) -> str | None:
        return "output 0 with 8 rows: error 1" if label == self.found_wrong else None

    def alone(self, label: str, tactic: Any) -> float:
        return 2.5


def test_what_is_faster_but_wrong_is_not_taken(place: InPlace, capsys) -> None:
    wrong, *right = place.sites
    steps = Steps(place, wrong)
    found = tune_step.tuned(steps, math.inf, tell=True)  # type: ignore[arg-type]
    assert found == {place.sites[label]: (steps.offers(label)[-1], 2.5) for label in right}
    told = capsys.readouterr()
    assert "steps of 8 took 100.0 us, now 6.0 less" in told.out and told.out.count("2.0 us less, 2.50 us alone") == 3
    assert f"{place.sites[wrong].module} keeps its tactic" in told.err


def test_batch_sizes_of_one_tactic_are_tuned_together(place: InPlace) -> None:
    assert tune_step.together([place.session], [16, 2, 8, 9, 8]) == [[2, 8], [9, 16]]


def test_a_gpu_is_needed(tmp_path: Path, capsys) -> None:
    arguments = ["--engine_dir", str(tiny_engine.write(tmp_path / "engine")), "--output", str(tmp_path / "table.json")]
    assert tune_step.main(arguments) == 1
    assert "tactics are timed on a GPU" in capsys.readouterr().err
