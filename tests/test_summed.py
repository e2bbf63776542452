"""A norm's residual, added in the epilogue of the linear layer in front: where, by which kernels, into which buffer."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8.builder import joins as builder
from fp8.builder import memory, tactic_table, tune
from fp8.builder.engine import Buffer, Limits, Plan, Step, Sum, TacticChoice
from fp8.builder.plan import Node
from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant
from fp8.plugins.base import Case, StepShape, Tensor, types_of
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.plugins.gemm.library import Library
from fp8.plugins.gemm.many_tokens import ManyTokens
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.gemm_send.plugin import GemmSend
from fp8.plugins.norm_quant import summed, summed_cases
from fp8.plugins.norm_quant.plugin import NormQuant
from fp8.runtime import joins as runtime
from fp8.scripts.benchmarks import case_buffers

E4M3 = "float8_e4m3fn"
IN_TURN = ManyTokens(128, 128, 6, PINGPONG=1)
FEW = FewTokens(64, 96, 1, 11, 1)
HIDDEN = 4096
BEHIND = TacticChoice(4096, {"threads": 512, "held": 1}, ("f",))
NORM = NormQuant("rms", 1e-5, "static", residual=True)


def of_linear(n: int = HIDDEN, k: int = 4096) -> tuple[Tensor | None, ...]:
    scales = Tensor("float32", (1,)), Tensor("float32", (n,))
    return Tensor(E4M3, ("T", k)), Tensor(E4M3, (n, k)), *scales, None


def of_norm(hidden: int = HIDDEN) -> tuple[Tensor | None, ...]:
    row = Tensor("bfloat16", ("T", hidden))
    return row, row, Tensor("bfloat16", (hidden,)), None, Tensor("float32", (1,)), None


def nodes(norm: NormQuant = NORM, swapped: bool = False) -> list[Node]:
    """A linear, a norm behind it, and who reads the norm."""
    first = ("y", "r") if swapped else ("r", "y")
    outputs = ("q",) if norm.gather else ("q", "sum")
    return [
        Node("o", Gemm(), of_linear(), ("x", "w", "s", "t", ""), ("y",)),
        Node("norm", norm, of_norm(), (*first, "gain", "", "scale", ""), outputs),
        Node("down", Gemm(), of_linear(), ("q", "w", "s", "t", ""), ("z",)),
        Node("norm 2", NORM, of_norm(), (outputs[-1], "z", "gain", "", "scale", ""), ("q2", "sum2")),
    ]


def steps(found: list[Node]) -> list[Step]:
    linear = [
        TacticChoice(512, dataclasses.asdict(FEW), ("a",)),
        TacticChoice(4096, dataclasses.asdict(IN_TURN), ("b",)),
    ]
    norm = [
        TacticChoice(128, {"threads": 256, "held": 2}, ("c",)),
        TacticChoice(4096, {"threads": 512, "held": 1}, ("d",)),
    ]
    return [
        Step(n.name, n.plugin.name, {}, n.inputs, n.outputs, tuple(linear if isinstance(n.plugin, Gemm) else norm))
        for n in found
    ]


def test_a_linear_adds_the_residual_of_the_norm_that_comes_next_and_alone_reads_it() -> None:
    assert builder.residual_pairs(nodes()) == [(0, 1), (2, 3)]
    assert builder.residual_pairs(nodes(swapped=True)) == [(0, 1), (2, 3)]
    alone = nodes(dataclasses.replace(NORM, residual=False))
    assert builder.residual_pairs(alone) == [(2, 3)], "nothing to add"
    gathered = nodes(dataclasses.replace(NORM, gather=True))[:2]
    assert builder.residual_pairs(gathered) == [], "the rows wanted, and no sum"
    reducing = nodes(AllReduceNormQuant("rms", 1e-5, "static", residual=True, world=2))
    assert builder.residual_pairs(reducing) == [(2, 3)], "a rank's rows are a part of the sum"
    found = nodes()
    assert builder.residual_pairs([found[0], found[2], found[1], found[3]]) == [], "others may want the memory between"
    twice = dataclasses.replace(found[3], inputs=("y", "z", "gain", "", "scale", ""))
    assert builder.residual_pairs([*found[:3], twice]) == [(2, 3)], "the output is wanted, too"


def test_the_kernel_is_the_linear_s_with_more_in_its_epilogue() -> None:
    (plain,) = many_tokens.kernels(Gemm(), IN_TURN, of_linear())
    found = summed.kernel(Gemm(), of_linear(), IN_TURN)
    assert found is not None and dict(found.constants) == {**dict(plain.constants), "ADD": 1}


@pytest.mark.parametrize("tactic", [FEW, Library(), ManyTokens(128, 128, 6), ManyTokens(128, 256, 4)])
def test_other_tactics_leave_the_addition_to_the_norm(tactic: Any) -> None:
    assert summed.kernel(Gemm(), of_linear(), tactic) is None


def test_rows_that_tma_does_not_store_are_left_to_the_norm() -> None:
    assert summed.kernel(Gemm(), of_linear(n=1004), IN_TURN) is None
    assert summed.kernel(Gemm("float32"), of_linear(), IN_TURN) is None


def test_every_tactic_that_is_offered_holds_the_barriers_beside_its_ring() -> None:
    problem = many_tokens.problem(Gemm(), of_linear())
    for tactic in many_tokens.enumerate_tactics(problem, 8192):
        if tactic.PINGPONG:
            assert summed.kernel(Gemm(), of_linear(), tactic) is not None, tactic


def test_the_norm_of_the_sum_is_one_without_residual() -> None:
    site = builder.norm_of_sum(nodes()[1], 8192)
    shipped = tactic_table.shipped().nearest(tactic_table.op_name(site.plugin, site.types), 8192)
    assert site.plugin == dataclasses.replace(NORM, residual=False) and shipped is not None
    assert tune.tactic_fields(site.candidates()[0]) == shipped.tactic
    assert "RESIDUAL" in dict(site.kernels(site.candidates()[0])[0].constants)


def test_the_plan_names_the_kernels_where_many_rows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_compiled", lambda k: tune.Cubin(f"key {k.source}", k, b"", ""))
    found, cubins = builder.add(nodes(), steps(nodes()))
    tactic = tune.tactic_fields(builder.norm_of_sum(nodes()[1], 4096).candidates()[0])
    expected = ("", "key gemm.cu"), TacticChoice(4096, tactic, ("key norm_quant.cu",))
    assert found == (Sum(0, 1, *expected), Sum(2, 3, *expected))
    assert sorted(cubins) == ["key gemm.cu", "key norm_quant.cu"]


def test_a_kernel_that_does_not_compile_leaves_the_addition_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = lambda k: "no" if "ADD" in dict(k.constants) else tune.Cubin("key", k, b"", "")
    monkeypatch.setattr(tune, "_compiled", refused)
    warnings: list[str] = []
    assert builder.add(nodes(), steps(nodes()), warn=warnings.append) == ((), {}) and warnings == ["no"]


def test_a_sum_has_its_place_before_the_linear_reads_its_input() -> None:
    """What the linear reads would otherwise give its place to the norm's outputs."""
    found = nodes()[:2]
    early = builder.early(found)
    assert early == {"sum": 0}
    active = {"x", "y", "q", "sum"}
    names = {name for n in found for name in (*n.inputs, *n.outputs) if name}
    buffers = {n: Buffer(n, "bfloat16", ("T", 64), "activation" if n in active else "weight") for n in names}
    listed = [Step(n.name, n.plugin.name, {}, n.inputs, n.outputs) for n in found]
    plain, _ = memory.place(buffers, listed, Limits(1, 64, 64))
    assert plain["x"] in (plain["q"], plain["sum"])
    placed, _ = memory.place(buffers, listed, Limits(1, 64, 64), early)
    assert len({placed[n] for n in ("x", "y", "sum")}) == 3


def test_what_a_norm_of_sent_rows_writes_lies_beside_what_the_linear_reads() -> None:
    """It begins to write when its columns have come, while the linear that sends still reads its input for others."""
    linear, norm = nodes()[:2]
    joined = AllReduceNormQuant(norm="rms", epsilon=1e-5, quant="static", residual=True, world=2, slot=0)
    norm = dataclasses.replace(norm, plugin=joined, inputs=("y", "r", *norm.inputs[2:]))
    found = [dataclasses.replace(linear, plugin=GemmSend(world=2, slot=0)), norm]
    early = builder.early(found)
    assert early == {"q": 0, "sum": 0}
    active = {"x", "y", "q", "sum"}
    names = {name for n in found for name in (*n.inputs, *n.outputs) if name}
    buffers = {n: Buffer(n, "bfloat16", ("T", 64), "activation" if n in active else "weight") for n in names}
    listed = [Step(n.name, n.plugin.name, {}, n.inputs, n.outputs) for n in found]
    placed, _ = memory.place(buffers, listed, Limits(1, 64, 64), early)
    assert len({placed[n] for n in active}) == 4


def test_the_executor_binds_the_sum_to_the_norm_s_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def linear(plugin: Any, tactic: Any, functions: Any, tensors: Any, further: Any = (), added: Any = None) -> str:
        told["linear"] = tactic, functions, [t is not None and int(t) for t in tensors], int(added)
        return "front"

    def norm(self: NormQuant, tactic: Any, functions: Any, tensors: Any, workspace: Any) -> str:
        told["norm"] = self.residual, tactic, functions, [t is not None and int(t) for t in tensors]
        return "behind"

    monkeypatch.setattr(many_tokens, "bind", linear)
    monkeypatch.setattr(NormQuant, "bind", norm)
    for swapped in (False, True):
        found = nodes(swapped=swapped)[:2]
        names = ["x", "w", "s", "t", "y", "r", "gain", "scale", "q", "sum"]
        tensors = {name: torch.tensor(i) for i, name in enumerate(names)}
        plan = SimpleNamespace(steps=steps(found), joins=(), sums=(Sum(0, 1, ("", "e"), BEHIND),))
        functions: Any = {"e": 5, "f": 6}
        (bound,) = runtime.bind(plan, [n.plugin for n in found], functions, tensors, torch.zeros(1))  # type: ignore[arg-type]
        assert told["linear"] == (IN_TURN, [5], [0, 1, 2, 3, False, 9], 5)
        assert told["norm"] == (False, NORM.tactic({"threads": 512, "held": 1}), [6], [9, False, 6, False, 7, False, 8])
        assert bound == runtime.Joined(0, 1, [512], [None, "front"], "behind", prompts=False)  # type: ignore[list-item, arg-type]
    many, few = StepShape(600, 600, 600, 0, 90, 600), StepShape(512, 512, 512, 0, 90, 512)
    assert [place for place, _ in runtime.launchers([bound], many, 2)] == [0, 1], "decode rows, too"
    assert not [*runtime.launchers([bound], few, 2)]
    assert not [*runtime.launchers([bound], many, 1)], "the norm is launched in another way"


def test_a_step_s_bytes_are_counted_as_it_runs() -> None:
    found = nodes()
    listed, fronts = steps(found), [None, lambda step: None]
    bound = [runtime.Joined(i, i + 1, [512], fronts, lambda step: None, prompts=False) for i in (0, 2)]
    plan: Any = SimpleNamespace(steps=listed, sums=(Sum(0, 1, ("", "e"), BEHIND), Sum(2, 3, ("", "e"), BEHIND)))
    many = StepShape(600, 600, 600, 0, 90, 600)
    linear, norm, down, last = runtime.as_run(plan, bound, many, 3)
    assert linear.inputs == (*listed[0].inputs, "r") and linear.outputs == ("sum",)
    assert norm.inputs == ("sum", "gain", "", "scale", "") and norm.outputs == ("q",)
    assert [down, last] == listed[2:], "launched in another way"
    assert runtime.as_run(plan, bound, dataclasses.replace(many, tokens=512), 4) == listed


def test_sums_survive_the_engine_s_file(tmp_path: Any) -> None:
    import tiny_engine

    from fp8.builder import engine

    plan = engine.load(tiny_engine.write(tmp_path / "engine")).plan
    assert plan.sums == ()
    with_sums = dataclasses.replace(plan, sums=(Sum(1, 2, ("", "ab"), BEHIND),))
    assert Plan.from_json(with_sums.to_json()).sums == with_sums.sums


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", summed_cases.CASES, ids=lambda c: c.name)
def test_the_sum_has_the_references_bits(case: Case) -> None:
    given = case.make(torch.Generator("cuda").manual_seed(3), "cuda")
    kinds, plugin, functions = types_of(given), case.plugin, case_buffers.Functions()
    *_, expected = plugin.reference(*given, step=case.step)
    for tactic in plugin.tactics(kinds, case.step.tokens):
        outputs = [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="cuda") for t in plugin.infer(kinds)]
        plugin.bind(tactic, functions.of(plugin.kernels(tactic, kinds)), [*given, *outputs], None)(case.step)
        assert torch.equal(outputs[-1].view(torch.int16), expected.view(torch.int16)), tactic
