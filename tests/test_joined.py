"""Attention's first part in the epilogue of the linear layer in front: where, by which kernels, in which steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8.builder import joins as builder
from fp8.builder import tune
from fp8.builder.engine import Join, Plan, Step, TacticChoice
from fp8.builder.plan import Node
from fp8.plugins.attention import joined, layout
from fp8.plugins.attention import joined_cases as cases
from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import BLOCK_SIZE, Case, Launcher, StepShape, Tensor, types_of
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.plugins.gemm.library import Library
from fp8.plugins.gemm.many_tokens import ManyTokens
from fp8.plugins.gemm.plugin import Gemm
from fp8.runtime import joins as runtime
from fp8.scripts.benchmarks import case_buffers

E4M3 = "float8_e4m3fn"
IN_TURN = ManyTokens(128, 128, 6, PINGPONG=1)
TOGETHER = ManyTokens(128, 128, 6)


def types(heads: int, kv_heads: int, dim: int, k: int = 4096, cache: str = E4M3, rotated: int | None = None) -> Any:
    """Of the linear's inputs, of attention's."""
    n = (heads + 2 * kv_heads) * dim
    operands = (
        Tensor(E4M3, ("T", k)),
        Tensor(E4M3, (n, k)),
        Tensor("float32", (1,)),
        Tensor("float32", (n,)),
        None,
    )
    angles = None if rotated == 0 else Tensor("float32", (4096, (rotated or dim) // 2))
    steps = [Tensor("int32", shape) for shape in (("T",), ("T",), ("B+1",), ("B",), ("B", "MB"))]
    pool = Tensor(cache, ("blocks", BLOCK_SIZE, kv_heads, dim))
    scale = Tensor("float32", (1,)) if cache == E4M3 else None
    given = (Tensor("bfloat16", ("T", n)), *steps, angles, angles, pool, pool, scale, scale, scale, None)
    return operands, given


def kernel(heads: int, kv_heads: int, dim: int, tactic: Any, linear: Any = None, **options: Any) -> Any:
    operands, given = types(heads, kv_heads, dim, **options)
    attention = Attention(heads, kv_heads, dim, dim**-0.5, options.get("rotated") != 0)
    return joined.kernel(attention, given, linear or Gemm(), operands, tactic)


@pytest.mark.parametrize("rotated", [None, 0])
@pytest.mark.parametrize("cache", [E4M3, "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 8, 128), (32, 8, 64), (1, 1, 128), (6, 2, 64)])
def test_the_joined_kernel_is_the_linear_s_with_more_in_its_epilogue(
    shape: Any, cache: str, rotated: int | None
) -> None:
    found = kernel(*shape, IN_TURN, cache=cache, rotated=rotated)
    (plain,) = many_tokens.kernels(Gemm(), IN_TURN, types(*shape)[0])
    assert found.source == plain.source and found.constants[: len(plain.constants)] == plain.constants
    more = dict(found.constants[len(plain.constants) :])
    assert more["FP8_CACHE"] == int(cache == E4M3) and more["ROTARY_DIM"] == (shape[2] if rotated is None else 0)


@pytest.mark.parametrize(
    "tactic",
    [
        TOGETHER,
        ManyTokens(128, 96, 7, PINGPONG=1),
        ManyTokens(128, 192, 4, PINGPONG=1),
        FewTokens(64, 96, 1, 11, 1),
        Library(),
        dataclasses.replace(IN_TURN, STAGES=7),
    ],
)
def test_other_tactics_stay_apart_from_attention(tactic: Any) -> None:
    assert kernel(32, 8, 128, tactic) is None


def test_other_heads_stay_apart_from_the_linear() -> None:
    """Tiles of 128 columns hold whole heads of one kind; a thread rotates four pairs, or none."""
    assert kernel(9, 3, 64, IN_TURN) is None
    assert kernel(8, 1, 64, IN_TURN) is None
    assert kernel(8, 2, 128, IN_TURN, rotated=64) is not None
    assert kernel(8, 2, 128, IN_TURN, rotated=20) is None


def nodes(readers: int = 1) -> list[Node]:
    operands, given = types(8, 2, 128)
    attention = Attention(8, 2, 128, 0.1)
    names = tuple(f"in{i}" if t else "" for i, t in enumerate(given[1:]))
    linear = Node("qkv", Gemm(), operands, ("x", "w", "s", "t", ""), ("qkv",))
    behind = [Node(f"attention{i}", attention, given, ("qkv", *names), (f"y{i}",)) for i in range(readers)]
    return [linear, *behind, Node("o", Gemm(), operands, ("y0", "w", "s", "t", ""), ("z",))]


def steps(found: list[Node]) -> list[Step]:
    """The first linear runs three tactics."""
    tactics = (FewTokens(64, 96, 1, 11, 1), TOGETHER, IN_TURN)
    choices = tuple(TacticChoice(1024 << i, dataclasses.asdict(t), ()) for i, t in enumerate(tactics))
    return [Step(n.name, n.plugin.name, {}, n.inputs, n.outputs, choices if n.name == "qkv" else ()) for n in found]


def test_a_linear_is_joined_with_the_attention_that_alone_reads_it() -> None:
    assert builder.pairs(nodes()) == [(0, 1)]
    assert builder.pairs(nodes(readers=2)) == [], "another attention wants q, k and v as they are"


def test_the_plan_names_a_kernel_where_the_tactic_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_compiled", lambda k: tune.Cubin(f"key {k.source}", k, b"", ""))
    found, cubins = builder.join(nodes(), steps(nodes()))
    assert found == (Join(0, 1, ("", "", "key gemm.cu")),) and list(cubins) == ["key gemm.cu"]


def test_few_rows_stay_apart() -> None:
    """8 and 2 + 2 heads of 128 are 12 tiles' columns: 4096 rows make 384 tiles."""
    found = nodes()
    (_, _, choice) = steps(found)[0].tactics
    for tokens, some in ((2048, False), (4096, True)):
        step = dataclasses.replace(steps(found)[0], tactics=(dataclasses.replace(choice, max_tokens=tokens),))
        assert any(builder.kernels(found[0], found[1], step)) == some


def test_a_kernel_that_does_not_compile_leaves_the_two_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_compiled", lambda k: f"{k.source}: ptxas serialized")
    warnings: list[str] = []
    assert builder.join(nodes(), steps(nodes()), warn=warnings.append) == ((), {})
    assert warnings == ["gemm.cu: ptxas serialized"]


def launched(names: list[str], name: str) -> Launcher:
    return lambda step: names.append(name)


def test_steps_with_prompts_run_the_joined_launches() -> None:
    names: list[str] = []
    fronts = [None, launched(names, "front")]
    found = [runtime.Joined(2, 3, [16], fronts, launched(names, "behind"))]
    prompts = StepShape(40, 3, 2, 38, 90, 3)
    assert [place for place, _ in runtime.launchers(found, prompts, 9)] == [2, 3]
    for _, launcher in runtime.launchers(found, prompts, 9):
        launcher(prompts)
    assert names == ["front", "behind"]
    assert not [*runtime.launchers(found, dataclasses.replace(prompts, tokens=16), 9)], (
        "a range of rows without a kernel"
    )
    assert not [*runtime.launchers(found, StepShape(40, 40, 40, 0, 90, 40), 9)], (
        "decode rows, padded with some of no sequence"
    )


def test_the_executor_binds_what_the_plan_joins_over_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def bind_joined(self: Attention, tactic: Any, functions: Any, tensors: Any, workspace: Any, *linear: Any) -> Any:
        told.append((tactic, functions, tensors[0], workspace.tolist(), *linear[1:]))
        return ["front"], "behind"

    monkeypatch.setattr(Attention, "bind_joined", bind_joined)
    found = nodes()
    operands, given = found[0].types, found[1].types
    fields = dataclasses.asdict(found[1].plugin.tactics(given, 64)[0])
    listed = steps(found)
    listed[1] = dataclasses.replace(listed[1], tactics=(TacticChoice(64, fields, ("a", "b"), 2, 1),))
    plan = SimpleNamespace(steps=listed, joins=(Join(0, 1, ("", "", "c")),), sums=())
    names = {name for node in found for name in (*node.inputs, *node.outputs) if name}
    tensors = {name: torch.tensor([i]) for i, name in enumerate(sorted(names))}
    functions: Any = {"a": 1, "b": 2, "c": 3}
    (bound,) = runtime.bind(plan, [n.plugin for n in found], functions, tensors, torch.arange(9))  # type: ignore[arg-type]
    ((_, of_attention, qkv, region, choices, at),) = told
    assert of_attention == [1, 2] and region == [1, 2] and qkv is tensors["qkv"]
    assert [f for _, f in choices] == [None, None, 3] and choices[2][0] == IN_TURN
    assert at[0] is tensors["x"] and at[4] is None and at[5] is tensors["qkv"] and len(operands) == 5
    assert (bound.linear, bound.second, bound.ends) == (0, 1, [1024, 2048])


def test_joins_survive_the_engine_s_file(tmp_path: Any) -> None:
    import tiny_engine

    from fp8.builder import engine

    plan = engine.load(tiny_engine.write(tmp_path / "engine")).plan
    assert plan.joins == ()
    joined_plan = dataclasses.replace(plan, joins=(Join(1, 2, ("", "ab")),))
    assert Plan.from_json(joined_plan.to_json()).joins == joined_plan.joins


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.flops < 10**10], ids=lambda c: c.name)
def test_the_cache_has_the_references_bits(case: Case) -> None:
    given = case.make(torch.Generator("cuda").manual_seed(3), "cuda")
    kinds = types_of(given)
    plugin: cases.LinearAttention = case.plugin  # type: ignore[assignment]
    functions = case_buffers.Functions()
    places = case_buffers.caches(plugin)
    assert places is not None
    for tactic in plugin.tactics(kinds, case.step.tokens)[:4]:
        packed, (out,) = list(given), plugin.infer(kinds)
        packed[places[0]], packed[places[1]] = layout.pack_cache(given[places[0]], given[places[1]])
        y = torch.empty(out.shape, dtype=getattr(torch, out.dtype), device="cuda")
        size = plugin.workspace(tactic, kinds, case.step.tokens, case.step.sequences)
        workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        plugin.bind(tactic, functions.of(plugin.kernels(tactic, kinds)), [*packed, y], workspace)(case.step)
        expected = [t if t is None else t.clone() for t in given]
        plugin.reference(*expected, step=case.step)
        for found, place in zip(layout.unpack_cache(*(packed[i] for i in places)), places, strict=True):
            assert torch.equal(found.view(torch.uint8), expected[place].view(torch.uint8)), tactic


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.flops < 10**10], ids=lambda c: c.name)
def test_a_case_s_caches_are_laid_out_for_the_kernels(case: Case) -> None:
    """They stand elsewhere among its inputs than among attention's."""
    buffers = case_buffers.CaseBuffers(case, 1, "cpu")
    ((key, value),) = buffers.places
    unpacked = case.plugin.unpack_cache(buffers.inputs[key], buffers.inputs[value])  # type: ignore[attr-defined]
    for found, given in zip(unpacked, (buffers.given[key], buffers.given[value]), strict=True):
        assert given is not None and torch.equal(found.view(torch.uint8), given.view(torch.uint8))
