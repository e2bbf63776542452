"""The model of what several ranks cost: it gives back what it was made from, and what must hold in any case."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fp8.builder.engine import EngineError
from fp8.scripts import parallel_model, performance_page, random_checkpoint
from fp8.scripts import record as measured
from fp8.scripts.benchmarks import figures, rank_targets
from fp8.scripts.parallel_model import INPUT, OUTPUT, Engine, Layout, Link, Machine, Shape

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "performance" / "h200x2"
CONTEXT = INPUT + OUTPUT / 2
ONE = "llama-7b fp8 + fp8 kv, 1024 in, 128 out"
FIGURES = {
    f"{ONE}, batch 1: time per token ms": 1.83, f"{ONE}, batch 64: time per token ms": 7.1,
    f"{ONE}, batch 64: first token ms": 840.0, "all_reduce 8 KB: us": 2.0, "all_reduce 8 MB: us": 30.0,
    "send 8 KB: us": 8.0, "send 8 MB: us": 36.0,
    "llama-7b fp8 + fp8 kv tp 2, 1024 in, 128 out, batch 64: time per token ms": 4.2,
    "llama-7b fp8 + fp8 kv tp 2, 1024 in, 128 out, batch 1: time per token ms": 1.06,
}  # fmt: skip


def record(**changes: float | None) -> dict[str, Any]:
    return {"rows": [{"name": name, "figure": value} for name, value in {**FIGURES, **changes}.items()]}


@pytest.fixture(scope="module")
def machine() -> Machine:
    return parallel_model.calibrated(record())


def shape(model: str) -> Shape:
    return Shape.of(random_checkpoint.PRESETS[model])


def test_it_gives_back_what_it_was_made_from(machine: Machine) -> None:
    engine = Engine(shape("llama-7b"), Layout(), machine)
    assert engine.token_seconds(1, CONTEXT) * 1e3 == pytest.approx(1.83)
    assert engine.token_seconds(64, CONTEXT) * 1e3 == pytest.approx(7.1)
    engine_of_two = Engine(shape("llama-7b"), Layout(2), machine)
    for batch, milliseconds in ((1, 1.06), (64, 4.2)):
        assert engine_of_two.token_seconds(batch, CONTEXT) * 1e3 == pytest.approx(milliseconds)
    assert engine.prompt_seconds(64, INPUT, 8192) * 1e3 == pytest.approx(840.0)
    assert machine.all_reduce(8 << 10, 2) * 1e6 == pytest.approx(2.0)
    assert machine.message.seconds(8 << 20) * 1e6 == pytest.approx(36.0)


def test_a_record_without_a_figure_is_refused() -> None:
    with pytest.raises(EngineError, match=r"no figure 'send 8 KB: us'; bash scripts/gpu_ranks\.sh"):
        parallel_model.calibrated(record(**{"send 8 KB: us": None}))
    shared = next(name for name in FIGURES if "tp 2" in name and "batch 1:" in name)
    with pytest.raises(EngineError, match="no rates fit both"):
        parallel_model.calibrated(record(**{shared: 3.0}))


def test_sizes_are_the_checkpoints() -> None:
    for model, billions in (("llama-7b", 6.5), ("llama-2-70b", 68.5), ("llama-3.1-405b", 401.7)):
        sizes = shape(model)
        assert sizes.layers * sizes.layer_weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape("llama-2-70b").kv(2) == 2 * 128 * 4 and shape("llama-2-70b").kv(16) == 2 * 128, "a head on two ranks"


def test_a_large_sum_goes_in_two_exchanges(machine: Machine) -> None:
    """Of an n-th each: among 8 ranks a quarter of the bytes, for one latency more."""
    reduce = Link(2e-6, 100e9)
    simple = dataclasses.replace(machine, reduce=reduce)
    assert simple.all_reduce(1000, 1) == 0
    assert simple.all_reduce(8192, 8) == reduce.seconds(7 * 8192)
    assert simple.all_reduce(1 << 20, 8) == pytest.approx(2 * reduce.seconds(7 / 8 * (1 << 20)))
    assert simple.all_reduce(8192, 16) > 5 * simple.all_reduce(8192, 8), "from host to host"


def test_prompts_fill_a_pipeline_and_run_it_dry(machine: Machine) -> None:
    free = dataclasses.replace(machine, message=Link(0.0, 1e30))
    one, four = (Engine(shape("llama-2-70b"), Layout(1, pp), free) for pp in (1, 4))
    for chunks in (1, 4, 16):
        ratio = four.prompt_seconds(chunks, 1024, 1024) / one.prompt_seconds(chunks, 1024, 1024)
        assert ratio == pytest.approx((chunks + 3) / chunks / 4)


def test_a_sequence_alone_gains_nothing_from_stages(machine: Machine) -> None:
    one, two, shared = (Engine(shape("llama-2-70b"), place, machine) for place in (Layout(), Layout(1, 2), Layout(2)))
    assert two.token_seconds(1, CONTEXT) > one.token_seconds(1, CONTEXT) > shared.token_seconds(1, CONTEXT)


def test_one_launch_computes_the_layers_of_a_token_alone(machine: Machine) -> None:
    slow = dataclasses.replace(machine, layer=2 * machine.layer)
    for layout, batch, same in (
        (Layout(), 1, True),
        (Layout(1, 2), 1, True),
        (Layout(2), 1, True),
        (Layout(), 2, False),
    ):
        one, other = (Engine(shape("llama-7b"), layout, m).token_seconds(batch, CONTEXT) for m in (machine, slow))
        assert (one == other) == same, layout


def test_what_does_not_fit_is_not_chosen(machine: Machine) -> None:
    assert parallel_model.best(machine, shape("llama-3.1-405b"), 2) == (None, None)
    fastest, fullest = parallel_model.best(machine, shape("llama-3.1-405b"), 16)
    assert fastest is not None and fullest is not None
    assert fastest.layout.tp == 8, "not across hosts"
    assert fullest.layout.gpus == 16 and fullest.fits(16 * parallel_model.PER_GPU)


def test_the_committed_page_is_what_the_commands_make() -> None:
    """Of two GPUs' results: the record, and docs/parallel.md."""
    made = measured.record(figures.read(RESULTS), 2)
    assert made == measured.load(RESULTS.with_suffix(".json")), "python -m fp8.scripts.record --gpus 2 makes it anew"
    page = (RESULTS.parent.parent / "parallel.md").read_text()
    assert performance_page.render(page, made) == page, "python -m fp8.scripts.performance_page makes it anew"
    tables = parallel_model.tables(made)
    assert parallel_model.render(page, tables) == page, "python -m fp8.scripts.parallel_model makes it anew"
    shown = {
        found["name"]
        for pattern in (performance_page.MARKED, parallel_model.MARKED)
        for found in pattern.finditer(page)
    }
    assert shown == {"summary", "losses", *tables, *(target.section for target in rank_targets.targets(2))}


def test_with_more_gpus_the_rows_stand_and_what_is_right_is_asked_for() -> None:
    """Not what is fast: that was measured among two."""
    two, four = ({t.name: t for t in rank_targets.targets(n)} for n in (2, 4))
    same = {name.replace("tp 2", "tp 4").replace("pp 2", "pp 4") for name in two}
    one_launch = "llama-7b of few layers, tp 4, one launch: logits, SQNR to NCCL's"
    assert set(four) == same - {one_launch}  # a quarter of that MLP is no multiple of 128
    asked = {t.name for t in four.values() if t.target is not None}
    right = (": failures", " launches at varied sizes", ": wrong results", " or not finite", "SQNR to NCCL's")
    assert asked == {n for n in four if n.startswith("example ") or n.endswith(right)}
    ratio = four["llama-7b fp8 + fp8 kv, batch 1: time per token, tp 4 over one GPU"]
    key = "llama-7b fp8 + fp8 kv{}, 1024 in, 128 out, batch 1: time per token ms"
    assert ratio.figure({key.format(""): 2.0, key.format(" tp 4"): 1.0}) == 0.5


def test_the_model_is_near_what_was_measured() -> None:
    made = measured.load(RESULTS.with_suffix(".json"))
    found = list(parallel_model.check(parallel_model.calibrated(made), made))
    assert len(found) == 5
    assert all(abs(modelled / value - 1) < 0.1 for *_, value, modelled in found)


def test_the_tables_of_a_page_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "record.json").write_text(json.dumps({**record(), "sources": {}}))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- model choice -->\nold\n<!-- end -->\nafter\n")
    assert parallel_model.main(["--record", str(tmp_path / "record.json"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- model choice -->\n| model |") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and "does not fit" in text
    page.write_text("<!-- model choices -->\n<!-- end -->\n")
    assert parallel_model.main(["--record", str(tmp_path / "record.json"), "--page", str(page)]) == 1
    assert "a table of the model 'choices'; there are machine, layer" in capsys.readouterr().err
    assert parallel_model.main(["--record", str(tmp_path / "none.json")]) == 1
    assert "parallel_model: " in capsys.readouterr().err
