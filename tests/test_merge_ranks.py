"""One launch for the layers that several ranks share: which steps it stands for, what it computes, and in which order
the ranks can get on."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoint as tiny
import torch
from test_merge import LIMITS, SHAPE, _copied, _random, found

from fp8.builder import build, merge
from fp8.builder.engine import Plan
from fp8.builder.memory import buffer_bytes
from fp8.builder.parallel.lockstep import Group, Member
from fp8.builder.request import Reporter, Request
from fp8.plugins.base import Launcher, PluginError, StepShape, Tensor, load, run_reference, types_of
from fp8.plugins.decode_layers_ranks.cases import CASES
from fp8.plugins.decode_layers_ranks.plugin import DecodeLayersRanks
from fp8.runtime import compiled, merged
from fp8.runtime.links import over_peers
from fp8.scripts.benchmarks import shared_layers


def shares(tmp_path: Path, tp: int = 2, **changes: Any) -> list[Plan]:
    """Every rank's plan."""
    source = tiny.source(
        tmp_path / "checkpoint", tiny.qformat("fp8", "fp8"), **{**SHAPE, "intermediate_size": 2304, **changes}
    )
    request = Request(**LIMITS, tp_size=tp)  # type: ignore[arg-type]
    return [build.compile(source, request, Reporter(), dry_run=True, place=p).plan for p in request.places]


def test_the_layers_that_ranks_share_are_found(tmp_path: Path) -> None:
    plans = shares(tmp_path, num_hidden_layers=3)
    for plan in plans:
        assert plan.merged is not None and not plan.unmerged
        first, count, step = found(plan)
        assert (step.plugin, step.attributes["world"], step.attributes["layers"]) == ("decode_layers_ranks", 2, 3)
        plugins = [s.plugin for s in plan.steps]
        layer = ["attention", "gemm_send", "all_reduce_norm_quant", "gemm_swiglu", "gemm_send"]
        between = ["all_reduce_norm_quant", "gemm"]
        assert plugins[first : first + count] == [*layer, *between, *layer, *between, *layer[:-1], "gemm"]
        assert plugins[first + count :] == ["all_reduce", "norm_quant", "gemm", "all_gather"]
        assert step.outputs[0] in plan.steps[first + count].inputs and step.outputs[1] in plan.steps[-3].inputs
        assert over_peers(plan)
    assert len({(p.merged.first, p.merged.count, p.merged.max_context) for p in plans if p.merged}) == 1


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 1024, "intermediate_size": 2304}, {"intermediate_size": 4608}])
def test_no_norm_writes_where_the_linear_before_it_reads(tmp_path: Path, changes: dict[str, int]) -> None:
    """Of rows that linears send: it begins to write while the linear is at work (`joins.early`)."""
    for plan in shares(tmp_path, num_hidden_layers=3, **changes):
        place = {
            b.name: (b.offset, b.offset + buffer_bytes(b, plan.limits)) for b in plan.buffers if b.offset is not None
        }
        for linear, norm in itertools.pairwise(plan.steps):
            if linear.plugin == "gemm_send" and norm.plugin == "all_reduce_norm_quant":
                for read, written in itertools.product(linear.inputs, norm.outputs):
                    if read in place and written in place:
                        (a, b), (c, d) = place[read], place[written]
                        assert b <= c or d <= a, f"{norm.name} writes {written} over {read}"


def test_the_launch_of_ranks_computes_what_their_steps_do(tmp_path: Path) -> None:
    """On every rank, step by step through the references, and as one op, bit by bit."""
    plans, group, step = shares(tmp_path), Group(2), StepShape(1, 1, 1, 0, 70, 1)

    def run(plan: Plan, member: Member) -> list[torch.Tensor]:
        first, count, one = found(plan)
        common = {one.inputs[1], *(n for n in one.inputs if "layernorm" in n or n.endswith("_scale"))}
        types = {b.name: Tensor(b.dtype, b.shape) for b in plan.buffers}
        tensors: dict[str, torch.Tensor | None] = {"": None}
        for name in filter(None, dict.fromkeys(one.inputs)):
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (0 if name in common else member.rank))
            tensors[name] = _random(types[name], draw, name)
        given = [_copied(tensors[n]) for n in one.inputs]
        outputs = run_reference(load(one.plugin)(**one.attributes), given, step, member)
        for s in plan.steps[first : first + count]:
            given = [_copied(tensors[n]) for n in s.inputs]
            results = run_reference(load(s.plugin)(**s.attributes), given, step, member)
            tensors.update(zip(s.outputs, results, strict=True))
        assert all(torch.equal(v, tensors[n]) for n, v in zip(one.outputs, outputs, strict=True))  # type: ignore[arg-type]
        return list(outputs)

    results = group.run([partial(run, p, m) for p, m in zip(plans, group.members, strict=True)])
    (y, residual), (other_y, other_residual) = results
    assert y.isfinite().all() and y.float().std() > 0
    assert torch.equal(residual, other_residual) and not torch.equal(y, other_y)


def test_shares_that_the_kernel_does_not_take_are_told(tmp_path: Path) -> None:
    plans = shares(tmp_path, tp=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=4 * 1152 + 64)
    assert all(
        p.merged is None and re.search(r"the mlp size is \d+, expected a multiple of 128", p.unmerged) for p in plans
    )
    case = CASES[0]
    types = types_of(case.make(torch.Generator(), "cpu"))
    with pytest.raises(PluginError, match="9 ranks share the layers, expected 2 to 8"):
        replace(case.plugin, world=9).check(types)  # type: ignore[type-var]


def test_a_step_of_another_number_of_ranks_ends_what_is_merged(tmp_path: Path) -> None:
    plan = shares(tmp_path)[0]
    steps = list(plan.steps)
    at = [i for i, s in enumerate(steps) if s.plugin == "all_reduce_norm_quant"][1]
    steps[at] = replace(steps[at], attributes={**steps[at].attributes, "world": 4})
    with pytest.raises(merge.Refused, match="is of other ranks"):
        merge.find(steps, {b.name: b for b in plan.buffers})
    steps[at] = replace(steps[at], attributes={**steps[at].attributes, "fp8_tokens": 1})
    with pytest.raises(merge.Refused, match="'fp8_tokens': 1"):
        merge.find(steps, {b.name: b for b in plan.buffers})


def test_without_memory_that_ranks_share_each_step_has_its_own_launch(tmp_path: Path) -> None:
    plan, nothing = shares(tmp_path)[0], torch.zeros(1, dtype=torch.uint8)
    for comm in (None, SimpleNamespace(regions=None)):
        assert merged.bind(plan, {}, {}, nothing, comm) is None


def test_an_executor_whose_peers_launch_apart_does_so_too() -> None:
    executor: Any = object.__new__(compiled.CompiledExecutor)
    executor._merged = merged.Bound(3, 19, 2048, lambda step: None)
    assert executor.one_launch == "3 19 2048"
    executor.launch_apart()
    assert executor.one_launch == "" and executor._merged is None


def works(monkeypatch: pytest.MonkeyPatch) -> list[shared_layers.SharedLayers]:
    """Of two ranks, on the CPU."""
    monkeypatch.setattr(shared_layers, "generator", lambda rank, seed: torch.Generator().manual_seed(seed))
    case = replace(CASES[0], make=lambda generator, device: CASES[0].make(generator, "cpu"))
    found = []
    for rank in (0, 1):
        functions = SimpleNamespace(of=lambda kernels: [])
        ranks: Any = SimpleNamespace(world=SimpleNamespace(rank=rank, world=2), functions=functions, group=None)
        work = shared_layers.layers(ranks, case)
        outputs = [torch.zeros(t.shape, dtype=torch.bfloat16) for t in work.plugin.infer(types_of(work.inputs))]
        work.__dict__["outputs"] = outputs
        found.append(work)
    return found


def test_the_bench_gives_ranks_shares_of_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    group, one = Group(2), works(monkeypatch)
    run = [partial(run_reference, w.plugin, w.inputs, w.step, m) for w, m in zip(one, group.members, strict=True)]
    (y, residual), (other, other_residual) = group.run(run)
    assert y.isfinite().all() and not torch.equal(y, other) and torch.equal(residual, other_residual)


def test_what_a_bench_s_launch_reads_lives_as_long_as_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds the launch's addresses and nothing else."""
    read: list[weakref.ref] = []

    def bind(plugin: Any, tactic: Any, functions: Any, tensors: Any, workspace: Any, comm: Any) -> Launcher:
        read.extend(weakref.ref(t) for t in (*tensors, workspace) if t is not None)
        return lambda step: None

    monkeypatch.setattr(DecodeLayersRanks, "bind", bind)
    (work, _) = works(monkeypatch)
    work.launcher(work.plugin.tactics(types_of(work.inputs), 1)[0])
    gc.collect()
    assert read and all(tensor() is not None for tensor in read)


Event = tuple[str, int]  # what a block does, in which layer of all launches
BLOCKS = 4  # two of each of two ranks; the first has units of o, down and qkv, and each has some of gate_up


def program(first: bool, layers: int, launches: int) -> list[Event]:
    def layer(i: int) -> Iterator[str]:
        last = i % layers == layers - 1
        yield from ["o"] * first + ["read o", "gate_up"] + ["down"] * (first and not last)
        yield from ["read down"] * (not last) + ["qkv"] * (first and not last)

    return [(what, i) for i in range(layers * launches) for what in layer(i)]


def explore(place: Callable[[int], int], layers: int, launches: int = 2) -> int:
    """Goes through all orders in which the blocks can get on; returns how many states there are. Raises AssertionError
    where a share of a layer's sum is stored into its `place` and a block has not read what was there, or where nobody
    gets on."""
    programs = [program(block % 2 == 0, layers, launches) for block in range(BLOCKS)]
    steps = [{event: i for i, event in enumerate(p)} for p in programs]
    start = (0,) * BLOCKS
    seen, waiting = {start}, [start]

    def done(state: tuple[int, ...], blocks: Sequence[int], event: Event) -> bool:
        return all(state[b] > steps[b][event] for b in blocks)

    def can(state: tuple[int, ...], block: int, what: str, layer: int) -> bool:
        own = (block // 2 * 2, block // 2 * 2 + 1)
        if layer and layer % layers == 0 and not done(state, own, ("gate_up", layer - 1)):
            return False  # the launch before has not ended here
        if what.startswith("read "):
            return done(state, (0, 2), (what.removeprefix("read "), layer))
        if what == "o":
            return layer % layers == 0 or done(state, own[:1], ("qkv", layer - 1))
        return what != "down" or done(state, own, ("gate_up", layer))

    while waiting:
        state = waiting.pop()
        able = [b for b, at in enumerate(state) if at < len(programs[b]) and can(state, b, *programs[b][at])]
        assert able or all(at == len(p) for at, p in zip(state, programs, strict=True)), f"stuck at {state}"
        for block in able:
            what, layer = programs[block][state[block]]
            for read in (
                r for r in programs[1] if r[0] == f"read {what}" and r[1] < layer and place(r[1]) == place(layer)
            ):
                assert done(state, range(BLOCKS), read), f"{what} of layer {layer} comes too soon"
            following = (*state[:block], state[block] + 1, *state[block + 1 :])
            waiting += [following] if following not in seen else []
            seen.add(following)
    return len(seen)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_share_comes_into_a_place_that_a_block_has_not_read(layers: int) -> None:
    """sums.cuh: two places for each sum, taken in turn."""
    assert explore(lambda layer: layer % 2, layers) > 20
    with pytest.raises(AssertionError, match="comes too soon"):
        explore(lambda layer: 0, layers, 3)
