"""The table of tactics that ships: its names and files, what builds take of it, and the command that makes it."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_trial import BF16, FAST, SLOW, TYPES, CpuTrial, Way, ignore, site
from rich.console import Console
from rich.progress import Progress

from fp8.builder import tactic_table
from fp8.builder.tactic_table import Entry, Table, TableError, digest_of_tactics, op_name, parse_op
from fp8.builder.timer import Timer
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.base import Tensor, load
from fp8.scripts import table_sites, tune_table
from fp8.scripts.table_tuning import Tuning, opened


def entry(one: Site, tactic: Any, kernels: str = "") -> Entry:
    """That won against what the plugin favours now."""
    return Entry(tactic_fields(tactic), 1.0, digest_of_tactics(one.favourites), kernels)


def test_the_name_of_an_op_tells_it_all() -> None:
    ops = [
        (load("gemm")(), BF16),
        (load("gemm")(out_dtype="float32", rows="L", accumulation="precise"), BF16),
        (load("norm_quant")(quant="static", residual=True, epsilon=1e-6), (TYPES[0], None)),
        (load("all_gather")(parts=(16, 8)), (Tensor("float32", ("L", 16)),)),
    ]
    assert op_name(*ops[0]) == "gemm|bfloat16 T,64|bfloat16 64,64|-|-|-"
    assert op_name(*ops[1]).startswith("gemm out_dtype=float32 rows=L accumulation=precise|")
    assert [parse_op(op_name(*op)) for op in ops] == ops


def test_builds_take_the_table_s_tactic_and_that_of_the_nearest_range(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = load("gemm")()
    at = lambda rows: Site(plugin, BF16, rows)
    few, many = at(8).candidates()[1], at(512).candidates()[-2]
    entries = {8: entry(at(8), few), 512: entry(at(512), many)}
    monkeypatch.setattr(tactic_table, "shipped", lambda: Table({}, {at(8).op: entries}))
    assert at(8).candidates()[0] == few and at(512).candidates()[0] == at(700).candidates()[0] == many
    assert at(16).candidates() == plugin.tactics(BF16, 16), "8 rows are too far from 16"
    assert Site(load("gemm")(rows="L"), BF16, 8).candidates()[0] != few
    assert at(7).candidates()[0] == few
    measured = at(8).candidates()[3]
    assert at(8).candidates(tactic_fields(measured))[:2] == [measured, few], "what was timed here goes before"


def test_another_field_of_a_tactic_puts_no_entry_in_doubt() -> None:
    old = dataclasses.make_dataclass("Tile", [("M", int), ("SPLIT", int, 1)], frozen=True)
    new = dataclasses.make_dataclass("Tile", [("M", int), ("SPLIT", int, 1), ("PER_SM", int, 1)], frozen=True)
    assert digest_of_tactics([old(64), old(64, 2)]) == digest_of_tactics([new(64), new(64, 2)])
    assert digest_of_tactics([old(64)]) != digest_of_tactics([new(64, 1, 2)])


def test_a_linear_per_row_takes_the_tactic_of_the_one_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = (Tensor("float8_e4m3fn", ("T", 256)), Tensor("float8_e4m3fn", (512, 256)))
    w_scale = Tensor("float32", (512,))
    tensor, row, block = (
        Site(load("gemm")(), (*codes, *scales, None), 512)
        for scales in (
            (Tensor("float32", (1,)), w_scale),
            (Tensor("float32", ("T",)), w_scale),
            (Tensor("float32", ("T", 2)), Tensor("float32", (64, 2))),
        )
    )
    last = tensor.offered[-2]
    table = Table({}, {tensor.op: {512: entry(tensor, last)}})
    monkeypatch.setattr(tactic_table, "shipped", lambda: table)
    assert tensor.candidates()[0] == row.candidates()[0] == last
    assert block.candidates() == list(block.offered)
    first = row.offered[1]
    table.put(row.op, 512, entry(row, first))
    assert row.candidates()[0] == first, "its own goes before"


def test_a_stale_entry_falls_back_to_the_plugin_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Site(load("gemm")(), BF16, 64)
    right = tactic_fields(one.candidates()[0])
    stale: list[dict[str, Any]] = [
        right | {"kind": "gone"}, right | {"KNOB": 1}, right | {"STAGES": 1000}, {"kind": "library", "KNOB": 0}, {},
    ]  # fmt: skip
    for fields in stale:
        table = Table({}, {one.op: {64: dataclasses.replace(entry(one, one.offered[0]), tactic=fields)}})
        monkeypatch.setattr(tactic_table, "shipped", lambda table=table: table)
        assert one.candidates() == list(one.offered), fields
    second = dataclasses.replace(entry(one, one.offered[1]), favourites="others")
    monkeypatch.setattr(tactic_table, "shipped", lambda: Table({}, {one.op: {64: second}}))
    assert one.candidates()[0] == one.offered[1], "what was measured goes before what a model expects"


def test_a_table_is_written_and_read(tmp_path: Path) -> None:
    table = Table({"GPU": "NVIDIA H200"})
    table.put("gemm|-", 8, Entry({"kind": "library"}, 1.2345, "abc", "def"))
    tactic_table.write(tmp_path / "t.json", table)
    assert tactic_table.read(tmp_path / "t.json") == Table(
        {"GPU": "NVIDIA H200"}, {"gemm|-": {8: Entry({"kind": "library"}, 1.234, "abc", "def")}}
    )
    for content in ("", "[]", "{}", '{"format": 2, "measured": {}, "tactics": {"a": {"b": [1, 2, 3, 4]}}}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(TableError, match="no table of tactics, or damaged"):
            tactic_table.read(tmp_path / "t.json")
    (tmp_path / "t.json").write_text('{"format": 1}')
    with pytest.raises(TableError, match="has format 1, expected 2"):
        tactic_table.read(tmp_path / "t.json")
    with pytest.raises(TableError, match="cannot be read"):
        tactic_table.read(tmp_path / "none.json")


def tune(table: Table, sites: list[Site], output: Path, end: float = math.inf) -> Tuning:
    tuning = Tuning(table, sites)
    with Timer(CpuTrial) as timer, ThreadPoolExecutor(1) as pool, Progress() as progress:
        tuning.run(timer, Compiler(pool, ignore, ignore), end, progress, output)
    tuning.write(output)
    return tuning


def test_the_table_is_made_from_the_favourites_and_continued(tmp_path: Path) -> None:
    output, facts = tmp_path / "t.json", {"GPU": "NVIDIA H200"}
    ways = [SLOW, FAST, *(Way("right", 30.0 + i) for i in range(4)), Way("right", 1.0)]
    first, second, broken = site(*ways), site(FAST, SLOW, rows=8), site(Way("raises"), Way("wrong"), rows=32)
    every, fastest = [first, second, broken], ways[-1]
    made = tune(Table(facts), every, output)
    assert made.summary().startswith("2 choices timed, 2 in the table, 1 left; the models' favourites are 150.00% slow")
    written = tactic_table.read(output)
    assert written.entries[first.op][16].tactic == tactic_fields(FAST), "the last is no favourite"
    assert Tuning(opened(output, facts, Console()), every).missing() == [broken]
    written.put(first.op, 16, entry(first, fastest, "other kernels"))
    assert Tuning(written, every).missing() == [broken, first]
    written.put(first.op, 16, dataclasses.replace(entry(first, fastest), favourites="others"))
    assert Tuning(written, every).missing() == [broken, first]
    written.put(second.op, 8, entry(second, FAST, "other kernels"))
    assert Tuning(written, every).missing() == [broken, first, second]
    kept = tune(written, [first], output)
    assert kept.table.entries[first.op][16].tactic == tactic_fields(fastest), "what won before is timed too"


def test_what_is_not_legal_any_more_is_dropped_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, one = tmp_path / "t.json", Site(load("gemm")(), BF16, 64)
    gone = dataclasses.replace(entry(one, one.offered[0]), tactic={"kind": "gone"})
    table = Table(
        {}, {one.op: {64: entry(one, one.offered[0]), 128: gone}, "gone|-": {8: gone}, "gemm x=1|-": {8: gone}}
    )
    tactic_table.write(path, table)
    assert (
        tune_table.main(["--output", str(path), "--prune"]) == 0
        and "3 entries dropped, 1 left" in capsys.readouterr().out
    )
    assert tactic_table.read(path).entries == {one.op: {64: entry(one, one.offered[0])}}
    path.write_text("{")
    assert tune_table.main(["--output", str(path), "--prune"]) == 1 and "damaged" in capsys.readouterr().err


def test_the_clock_ends_the_table_s_making(tmp_path: Path) -> None:
    made = tune(Table(), [site(SLOW, FAST)], tmp_path / "t.json", end=0)
    assert len(made.table) == 0 and made.summary() == "0 choices timed, 0 in the table, 1 left"
    assert tactic_table.read(tmp_path / "t.json").entries == {}


def test_a_table_of_another_gpu_or_a_damaged_one_is_begun_anew(tmp_path: Path) -> None:
    path, console = tmp_path / "t.json", Console(record=True, width=300)
    assert len(opened(path, {"GPU": "NVIDIA H200"}, console)) == 0 and not console.export_text()
    tactic_table.write(path, Table({"GPU": "NVIDIA H100"}, {"gemm|-": {8: Entry({}, 1.0, "", "")}}))
    assert len(opened(path, {"GPU": "NVIDIA H200"}, console)) == 0
    assert "is of NVIDIA H100, this is NVIDIA H200: it is begun anew" in console.export_text()
    path.write_text("{")
    assert len(opened(path, {"GPU": "NVIDIA H200"}, console)) == 0 and "begun anew" in console.export_text()


def test_the_table_s_sites_are_those_of_engines_with_the_largest_first() -> None:
    wanted = table_sites.shapes(["llama-7b", "llama-2-13b"], ["fp8"], [1, 4])
    found = table_sites.sites(wanted, 8192)
    ops = {s.op: None for s in found}
    for n, k in ((12288, 4096), (4096, 1024), (3840, 5120), (5120, 3456)):
        assert f"gemm|float8_e4m3fn T,{k}|float8_e4m3fn {n},{k}|float32 1|float32 {n}|-" in ops
    assert "22016,4096" in found[0].op and len(found) == len(set(found)) > 150
    ends = sorted(s.max_tokens for s in found if s.op == found[0].op)
    assert ends == load("gemm")().buckets(8192)


def test_the_command_says_what_is_missing_and_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--output", str(tmp_path / "t.json"), "--model", "llama-7b", "--tp_size", "1"]
    assert tune_table.main([*arguments, "--list"]) == 0
    assert (
        "gemm|float8_e4m3fn T,4096|float8_e4m3fn 4096,4096|float32 1|float32 4096|- up to 8 rows"
        in capsys.readouterr().out
    )
    if not torch.cuda.is_available():
        assert tune_table.main(arguments) == 1 and "torch sees none" in capsys.readouterr().err
    assert tune_table.main([*arguments, "--workers", "0"]) == 1 and "at least 1" in capsys.readouterr().err
    assert tune_table.main(["--output", str(tmp_path / "none" / "t.json")]) == 1
    assert "is no directory" in capsys.readouterr().err and not (tmp_path / "t.json").exists()
