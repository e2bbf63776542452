"""Every plugin, by its own cases: without a GPU types, references and compilation; with one the whole round."""

import argparse
import itertools
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8.plugins import base, compile
from fp8.plugins.base import Case, Tensor
from fp8.scripts import gpu_round
from fp8.scripts.benchmarks import case_buffers, isolated
from fp8.scripts.benchmarks.checks import Chosen, Row

CASES = case_buffers.all_cases()
SMALL = 4 << 20  # bytes and a thousandth of the operations that a reference may take here
SPILLS = 256  # bytes that ptxas may report in its notes: a few scalars outside of the main loops
TACTICS = 2  # compiled for each case; the plugin's favourites


def is_small(case: Case) -> bool:
    return case.bytes <= SMALL and case.flops <= 1000 * SMALL and case.step.tokens * case.step.max_context <= 2**18


def by_name(pair: tuple[str, Case]) -> str:
    return f"{pair[0]}: {pair[1].name}"


def input_types(case: Case) -> list[Tensor | None]:
    """Types of the inputs, without the memory that they take; only a shuffled list needs values."""
    shuffled = mock.patch("torch.randperm", lambda n, **_: np.arange(n))
    with FakeTensorMode(allow_non_fake_inputs=True), shuffled:
        return base.types_of(case.make(torch.Generator(), "cpu"))


def test_every_plugin_has_cases_of_its_own() -> None:
    assert {name for name, _ in CASES} == set(base.names())
    for name, case in CASES:
        assert isinstance(case.plugin, base.load(name)) and case.why and case.tolerance < 0.1
    assert len({by_name(pair) for pair in CASES}) == len(CASES)


@pytest.mark.parametrize("pair", [p for p in CASES if is_small(p[1])], ids=by_name)
def test_reference_gives_what_infer_says(pair: tuple[str, Case]) -> None:
    case = pair[1]
    inputs = case.make(torch.Generator().manual_seed(1), "cpu")
    inferred = case.plugin.infer(base.types_of(inputs))
    assert tuple(base.types_of(base.run_reference(case.plugin, inputs, case.step, base.Alone()))) == inferred


@pytest.mark.parametrize("name", base.names())
def test_shipped_tactics_compile_without_serialization_or_many_spills(name: str) -> None:
    kernels = {}
    for _, case in [p for p in CASES if p[0] == name][:: 3 if name in ("attention", "norm_quant") else 1]:
        types = input_types(case)
        tactics = case.plugin.tactics(types, case.step.tokens)
        assert tactics, f"{case.name}: no tactic"
        for tactic in tactics[:TACTICS]:
            assert case.plugin.tactic(asdict(tactic)) == tactic
            kernels |= {kernel: case.name for kernel in case.plugin.kernels(tactic, types)}
    cubins = compile.compile_all(kernels).values()
    print(*(f"{kernels[c.kernel]}: {c.spill_bytes} bytes of spills" for c in cubins if c.spill_bytes), sep="\n")
    bad = [(kernels[c.kernel], c.kernel, c.spill_bytes) for c in cubins if c.serialized or c.spill_bytes > SPILLS]
    assert (cubins or base.load(name).collective) and not bad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
def test_kernels_agree_with_their_references() -> None:
    assert gpu_round.main(["--no-bench"]) == 0


def _fails_in_places(chosen: Chosen) -> isolated.Answers:
    """Answers as `checks.checking` does, with a time of 1 us; what becomes of a case is its name's word. `plugin` is
    where a case that does not fit is noted: the next time it does."""
    cases, noted = fake_cases(), Path(chosen.plugin)

    def answer(question: tuple[int, list[Row] | None]) -> tuple[list[Row], bool]:
        place, rows = question
        name, case = cases[place]
        if "dies" in case.name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if rows is not None:
            return [replace(row, us=1.0) for row in rows], True
        failure = "AssertionError: lost" if "breaks" in case.name else ""
        if "unfit" in case.name and not noted.exists():
            noted.touch()
            failure = "OutOfMemoryError: 3 GiB"
        return [Row(name, case.name, {}, failure=failure)], "breaks" not in case.name

    return answer


def fake_cases() -> list[tuple[str, Case]]:
    words = ("right", "dies", "breaks", "right too", "unfit", "right as well")
    sizes = (40, 30, 20, 10, 1, 5)
    return [("add", replace(CASES[0][1], name=w, bytes=s)) for w, s in zip(words, sizes, strict=True)]


def test_cases_checked_side_by_side_are_lost_alone_and_timed_by_one_process(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    show = lambda *progress: told.append(progress)
    chosen = Chosen(str(tmp_path / "noted"))
    found = gpu_round.side_by_side(chosen, fake_cases(), True, show, workers=2, make=_fails_in_places)
    rows = {row.case: row for of_case in found for row in of_case}
    assert list(rows) == [case.name for _, case in fake_cases()], "in the order of the cases"
    assert rows["dies"].failure == "Lost: its process was ended by SIGSEGV"
    assert rows["breaks"].failure == "AssertionError: lost"
    right = [rows[name] for name in ("right", "right too", "unfit", "right as well")]
    assert all(not row.failure and row.us == 1.0 for row in right)
    assert rows["dies"].us is None and rows["breaks"].us is None
    assert [p for p in told if p[1] == p[2]] == [("checks", 6, 6), ("alone", 1, 1), ("times", 4, 4)]


def test_shares_of_a_round_are_all_of_it() -> None:
    whole = [case.name for _, case in Chosen("norm_quant").cases()]
    dealt = [
        [case.name for _, case in Chosen("norm_quant", share=gpu_round.share(f"{i}/3")).cases()] for i in (1, 2, 3)
    ]
    assert sorted(itertools.chain(*dealt)) == sorted(whole) and max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for text in ("0/3", "4/3", "3", "1/0", "-1/3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not I/N with I from 1 to N"):
            gpu_round.share(text)


def test_the_round_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_round.main([]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().out
