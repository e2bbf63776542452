"""Every plugin, by its own cases: without a GPU types, references and compilation; with one the whole round."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8.plugins import base, compile
from fp8.plugins.base import Case, Tensor
from fp8.scripts import gpu_round
from fp8.scripts.benchmarks import case_buffers

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
        return case_buffers.types(case.make(torch.Generator(), "cpu"))


def test_every_plugin_has_cases_of_its_own() -> None:
    assert {name for name, _ in CASES} == set(base.names())
    for name, case in CASES:
        assert type(case.plugin) is base.load(name) and case.why and case.tolerance < 0.1
    assert len({by_name(pair) for pair in CASES}) == len(CASES)


@pytest.mark.parametrize("pair", [p for p in CASES if is_small(p[1])], ids=by_name)
def test_reference_gives_what_infer_says(pair: tuple[str, Case]) -> None:
    case = pair[1]
    inputs = case.make(torch.Generator().manual_seed(1), "cpu")
    inferred = case.plugin.infer(case_buffers.types(inputs))
    assert tuple(case_buffers.types(base.run_reference(case.plugin, inputs, case.step, base.Alone()))) == inferred


@pytest.mark.parametrize("name", base.names())
def test_shipped_tactics_compile_without_serialization_or_many_spills(name: str) -> None:
    kernels = {}
    for _, case in [p for p in CASES if p[0] == name][:: 3 if name in ("attention", "norm_quant") else 1]:
        types = input_types(case)
        tactics = case.plugin.tactics(types, case.step.tokens)
        assert tactics, f"{case.name}: no tactic"
        for tactic in tactics[:TACTICS]:
            assert case.plugin.tactic(gpu_round.asdict(tactic)) == tactic
            kernels |= {kernel: case.name for kernel in case.plugin.kernels(tactic, types)}
    cubins = compile.compile_all(kernels).values()
    print(*(f"{kernels[c.kernel]}: {c.spill_bytes} bytes of spills" for c in cubins if c.spill_bytes), sep="\n")
    bad = [(kernels[c.kernel], c.kernel, c.spill_bytes) for c in cubins if c.serialized or c.spill_bytes > SPILLS]
    assert (cubins or base.load(name).collective) and not bad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
def test_kernels_agree_with_their_references() -> None:
    assert gpu_round.main(["--no-bench"]) == 0


def test_the_round_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_round.main([]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().out
