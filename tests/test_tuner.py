"""The tuner: what it drops and takes, what it remembers and distrusts, and the table that ships."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_trial import (
    BF16,
    FAST,
    FAULTS,
    FAULTY,
    FLOATS,
    ROWS,
    SLOW,
    CpuTrial,
    Faulty,
    NoGpu,
    SmallGpu,
    Way,
    ignore,
    site,
)  # fmt: skip

from fp8.builder import measure
from fp8.builder.engine import Limits
from fp8.builder.tactic_cache import TacticCache
from fp8.builder.timer import NothingWorks, Timer, TuneError
from fp8.builder.trial import Job, Operands, Trial, WrongResult
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.base import Launcher, PluginError, StepShape, Tensor, load
from fp8.scripts import table_sites
from fp8.scripts.random_checkpoint import PRESETS
from fp8.scripts.table_sites import Shape

H200 = {"GPU": "NVIDIA H200", "driver": "580.1", "fp8-engine": "0.1.0", "torch": "2.11"}
TINY = {
    **PRESETS["llama-7b"], "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip


def several(*sites: Site) -> Any:
    """What `measure` reads of `plan.Tactics`."""
    return SimpleNamespace(sites={str(i): [s] for i, s in enumerate(sites)}, limits=Limits(4, 128, 64))


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an H200, and the file that it remembers tactics in."""
    monkeypatch.setenv("FP8_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measure, "machine", lambda: H200)
    return TacticCache(tmp_path / "tactics", H200, ignore).path


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
        assert "was ended by SIGSEGV" in why["killed"] and "no answer within 3 s" in why["hangs"]
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
    assert "illegal" in why["illegal_address"] and "no answer within 5 s" in why["endless"]
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


def test_a_place_that_no_kernel_takes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = load("gemm")()
    monkeypatch.setattr(type(plugin), "tactics", lambda *_: [])
    with pytest.raises(
        PluginError, match=r"gemm: model\.layers\.0\.o_proj: no kernel takes up to 8 rows .* --target cpu"
    ):
        Site(
            plugin, (Tensor("bfloat16", ("T", 7)), Tensor("bfloat16", (9, 7))), 8, "model.layers.0.o_proj"
        ).candidates()


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
