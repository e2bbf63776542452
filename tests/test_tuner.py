"""The tuner: what it drops and takes, what it remembers and distrusts, and the table that ships."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_trial import FAULTS, FAULTY, FLOATS, ROWS, TYPES, CpuTrial, Faulty, NoGpu, Scaled, SmallGpu, Way
from rich.console import Console
from rich.progress import Progress

from fp8.builder import measure, tactic_table
from fp8.builder.engine import Limits
from fp8.builder.tactic_cache import TacticCache
from fp8.builder.tactic_table import Entry, Table, TableError, digest_of_tactics, op_name, parse_op
from fp8.builder.timer import NothingWorks, Timer, TuneError
from fp8.builder.trial import Job, Operands, Trial, WrongResult
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.base import Launcher, StepShape, Tensor, load
from fp8.scripts import table_sites, tune_table
from fp8.scripts.random_checkpoint import PRESETS
from fp8.scripts.table_sites import Shape
from fp8.scripts.tune_table import Tuning, opened

H200 = {"GPU": "NVIDIA H200", "driver": "580.1", "fp8-engine": "0.1.0", "torch": "2.11"}
BF16 = (Tensor("bfloat16", ("T", 64)), Tensor("bfloat16", (64, 64)), None, None, None)
TINY = {
    **PRESETS["llama-7b"], "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
SLOW, FAST = Way("right", 20.0), Way("right", 5.0)


def site(*ways: Way, rows: int = ROWS) -> Site:
    return Site(Scaled(" ".join(f"{w.kind}:{w.microseconds}" for w in ways)), TYPES, rows, "model.layers.0")


def several(*sites: Site) -> Any:
    """What `measure` reads of `plan.Tactics`."""
    return SimpleNamespace(sites={str(i): [s] for i, s in enumerate(sites)}, limits=Limits(4, 128, 64))


def ignore(*_: object) -> None: ...


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an H200, and the file that it remembers tactics in."""
    monkeypatch.setenv("FP8_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "machine", lambda: H200)
    return TacticCache(tmp_path / "tactics", H200, ignore).path


def entry(one: Site, tactic: Any, kernels: str = "") -> Entry:
    """That won against what the plugin favours now."""
    return Entry(tactic_fields(tactic), 1.0, digest_of_tactics(one.favourites), kernels)


def timed(timer: Timer, site: Site, warn: Any = ignore) -> measure.Timed:
    with ThreadPoolExecutor(1) as pool:
        return measure.time_site(site, site.candidates(), timer, Compiler(pool, ignore, warn), 4, warn)


def test_a_tactic_that_fails_is_dropped_with_a_warning_that_names_it_and_the_rest_is_tuned_on() -> None:
    warnings: list[str] = []
    ways = [Way(kind, 1.0) for kind in FAULTS]
    with Timer(CpuTrial, seconds=3) as timer:
        found = timed(timer, site(*ways, SLOW, FAST), warnings.append)
        assert found.best == FAST and set(found.seconds) == {SLOW, FAST}
        assert len(warnings) == len(FAULTS)
        why = dict(zip(FAULTS, sorted(warnings, key=lambda w: FAULTS.index(w.split("'")[1])), strict=True))
        assert all("scaled: model.layers.0: up to 16 rows: dropped Way(kind=" in w for w in warnings)
        assert "OUT_OF_RESOURCES" in why["raises"] and "ILLEGAL_ADDRESS" in why["lost"]
        assert "in a row) against the reference" in why["wrong"] and "16 rows: error" in why["one_row"]
        assert "not written everywhere" in why["unwritten"] and "with 11 rows" in why["ragged"]
        assert "was ended by SIGSEGV" in why["killed"] and "did not end within 3 s" in why["hangs"]
        with pytest.raises(NothingWorks, match="no tactic works on this GPU"):
            timed(timer, site(Way("raises"), Way("wrong")))
        assert timed(timer, site(SLOW, FAST)).gain == (20e-6, 5e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels: needs an H100 or H200")
def test_kernels_that_fail_on_a_gpu_are_dropped_and_the_rest_is_tuned_on() -> None:
    warnings: list[str] = []
    ways = " ".join(f"{kind}:1" for kind in (*FAULTY, "right"))
    with Timer(Trial, seconds=5) as timer:
        found = timed(timer, Site(Faulty(ways), FLOATS, ROWS, "here"), warnings.append)
    assert set(found.seconds) == {Way("right", 1.0)} and 0 < found.gain[1] < 1e-4
    assert len(warnings) == len(FAULTY) - 1 and "refused" in warnings[0], warnings
    why = dict(zip(sorted(set(FAULTY) - {"right", "refused"}), sorted(warnings[1:]), strict=True))
    assert "illegal" in why["illegal_address"] and "did not end within 5 s" in why["endless"]
    assert "INVALID_VALUE" in why["too_much_shared"] and "against the reference" in why["wrong"]


def test_operands_that_do_not_fit_leave_the_favourite_and_other_sites_are_tuned_on(h200: Path) -> None:
    remarks: list[str] = []
    large, small = site(SLOW, FAST, rows=2 * ROWS), site(SLOW, FAST)
    found = measure.measure(several(large, small), ignore, remarks.append, remarks.append, SmallGpu)
    assert found == {large.label: tactic_fields(SLOW), small.label: tactic_fields(FAST)}
    assert "not timed: OutOfMemoryError: tried to allocate 100 GiB" in remarks[0]
    assert len(json.loads(h200.read_text())["winners"]) == 1, "a choice that was not timed is not remembered"


def test_many_rows_are_timed_under_load_and_few_in_bursts() -> None:
    cool, hot = Way("right", 100.0), Way("right", 104.5)
    with Timer(CpuTrial) as timer:
        assert timed(timer, site(hot, cool, rows=2048)).best == cool
        assert timed(timer, site(hot, cool, rows=512)).best == hot


def test_a_process_that_cannot_start_is_an_error() -> None:
    with Timer(NoGpu) as timer, pytest.raises(TuneError, match="cannot start: RuntimeError: torch sees no sm_90 GPU"):
        timed(timer, site(SLOW, FAST))


def test_the_fastest_is_remembered_and_not_timed_again(h200: Path) -> None:
    remarks: list[str] = []
    tactics = several(site(SLOW, FAST), site(FAST))  # the second has no choice
    for trial in (CpuTrial, NoGpu):  # the second time no process is started
        found = measure.measure(tactics, ignore, remarks.append, ignore, trial)
        assert found == {site(SLOW, FAST).label: tactic_fields(FAST)}
    assert remarks[1] == "1 choices timed; the favourites take 300.0% longer in all" and len(remarks) == 2
    with pytest.raises(TuneError):  # another candidate: another choice
        measure.measure(several(site(SLOW, FAST, Way("right", 4.0))), ignore, ignore, ignore, NoGpu)


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"GPU": "NVIDIA H100"}, "GPU NVIDIA H200, here NVIDIA H100"),
        ({"driver": "590.2"}, "driver 580.1, here 590.2"),
        ({"fp8-engine": "0.2.0"}, "fp8-engine 0.1.0, here 0.2.0"),
    ],
)
def test_tactics_of_another_machine_or_version_are_ignored_with_one_line(h200: Path, here: dict, said: str) -> None:
    cache = TacticCache(h200.parent, H200, ignore)
    with cache.turn():
        cache.put("entry", {"kind": "right"})
    assert TacticCache(h200.parent, H200, pytest.fail).get("entry") == {"kind": "right"}
    lines: list[str] = []
    other = TacticCache(h200.parent, H200 | here, lines.append)
    assert other.get("entry") is None and len(lines) == 1 and said in lines[0]
    other.path.write_bytes(h200.read_bytes())  # a file under a name that is not its own
    assert TacticCache(h200.parent, H200 | here, lines.append).get("entry") is None
    assert len(lines) == 2 and said in lines[1]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"format": 2}', b'{"format": 1, "facts": {}}',
     b'{"format": 1, "facts": {}, "winners": {"entry": 3}}'],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_one_line_and_replaced(h200: Path, content: bytes) -> None:
    h200.parent.mkdir(parents=True, exist_ok=True)
    h200.write_bytes(content)
    lines: list[str] = []
    cache = TacticCache(h200.parent, H200, lines.append)
    assert cache.get("entry") is None and len(lines) == 1 and "damaged and ignored" in lines[0]
    with cache.turn():
        cache.put("entry", {"kind": "right"})
    assert TacticCache(h200.parent, H200, pytest.fail).get("entry") == {"kind": "right"}


def test_a_remembered_tactic_that_is_not_offered_any_more_is_not_taken() -> None:
    gone: list[dict[str, Any]] = [{"kind": "gone"}, {"kind": "few_tokens"}, {"no": "kind"}]
    one = Site(load("gemm")(), BF16, 64)
    assert all(one.candidates(fields) == one.candidates() for fields in gone)
    last = one.candidates()[-1]
    assert one.candidates(tactic_fields(last))[0] == last


def test_builds_side_by_side_take_turns_and_keep_what_the_other_found(h200: Path) -> None:
    caches = [TacticCache(h200.parent, H200, ignore) for _ in range(2)]
    inside: list[int] = []

    def fill(index: int) -> None:
        for n in range(20):
            with caches[index].turn():
                inside.append(index)
                caches[index].put(f"{index}/{n}", {"n": n})
                assert inside.pop() == index and not inside, "alone"

    threads = [threading.Thread(target=fill, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(json.loads(h200.read_text())["winners"]) == 40
    assert all(TacticCache(h200.parent, H200, ignore).get(f"{i}/19") == {"n": 19} for i in range(2))


# The table


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
    assert not (tmp_path / "t.json").exists()


# Trials


@pytest.mark.parametrize("qformat", ["fp8", "fp8_rowwise", "fp8_block", "bf16"])
def test_the_check_takes_what_every_op_means_and_nothing_else(qformat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    names = set()
    for one in table_sites.sites([Shape("tiny", qformat, 1), Shape("tiny", qformat, 2)], 48):
        names.add(one.plugin.name)
        operands = Operands(Job(one.plugin, one.types, one.max_tokens, 4, ()), "cpu")
        operands.check(means(one, operands), ignore)
        with pytest.raises(WrongResult, match="in a row"):
            operands.check(means(one, operands, spoilt=1), ignore)
    assert {"gemm", "norm_quant"} <= names


def means(one: Site, operands: Operands, spoilt: int = 0) -> Launcher:
    """The reference as a launch, but for so many rows at the end."""

    def launch(step: StepShape) -> None:
        rows = step.tokens
        given = zip(operands.sets[0], one.types, strict=False)
        live = [t[:rows] if t is not None and isinstance(type_.shape[0], str) else t for t, type_ in given]
        for out, value in zip(operands.outputs, one.plugin.reference(*live, step=step), strict=True):
            out[:rows] = value
            out[rows - spoilt : rows] = 0 if spoilt else out[rows - spoilt : rows]

    return launch
