"""One launch for the layers of a decode token: which steps it stands for, when it runs, and what it computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoint as tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8.builder import build, merge
from fp8.builder.engine import Plan, Step
from fp8.builder.request import Reporter, Request
from fp8.plugins.base import PluginError, StepShape, Tensor, load, types_of
from fp8.plugins.compile import compile_kernel
from fp8.plugins.decode_layers import launch
from fp8.plugins.decode_layers.cases import CASES
from fp8.plugins.decode_layers.cases import case as layers
from fp8.plugins.decode_layers.sizes import MOST_CONTEXT, of_layer
from fp8.plugins.decode_layers_ranks.cases import CASES as SHARED
from fp8.runtime import compiled, merged

SHAPE = {
    "hidden_size": 256, "intermediate_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
LIMITS = {"max_batch_size": 4, "max_seq_len": 128, "max_num_tokens": 64}


def planned(
    tmp_path: Path, format: str = "fp8", kv: str = "fp8", request: dict[str, Any] | None = None, **changes: Any
) -> Plan:
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat(format, kv), **{**SHAPE, **changes})
    return build.compile(source, Request(**{**LIMITS, **(request or {})}), Reporter(), dry_run=True).plan


def found(plan: Plan) -> merge.Found:
    return merge.find(plan.steps, {b.name: b for b in plan.buffers})


@pytest.mark.parametrize("format", ["fp8", "fp8_channel"])
def test_the_layers_of_a_plan_are_found(format: str, tmp_path: Path) -> None:
    plan = planned(tmp_path, format, num_hidden_layers=3)
    first, count, step = found(plan)
    plugins = [s.plugin for s in plan.steps]
    assert plugins[:first] == ["embedding", "norm_quant", "gemm"]
    layer = ["attention", "gemm", "norm_quant", "gemm_swiglu", "gemm"]
    assert plugins[first : first + count] == [*layer, "norm_quant", "gemm", *layer, "norm_quant", "gemm", *layer]
    assert plugins[first + count :] == ["norm_quant", "gemm"]
    assert step.attributes["layers"] == 3
    behind = plan.steps[first + count]
    assert set(step.outputs) == set(behind.inputs[:2]), "what comes behind reads what the launch leaves"


def test_the_launch_computes_what_its_steps_do(tmp_path: Path) -> None:
    """Step by step through the references, and as one op, bit by bit."""
    plan = planned(tmp_path)
    first, count, one = found(plan)
    generator = torch.Generator().manual_seed(3)
    types = {b.name: Tensor(b.dtype, b.shape) for b in plan.buffers}
    tensors: dict[str, torch.Tensor | None] = {"": None}
    for name in dict.fromkeys(one.inputs):
        if name:
            tensors[name] = _random(types[name], generator, name)
    step = StepShape(1, 1, 1, 0, 70, 1)
    plugin = load(one.plugin)(**one.attributes)
    outputs = plugin.reference(*(_copied(tensors[n]) for n in one.inputs), step=step)
    for s in plan.steps[first : first + count]:
        given = [_copied(tensors[n]) for n in s.inputs]
        tensors |= dict(zip(s.outputs, load(s.plugin)(**s.attributes).reference(*given, step=step), strict=True))
    for name, value in zip(one.outputs, outputs, strict=True):
        assert value.isfinite().all() and value.float().std() > 0
        assert torch.equal(value, tensors[name])


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def _random(of: Tensor, generator: torch.Generator, name: str) -> torch.Tensor:
    """A step of one token at position 69, in blocks 1 and 0 of two."""
    places = {
        "position_ids": [69], "slot_mapping": [5], "query_start": [0, 1], "sequence_lengths": [70],
        "block_tables": [[1, 0]],
    }  # fmt: skip
    if name in places:
        return torch.tensor(places[name], dtype=torch.int32)
    sizes = {"T": 1, "B": 1, "blocks": 2}
    shape = [sizes.get(n, n) if isinstance(n, str) else n for n in of.shape]
    values = torch.randn(shape, generator=generator)
    if name.endswith("_scale"):
        return 0.01 + 0.01 * values.abs()
    return (20 * values if of.dtype == "float8_e4m3fn" else values).to(getattr(torch, of.dtype))


@pytest.mark.parametrize(
    ("format", "kv", "changes", "why"),
    [
        ("fp8", "auto", {}, "the KV cache is bfloat16, expected float8_e4m3fn"),
        ("fp8_rowwise", "fp8", {}, "is attention"),
        ("bf16", "auto", {}, "is attention"),
        ("fp8", "fp8", {"attention_bias": True}, "o_proj has a bias"),
        ("fp8", "fp8", {"head_dim": 64}, "head_dim is 64, expected 128"),
        ("fp8", "fp8", {"intermediate_size": 1024}, "the mlp size is 1024, expected at least 1056"),
        ("fp8", "fp8", {"hidden_size": 320}, "the hidden size is 320, expected a multiple of 128"),
    ],
)
def test_what_the_kernel_does_not_compute_is_told(
    tmp_path: Path, format: str, kv: str, changes: dict[str, Any], why: str
) -> None:
    plan = planned(tmp_path, format, kv, **changes)
    with pytest.raises(merge.Refused) as refused:
        found(plan)
    assert why in str(refused.value)


def test_precise_sums_are_left_to_their_own_kernels(tmp_path: Path) -> None:
    with pytest.raises(merge.Refused, match="'accumulation': 'precise'"):
        found(planned(tmp_path / "precise", request={"fp8_accumulation": "precise"}))


def test_what_someone_else_reads_is_not_swallowed(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    first, _, _ = found(plan)
    hidden = plan.steps[first + 3].outputs[0]
    spy = Step("spy", "quantize", {}, (hidden,), ("seen",))
    with pytest.raises(merge.Refused, match="is read elsewhere, too"):
        merge.find([*plan.steps, spy], {b.name: b for b in plan.buffers})


def test_the_plan_of_a_gpu_engine_holds_the_launch_or_why_there_is_none(tmp_path: Path) -> None:
    plan = planned(tmp_path / "merged")
    assert plan.merged is not None and not plan.unmerged
    assert plan.merged.max_context == MOST_CONTEXT and len(plan.merged.step.tactics) == 1
    assert Plan.from_json(plan.to_json()) == plan
    other = planned(tmp_path / "not", kv="auto")
    assert other.merged is None and "KV cache" in other.unmerged
    assert Plan.from_json(other.to_json()) == other
    cpu = planned(tmp_path / "cpu", request={"target": "cpu"})
    assert cpu.merged is None and not cpu.unmerged


def test_it_runs_for_one_token_of_a_context_that_fits() -> None:
    bound = merged.Bound(3, 19, 2048, lambda step: None)
    assert bound.fits(StepShape(1, 1, 1, 0, 2048, 1))
    for shape in (StepShape(2, 2, 2, 0, 100, 2), StepShape(1, 1, 0, 1, 1, 1), StepShape(1, 1, 1, 0, 2049, 1)):
        assert not bound.fits(shape)


def test_the_executor_launches_it_in_place_of_its_steps_unless_someone_observes() -> None:
    ran: list[str] = []
    step = lambda name: ("T", [], [lambda shape: ran.append(name)])
    executor: Any = object.__new__(compiled.CompiledExecutor)
    executor._steps, executor._tail, executor._joined = [step(n) for n in "abcd"], [], []
    executor._merged = merged.Bound(1, 2, 2048, lambda shape: ran.append("merged"))
    executor.result, executor._rows = torch.zeros(4, 8), "L"
    executor.plan, executor._tensors = SimpleNamespace(steps=[SimpleNamespace(outputs=())] * 4), {}
    one, two = StepShape(1, 1, 1, 0, 100, 1), StepShape(2, 2, 2, 0, 100, 2)
    for shape, observe, expected in (
        (one, None, ["a", "merged", "d"]),
        (two, None, [*"abcd"]),
        (one, print, [*"abcd"]),
    ):
        ran.clear()
        assert executor.run(shape, observe=observe).shape == (shape.logits_rows, 8)
        assert ran == expected


def test_every_layer_must_be_like_the_first() -> None:
    case = layers(8, 2, 1024, 1152, 1)
    types = types_of(case.make(torch.Generator(), "cpu"))
    case.plugin.check(types)
    other = list(types)
    at = [i for i, t in enumerate(types) if t and t.shape == (2 * 1152, 1024)][1]
    other[at : at + 3] = [Tensor("float8_e4m3fn", (2 * 1280, 1024)), types[at + 1], Tensor("float32", (2 * 1280,))]
    other[at + 4] = Tensor("float8_e4m3fn", (1024, 1280))
    with pytest.raises(PluginError, match="the layers differ in their sizes"):
        case.plugin.check(other)
    with pytest.raises(PluginError, match="inputs, expected"):
        case.plugin.infer(types[:-1])


def test_the_table_of_layers_is_as_long_as_the_kernel_s() -> None:
    """768 bytes of tensor maps, pointers, scales: `Layer` in shape.cuh, which is aligned to 128."""
    size = 6 * launch.MAP_BYTES + 8 * len(launch.POINTERS) + 4 * len(launch.SCALES)
    assert -(-size // 128) * 128 == 896 == launch.LAYER_BYTES


def test_shared_memory_of_every_case_fits() -> None:
    for case in (*CASES, *SHARED):
        plugin: Any = case.plugin
        with FakeTensorMode(allow_non_fake_inputs=True):
            types = types_of(case.make(torch.Generator(), "cpu"))
        for tactic in plugin.tactics(types, 1):
            (kernel,) = plugin.kernels(tactic, types)
            log = compile_kernel(kernel).log
            static = max(int(n) for n in re.findall(r"(\d+) bytes smem", log))
            assert static <= plugin.static_bytes
            assert static + plugin.shared_bytes(plugin.sizes(of_layer(types, 0)), tactic) <= 227 * 1024
