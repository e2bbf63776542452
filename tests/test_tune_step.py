"""The choice of tactics in place: the search, what a plan's linears are offered, and what goes into the table."""

from __future__ import annotations

import itertools
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_checkpoint as tiny
import tiny_engine

from fp8.builder import build, tactic_table
from fp8.builder.build import Reporter, Request
from fp8.plugins.base import StepShape
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.scripts import tune_step
from fp8.scripts.tune_step import InPlace, descend

WIDE = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 768}


def cost(state: Mapping[str, int]) -> float:
    """Least at a 3, b 1: b's best depends on a."""
    return 10.0 * abs(state["a"] - 3) + 4.0 * abs(state["b"] - (1 if state["a"] == 3 else 2))


def gain(state: Mapping[str, int], place: str, tactic: int) -> float:
    return cost(state) - cost({**state, place: tactic})


def test_the_search_goes_on_until_no_place_gains() -> None:
    offers = {"b": [0, 1, 2], "a": [0, 1, 2, 3]}
    assert descend({"a": 0, "b": 0}, offers, gain, lambda: False) == {"a": 3, "b": 1}
    asked = itertools.count()
    assert descend({"a": 0, "b": 0}, offers, gain, lambda: next(asked) >= 2) == {"a": 0, "b": 2}, "time is over"


def test_gains_within_the_noise_change_nothing() -> None:
    assert descend({"a": 0}, {"a": [0, 1]}, lambda *_: tune_step.LEAST / 2, lambda: False) == {"a": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> InPlace:
    """Of an engine for a GPU, whose launches are not made."""
    source = tiny.source(tmp_path_factory.mktemp("model"), tiny.qformat("fp8"), **WIDE)
    plan = build.compile(source, Request(16, 128, 64, "sm_90a"), Reporter()).plan
    return InPlace(types.SimpleNamespace(plan=plan, ranks=None), (StepShape(3, 3, 3, 0, 128, 3),))  # type: ignore[arg-type]


def test_linears_of_one_shape_change_together(place: InPlace) -> None:
    layers = 2
    assert sorted(map(len, place.sites.values())) == [layers] * 4, "qkv, o, gate and up, down; lm_head has other rows"
    for site, steps in place.sites.items():
        assert site.max_tokens == 8 and len({place.session.plan.steps[i].plugin for i in steps}) == 1
        offered = place.offers(site)
        assert offered[0] == place.chosen(site) and len(set(offered)) == len(offered) > 4
        assert all(site.plugin.legal(t, site.types, 8) for t in offered)


def test_linears_that_send_and_one_that_does_not_change_together(tmp_path: Path) -> None:
    """The last down_proj's sum is no norm's: each is bound with the kernels of its own plugin."""
    source = tiny.source(tmp_path, tiny.qformat("fp8"), **WIDE)
    plan = build.compile(source, Request(16, 128, 64, "sm_90a", tp_size=2), Reporter()).plan
    bound: list[tuple] = []
    executor = types.SimpleNamespace(rebound=lambda i, tactic, functions, _: bound.append((i, functions)))
    session = types.SimpleNamespace(plan=plan, ranks=None, executor=executor)
    shape = StepShape(3, 3, 3, 0, 128, 3)
    place = InPlace(session, (shape,), types.SimpleNamespace(of=list))  # type: ignore[arg-type]
    site = next(s for s in place.sites if s.module.endswith("down_proj"))
    place.launches(site, place.chosen(site))
    assert [plan.steps[i].plugin for i, _ in bound] == ["gemm_send", "gemm"]
    assert [["SEND" in dict(k.constants) for k in kernels] for _, kernels in bound] == [[True, False], [False]]


def test_choices_go_into_the_table_for_their_rows(place: InPlace, tmp_path: Path, capsys) -> None:
    site = next(iter(place.sites))
    tactic = next(t for t in place.offers(site) if isinstance(t, FewTokens) and t != place.chosen(site))
    table = tmp_path / "table.json"
    for us in (3.0, 2.5):
        tune_step.put(table, {site: (tactic, us)})
    found = tactic_table.read(table)
    assert len(found) == 1 and found.entries[site.op][8].us == 2.5
    assert site.restored(found.nearest(site.op, 8).tactic) == tactic  # type: ignore[union-attr]
    assert "2.50 us alone" in capsys.readouterr().out


def test_batch_sizes_of_one_tactic_are_tuned_together(place: InPlace) -> None:
    assert tune_step.together(place.session, [16, 1, 8, 9, 8]) == [[1, 8], [9, 16]]


def test_a_gpu_is_needed(tmp_path: Path, capsys) -> None:
    arguments = ["--engine_dir", str(tiny_engine.write(tmp_path / "engine")), "--output", str(tmp_path / "table.json")]
    assert tune_step.main(arguments) == 1
    assert "tactics are timed on a GPU" in capsys.readouterr().err
