"""The record of what was measured, the page and the pictures made from it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fp8.builder.engine import EngineError
from fp8.scripts import performance_page, performance_plot, record
from fp8.scripts.benchmarks import figures
from fp8.scripts.benchmarks.kernel_cases import BURSTS, PRODUCTS, timed_cases
from fp8.scripts.benchmarks.targets import HEADLINES, Target, targets
from fp8.scripts.random_checkpoint import PRESETS

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "performance" / "h200"


def engine(model: str, format: str = "fp8", kv: str = "float8_e4m3fn") -> dict[str, Any]:
    return {fact: PRESETS[model][key] for fact, key in figures.FACTS.items()} | {"format": format, "kv_cache_dtype": kv}


def latency(model: str, batch: int, rate: float) -> dict[str, Any]:
    row = {
        "batch_size": batch, "input_len": 1024, "output_len": 128, "tokens_per_second": rate, "first_token_ms": 10.0,
        "time_per_output_token_ms": 2.0, "fraction_of_bound": 0.9, "bound_tokens_per_second": rate / 0.9,
    }  # fmt: skip
    return {"mode": "latency", "command": "fp8-bench latency", "engine": engine(model), "results": [row]}


def test_the_committed_page_is_what_the_commands_make() -> None:
    made = record.record(figures.read(RESULTS))
    assert made == record.load(DOCS / "performance" / "h200.json"), "python -m fp8.scripts.record makes it anew"
    page = (DOCS / "performance.md").read_text()
    path = DOCS / "performance" / "h200-again.json"
    again = record.load(path) if path.exists() else None
    assert performance_page.render(page, made, again) == page, "python -m fp8.scripts.performance_page makes it anew"
    sections = {found["name"] for found in performance_page.MARKED.finditer(page)}
    assert sections == {*performance_page.WHOLE, "spread", *(target.section for target in targets())}, (
        "every row stands on the page"
    )


def test_names_of_targets_are_unique_and_kernels_among_them_are_timed() -> None:
    names = [target.name for target in targets()]
    assert len(names) == len(set(names))
    timed, bursts = ({t.name for t in timed_cases() if t.bursts or not of_bursts} for of_bursts in (False, True))
    for target in targets():
        for figure in (*target.figures, *target.over):
            name, in_bursts = figure.rsplit(": ", 1)[0].removesuffix(PRODUCTS), BURSTS in figure
            if name.split()[0] in ("gemm", "attention", "norm_quant"):
                assert name.removesuffix(BURSTS) in (bursts if in_bursts else timed), f"nobody times {name}"


def test_a_row_is_met_or_missed_or_not_measured(tmp_path: Path) -> None:
    (tmp_path / "llama-7b.json").write_text(json.dumps(latency("llama-7b", 1, 505.0)))
    (tmp_path / "llama-3.1-8b.json").write_text(json.dumps(latency("llama-3.1-8b", 8, 2000.0)))
    rows = {row["name"]: row for row in record.record(figures.read(tmp_path))["rows"]}
    met = rows["llama-7b fp8 + fp8 kv, 1024 in, 128 out, batch 1: tokens/s"]
    assert (met["figure"], met["target"], met["anchor"], met["met"]) == (505.0, 500, 296, True)
    missed = rows["llama-3.1-8b fp8 + fp8 kv, 1024 in, 128 out, batch 8: tokens/s"]
    assert (missed["figure"], missed["met"]) == (2000.0, False)
    late = rows["llama-7b fp8 + fp8 kv, 1024 in, 128 out, batch 1: time per token ms"]
    assert not late["at_least"] and late["met"] is False, "2.0 ms are more than 85% of the bound allow"
    nothing = rows["llama-7b fp8 + fp8 kv, 1024 in, 128 out, batch 64: tokens/s"]
    assert (nothing["figure"], nothing["met"]) == (None, None)


def test_kernel_figures_are_ratios_in_the_same_run(tmp_path: Path) -> None:
    rows = [
        {"name": t.name, "plugin": t.plugin, "us": 10.0, "tb_per_second": 4.0, "tflops": 1000.0, "fraction": 0.9,
         "peer": "cuBLASLt", "peer_us": 13.0, "ratio": 1.3}
        for t in timed_cases()
        if t.name.startswith("gemm fp8") and t.name != "gemm fp8 rowwise 512x4096x4096"
    ]  # fmt: skip
    rows.append({"name": "gemm fp8 rowwise 512x4096x4096", "plugin": "gemm", "failure": "RuntimeError: no"})
    document = {"mode": "kernel", "command": "fp8-bench kernel", "ceilings": {"copy": 4e12}, "results": rows}
    (tmp_path / "kernel.json").write_text(json.dumps(document))
    found = {row["name"]: row for row in record.record(figures.read(tmp_path))["rows"]}
    few = found["gemm fp8, geometric mean over M <= 64: ratio to cuBLASLt"]
    assert few["figure"] == pytest.approx(1.3) and few["met"] is False, "1.35 is asked for"
    assert found["gemm fp8, geometric mean over 64 < M < 1024: ratio to cuBLASLt"]["figure"] is None, "one is missing"
    assert found["gemm fp8 per-tensor 8192x4096x4096: ratio to cuBLASLt"]["met"] is True


def test_a_mean_of_ratios_is_geometric() -> None:
    target = Target("s", "n", "x", ("a", "b"), 1.0, over=("c", "d"))
    assert target.figure({"a": 2.0, "b": 9.0, "c": 1.0, "d": 2.0}) == pytest.approx(3.0)
    assert target.figure({"a": 2.0, "b": 9.0, "c": 1.0}) is None


def test_a_file_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama-7b.json").write_text(json.dumps(latency("llama-3.1-8b", 1, 500.0)))
    with pytest.raises(EngineError, match="its engine has num_kv_heads 8, but llama-7b 32"):
        record.record(figures.read(tmp_path))
    (tmp_path / "llama-7b.json").rename(tmp_path / "mine.json")
    assert record.main(["--input", str(tmp_path)]) == 1
    assert "mine.json: its name begins with none of" in capsys.readouterr().err
    (tmp_path / "mine.json").write_text("{")
    assert record.main(["--input", str(tmp_path)]) == 1
    assert "is not JSON" in capsys.readouterr().err
    assert record.main(["--input", str(tmp_path / "nothing")]) == 1
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize(("spread", "status"), [(0.029, 0), (0.04, 1)])
def test_two_runs_are_compared_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spread: float, status: int
) -> None:
    """3% for whole models, 5% for kernels: 4% is too much for the one and not for the other."""
    paths = []
    for name, factor in (("a", 1.0), ("b", 1.0 + spread)):
        rows = [
            {"name": "whole", "section": "llama-7b", "figure": 100.0 * factor, "met": True},
            {"name": "kernel", "section": "gemm", "figure": 10.0 * factor, "met": True},
            {"name": "build", "section": "startup", "figure": 10.0 * (factor + spread), "met": True},
            {"name": "only here", "section": "gemm", "figure": None if name == "a" else 1.0, "met": True},
            {"name": "checked", "section": "values", "figure": 10.0 * factor, "unit": "steps", "met": None},
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"sources": {}, "rows": rows}))
    assert record.main(["--compare", *map(str, paths)]) == status
    printed = capsys.readouterr().out
    page = performance_page.render("<!-- table spread -->\n<!-- end -->\n", *map(record.load, paths))
    assert f"| llama-7b | 1 | {spread:.1%} | {spread:.1%} | 3% | {'whole ' * status}| |" in page
    assert f"{spread:.1%}" in printed and f"{status} of 3 rows further apart" in printed and "only here" not in printed
    assert "checked" not in printed


def test_a_peer_s_time_and_the_card_s_clock_are_not_judged(tmp_path: Path) -> None:
    """Of a ratio where memory bounds us our time is, of a first token under load its clocks; of all else the figure."""
    light, heavy = "gemm fp8 rowwise 1x12288x4096", "gemm fp8 rowwise 2048x12288x4096"
    made = []
    for name, us, peer_us, first, mhz in (("a", 10.0, 15.0, 12.0, 1400.0), ("b", 10.1, 18.0, 12.6, 1350.0)):
        kernels = [
            {"name": case, "plugin": "gemm", "us": us, "tb_per_second": 4.0, "tflops": 1.0, "fraction": 0.9,
             "bound_by": bound, "peer": "cuBLASLt", "peer_us": peer_us, "ratio": peer_us / us}
            for case, bound in ((light, "memory"), (heavy, "tensor cores"))
        ]  # fmt: skip
        grid = latency("llama-7b", 1, 505.0)
        grid["results"][0] |= {"first_token_ms": first, "first_token_mhz": mhz}
        document = {"mode": "kernel", "command": "fp8-bench kernel", "ceilings": {}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.json").write_text(json.dumps({**document, "results": kernels}))
        (tmp_path / name / "llama-7b.json").write_text(json.dumps(grid))
        made.append(record.record(figures.read(tmp_path / name)))
    found = {s.name: s for s in record.spreads(*made)}
    ratio, product = (found[f"{case}: ratio to cuBLASLt"] for case in (light, heavy))
    assert ratio.own == (10.0, 10.1) and ratio.own_unit == "us" and ratio.by_the_card and not ratio.too_far
    assert ratio.fraction == pytest.approx(1.8 / 1.01 / 1.5 - 1)
    assert product.own is None and product.too_far and not product.by_the_card
    (token,) = (s for s in found.values() if "first token" in s.name)
    assert token.own == pytest.approx((16.8, 17.01)) and token.fraction == pytest.approx(0.05) and token.by_the_card
    assert token.own_fraction == pytest.approx(0.0125), "it takes more time and more clocks"
    assert dataclasses.replace(ratio, own=(10.0, 10.6)).too_far, "our own time is apart, too"
    assert not dataclasses.replace(ratio, second=ratio.first, own=(10.0, 10.6)).too_far, "the figures agree"
    for row in made[1]["rows"]:
        row.pop("own", None)
    assert all(s.own is None for s in record.spreads(*made)), "a record of before has figures alone"


@pytest.mark.parametrize(
    ("slower", "mhz", "own_fraction"),
    [
        (1.05, 1400 / 1.05, 0.0),  # all of it takes clocks
        (1.05, 1400 / 1.15, 0.0),  # memory, which has its own clock, bounds half of it
        (1.05, 1400 / 1.03, 0.02),  # more than clocks explain, but no more than is allowed
        (1.05, 1400.0, 0.05),  # equal clocks: the software's, as where they are not known
        (1.05, 1450.0, 0.0875),  # slower, though clocks are faster
    ],
)
def test_the_slower_run_takes_more_time_and_not_more_clocks(
    tmp_path: Path, slower: float, mhz: float, own_fraction: float
) -> None:
    made = []
    for name, factor, clock in (("a", 1.0, 1400.0), ("b", slower, mhz)):
        grid = latency("llama-7b", 16, 4000.0 / factor)
        (row,) = grid["results"]
        row |= {"time_per_output_token_ms": 2.0 * factor, "fraction_of_bound": 0.9 / factor}
        row |= {"mhz": clock, "decode_mhz": clock}
        queue = {"input_len": 128, "output_len": 128, "measured": "steady", "output_tokens_per_second": 3e4 / factor}
        (tmp_path / name).mkdir()
        (tmp_path / name / "llama-7b.json").write_text(json.dumps(grid))
        document = {"mode": "throughput", "command": "fp8-bench throughput", "engine": engine("llama-3.1-8b")}
        document["results"] = [{**queue, "mhz": clock}]
        (tmp_path / name / "llama-3.1-8b.json").write_text(json.dumps(document))
        made.append(record.record(figures.read(tmp_path / name)))
    found = {s.name.split(": ")[1]: s for s in record.spreads(*made)}
    assert len(found) == 5 and found.pop("first token ms").own is None, "whose clock was not counted"
    for spread in found.values():
        assert spread.own is not None and spread.own_unit.endswith("million clocks")
        assert spread.own_fraction == pytest.approx(own_fraction, rel=0.1, abs=1e-9)
        assert spread.by_the_card == (own_fraction <= 0.03) and spread.too_far == (own_fraction > 0.03)


def test_a_page_with_an_unknown_table_is_refused() -> None:
    page = "text\n<!-- table nonsense -->\n<!-- end -->\n"
    with pytest.raises(EngineError, match="a table 'nonsense'"):
        performance_page.render(page, record.load(DOCS / "performance" / "h200.json"))


def test_prose_between_tables_stays() -> None:
    page = "before\n<!-- table summary -->\nold\n<!-- end -->\nafter\n"
    made = performance_page.render(page, record.load(DOCS / "performance" / "h200.json"))
    assert made.startswith("before\n<!-- table summary -->\ndevice ") and made.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in made and performance_page.render(made, record.load(DOCS / "performance" / "h200.json")) == made


def test_a_page_that_does_not_say_why_targets_are_missed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llama-7b.json").write_text(json.dumps(latency("llama-7b", 1, 400.0)))
    made = record.record(figures.read(tmp_path))
    table, mark = "<!-- table llama-7b -->\n<!-- end -->\n", "<!-- why llama-7b -->\n"
    for page in (table, table + mark, f"{table}{mark}\n## Next\n"):
        with pytest.raises(EngineError, match="no <!-- why llama-7b --> with the reasons"):
            performance_page.render(page, made)
    assert "missed" in performance_page.render(f"{table}{mark}The cache is read twice.\n", made)


def test_the_largest_losses_of_every_step_are_kept(tmp_path: Path) -> None:
    rows = [
        {"step": step, "kernel": kernel, "us": 10.0, "bound_us": 4.0, "fraction": 0.4, "loss_us": loss, "share": 0.1}
        for step in ("decode 1 x 1024", "prompt 8192")
        for kernel, loss in (("whole step", 50.0), *((f"k{i}", 9.0 - i) for i in range(6)))
    ]
    document = {"mode": "roofline", "command": "fp8-bench roofline", "engine": engine("llama-7b"), "results": rows}
    (tmp_path / "llama-7b-roofline.json").write_text(json.dumps(document))
    made = record.record(figures.read(tmp_path))
    kept = [(row["step"], row["kernel"]) for row in made["losses"]]
    assert kept[:5] == [("decode 1 x 1024", k) for k in ("whole step", "k0", "k1", "k2", "k3")] and len(kept) == 10
    page = performance_page.render("<!-- table losses -->\n<!-- end -->\n", made)
    assert "| llama-7b fp8 + fp8 kv | prompt 8192 | `k0` | 10 | 4 | 40% | 9 |" in page


def test_how_right_engines_are_stands_on_the_page(tmp_path: Path) -> None:
    row = {"format": "fp8", "kv_cache_dtype": "float8_e4m3fn", "prefill_db": 31.16, "decode_db": 31.49, "own_db": None}
    row |= {"perplexity_cpu": 5.74183, "perplexity_gpu": 5.73027}
    (tmp_path / "engines.json").write_text(json.dumps({"command": "gpu_engines FP8/engine", "rows": [row]}))
    page = "<!-- table engines -->\n<!-- end -->\n"
    made = performance_page.render(page, record.record(figures.read(tmp_path)))
    assert "| fp8 + fp8 kv | 31.2 | 31.5 | | 5.7418 | 5.7303 |" in made
    assert "Not measured yet." in performance_page.render(page, {"sources": {}, "rows": []}), "a record of before"


def test_headlines_are_rows_with_a_peer(tmp_path: Path) -> None:
    peers = {target.name: target.anchor for target in targets()}
    assert all(peers[name] for name in HEADLINES) and len(set(HEADLINES)) == len(HEADLINES)
    (tmp_path / "llama-7b.json").write_text(json.dumps(latency("llama-7b", 1, 592.0)))
    page = performance_page.render("<!-- table headlines -->\n<!-- end -->\n", record.record(figures.read(tmp_path)))
    assert "batch 1: tokens/s | 592 | 296 (vLLM) | 2 x | at least 500 | met |" in page


def test_pictures_are_drawn(tmp_path: Path) -> None:
    step = {"step": "decode 1 x 1024", "plugin": "gemm", "us": 100.0, "share": 0.99}
    rows = [{**step, "kernel": "whole step"}, {**step, "kernel": "lm_head"}]
    rows += [{**step, "kernel": f"small {i}", "us": 0.5, "share": 0.005} for i in range(2)]
    roofline = {"mode": "roofline", "command": "fp8-bench roofline", "engine": engine("llama-7b"), "results": rows}
    documents = {"llama-7b": latency("llama-7b", 1, 500.0), "llama-7b-roofline": roofline}
    (split,) = performance_plot.splits(documents).values()
    assert split == {"lm_head": 100.0, "others": 1.0}
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    assert performance_plot.main(["--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    for picture in ("tokens.png", "step.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_targets_have_anchors_that_they_beat() -> None:
    """Where a peer has a figure in the row's unit, the target is no worse than it."""
    for target in targets():
        if target.anchor is not None and target.target is not None:
            assert math.isfinite(target.anchor)
            better = target.target >= target.anchor if target.at_least else target.target <= target.anchor
            assert better, target.name
