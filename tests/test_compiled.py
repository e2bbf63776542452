"""The GPU executor's bookkeeping, without a GPU: references stand in for the kernels, run on the bound buffers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny_checkpoint
import torch

from fp8.builder import engine as engine_format
from fp8.builder.engine import EngineError, Plan, TacticChoice
from fp8.plugins import base
from fp8.plugins.attention import plugin as attention
from fp8.plugins.base import StepShape
from fp8.runtime import compiled, reference, tail, weights
from fp8.runtime.llm import LLM
from fp8.runtime.record import Recorder
from fp8.runtime.request import SamplingParams
from fp8.runtime.sampler import reference_sampler
from fp8.runtime.session import Session
from fp8.runtime.step_inputs import StepInputs
from fp8.scripts import build

PROMPTS = [[1, 2, 3], [7] * 70, list(range(40)), [9, 8], [4] * 11]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module", params=["auto", "fp8"])
def engine_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("engine")
    checkpoint = tiny_checkpoint.write(work / "checkpoint", tiny_checkpoint.qformat("bf16", request.param))
    limits = ["--max_batch_size", "6", "--max_seq_len", "128", "--max_num_tokens", "48", "--log_level", "error"]
    out = ["--checkpoint_dir", str(checkpoint), "--output_dir", str(work / "engine"), "--target", "cpu"]
    assert build.main([*out, *limits]) == 0
    return work / "engine"


class Stub:
    """A plugin whose launches run its reference over the step's rows, writing into the bound buffers."""

    collective = False
    hands_over = False

    step_buffers: ClassVar[set[int]] = set()  # addresses of what holds a step's rows, cut to size for the reference

    def __init__(self, plugin: Any, rows: str, outputs: int) -> None:
        self.plugin, self.rows, self.outputs = plugin, rows, outputs

    def cache_shape(self, blocks: int, heads: int, width: int, dtype: str) -> tuple[tuple[int, ...], ...]:
        return ((blocks, 64, heads, width),) * 2  # the references' layout

    def tactic(self, fields: dict) -> dict:
        return fields

    def bind(self, tactic: dict, functions: list, tensors: list, workspace: None) -> base.Launcher:
        def run(step: StepShape) -> None:
            rows = step.logits_rows if self.rows == "L" else step.tokens
            assert tactic["least"] <= rows <= tactic["most"], "the tactic is the one for that many rows"
            inputs = [None if t is None else self._live(t, step) for t in tensors[: -self.outputs]]
            for buffer, value in zip(tensors[-self.outputs :], self.plugin.reference(*inputs, step=step), strict=True):
                buffer[: len(value)] = value

        return run

    def _live(self, tensor: torch.Tensor, step: StepShape) -> torch.Tensor:
        """Cuts a buffer of maximal size down to the step's rows."""
        largest = {48: step.tokens, 256: step.logits_rows, 6: step.sequences, 7: step.sequences + 1}
        bound = tensor.data_ptr() in self.step_buffers
        return tensor[: largest[len(tensor)]] if bound else tensor


@pytest.fixture
def on_stubs(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes `Session(dir, "cpu")` go through CompiledExecutor."""

    def with_tactics(plan: Plan) -> Plan:
        steps = []
        for step in plan.steps:
            top = 256 if plan.buffer(step.outputs[0]).shape[0] == "L" else 48
            choices = [TacticChoice(4, {"least": 0, "most": 4}, ()), TacticChoice(top, {"least": 5, "most": top}, ())]
            steps.append(dataclasses.replace(step, tactics=tuple(choices)))
        return dataclasses.replace(plan, steps=tuple(steps))

    def stubs(plan: Plan) -> list[Stub]:
        pairs = zip(plan.steps, reference.load_plugins(plan), strict=True)
        return [Stub(plugin, str(plan.buffer(s.outputs[0]).shape[0]), len(s.outputs)) for s, plugin in pairs]

    def allocate(self: Session, engine: engine_format.Engine) -> None:
        self.num_blocks = min(self.num_blocks, 12)
        self.plan = with_tactics(self.plan)
        engine = dataclasses.replace(engine, plan=self.plan)
        self.inputs = StepInputs(self.limits, self.device, self.max_unread)
        self.executor = compiled.CompiledExecutor(engine, reference.map_weights(engine), self.inputs, self.num_blocks)
        step_kinds = {b.name for b in self.plan.buffers if b.kind in ("input", "activation", "output")}
        wanted = self.executor._wanted.tensors
        every = [*self.executor._tensors.items(), *wanted.items()]
        Stub.step_buffers = {t.data_ptr() for n, t in every if n in step_kinds}
        self._sample = reference_sampler(self.inputs)
        self.graphs, self.logits_graphs = Eager(self._launch), Eager(self.run)
        self._events = [Event()] * self.max_unread

    monkeypatch.setattr(compiled, "load_plugins", stubs)
    monkeypatch.setattr(Session, "_allocate_on_cpu", allocate)
    yield engine_dir


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Eager(compiled.Graphs):
    """A "graph" that runs its step anew; remembers the sizes asked for."""

    def run(self, shape: StepShape) -> torch.Tensor:
        self._graphs[shape.tokens, shape.max_context] = None  # type: ignore[assignment]
        return self._enqueue(shape)


def test_buffers_tactics_and_padding_give_the_reference_s_tokens(
    on_stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(on_stubs, "cpu", lag=1)
    compiled_tokens = [c.token_ids for c in llm.generate(PROMPTS, PARAMS)]
    assert {rows for rows, _ in llm.session.graphs._graphs} <= {1, 2, 4, 6}, "decode steps are padded"
    monkeypatch.undo()
    plain = LLM(on_stubs, "cpu", max_kv_blocks=12)
    assert compiled_tokens == [c.token_ids for c in plain.generate(PROMPTS, PARAMS)]


def test_behind_the_last_attention_a_step_goes_on_with_the_rows_wanted(
    on_stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "LEAST", 1)
    gathered: list[int] = []
    gather = tail.Rows.gather
    monkeypatch.setattr(tail.Rows, "gather", lambda self, rows: gathered.append(rows) or gather(self, rows))
    llm = LLM(on_stubs, "cpu", lag=1)
    first = llm.session.executor._first_of_tail
    names = [step.plugin for step in llm.session.plan.steps[first:]]
    assert names == ["gemm", "norm_quant", "gemm_swiglu", "gemm", "norm_quant", "gemm"]
    tokens = [c.token_ids for c in llm.generate(PROMPTS, PARAMS)]
    assert gathered and max(gathered) > 1
    monkeypatch.undo()
    plain = LLM(on_stubs, "cpu", max_kv_blocks=12)
    assert tokens == [c.token_ids for c in plain.generate(PROMPTS, PARAMS)]


def test_of_a_prompt_s_first_tokens_nothing_is_computed_behind_the_last_attention(
    on_stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = LLM(on_stubs, "cpu").session.executor
    part, end, decode = StepShape(48, 1, 0, 48, 48, 0), StepShape(48, 2, 1, 47, 60, 2), StepShape(6, 6, 6, 0, 60, 6)
    monkeypatch.setattr(tail, "LEAST", 46)
    first, steps = executor._first_of_tail, len(executor.plan.steps)
    tokens = {shape: [live.tokens for live in executor.shapes(shape)] for shape in (part, end, decode)}
    assert tokens[part] == [48] * first + [0] * (steps - first)
    assert tokens[end] == [48] * first + [2] * (steps - first)
    assert tokens[decode] == [6] * steps


def test_a_stage_without_logits_has_no_tail(engine_dir: Path) -> None:
    plan = engine_format.load(engine_dir).plan
    assert tail.find(plan) is not None
    last = plan.steps[-1]
    mixing = dataclasses.replace(plan, steps=(*plan.steps[:-1], dataclasses.replace(last, plugin="all_reduce")))
    assert tail.find(mixing) is None
    attention = max(i for i, step in enumerate(plan.steps) if step.plugin == "attention")
    assert tail.find(dataclasses.replace(plan, steps=plan.steps[: attention + 1])) is None


def test_sampling_options_end_the_graph_at_the_logits(on_stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2, "prompt_logprobs": 0}
    params = [SamplingParams(20, 0.8, i, ignore_eos=True, **(options if i % 2 else {})) for i in range(len(PROMPTS))]
    llm = LLM(on_stubs, "cpu", lag=1)
    compiled_tokens = [c.token_ids for c in llm.generate(PROMPTS, params)]
    assert {rows for rows, _ in llm.session.logits_graphs._graphs} <= {1, 2, 4, 6}, "these steps are padded too"
    monkeypatch.undo()
    plain = LLM(on_stubs, "cpu", max_kv_blocks=12)
    assert compiled_tokens == [c.token_ids for c in plain.generate(PROMPTS, params)]


def test_memory_is_checked_before_anything_is_loaded(engine_dir: Path) -> None:
    plan = engine_format.load(engine_dir).plan
    block, fixed = reference.kv_block_bytes(plan), compiled.fixed_bytes(plan) + compiled.RESERVE
    need = fixed + plan.sampling_bytes
    first = dataclasses.replace(plan, compatibility=dataclasses.replace(plan.compatibility, pp_size=2))
    assert plan.sampling_bytes > first.sampling_bytes == 0, "the last stage has the logits"
    assert compiled.pool_blocks(plan, need + 7 * block, 1.0) == 7, "beside what options of sampling take"
    assert compiled.pool_blocks(plan, fixed + 2 * max(7 * block, plan.sampling_bytes), 0.5) >= 7, "which has the rest"
    assert compiled.pool_blocks(first, fixed + 7 * block, 1.0) == 7
    assert compiled.pool_blocks(plan, need + 2 * block * 12, 0.5) == 12
    assert compiled.pool_blocks(plan, need + 10**9, 0.9) == 12, "never more than all sequences need"
    with pytest.raises(EngineError, match=r"for weights, activations and sampling, 0.1 GiB more than are free"):
        compiled.pool_blocks(plan, need - 1, 0.9)
    with pytest.raises(EngineError, match=r"1 blocks, and one sequence of max_seq_len 128 needs 2, 0.1 GiB more"):
        compiled.pool_blocks(plan, need + block + 1, 1.0)
    with pytest.raises(EngineError, match=r"2 blocks, and one block for each .* max_batch_size makes 6, 0.1 GiB more"):
        compiled.pool_blocks(plan, need + 2 * block + 1, 1.0)


def test_a_card_that_is_too_small_is_told_before_weights_are_read(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_format.load(engine_dir)
    monkeypatch.setattr(compiled, "check_device", lambda plan, device: None)
    monkeypatch.setattr(weights, "load_to_gpu", lambda engine, device: pytest.fail("weights were read"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda: (compiled.fixed_bytes(engine.plan) + engine.plan.sampling_bytes, 0)
    )
    new = SimpleNamespace(plan=engine.plan, device=torch.device("cuda", 0))
    with pytest.raises(EngineError, match=r"1\.0 GiB more than are free on the GPU"):
        Session._prepare_gpu(new, engine, None, 0.9)  # type: ignore[arg-type]


def test_another_gpu_is_refused_by_name(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, device = engine_format.load(engine_dir).plan, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(EngineError, match="built for target cpu and holds no kernels"):
        compiled.check_device(plan, device)
    for_hopper = dataclasses.replace(plan, compatibility=dataclasses.replace(plan.compatibility, target="sm_90a"))
    with pytest.raises(EngineError, match="built for sm_90a, and A100 is sm_80"):
        compiled.check_device(for_hopper, device)


class FakeCuda:
    """torch.cuda as far as the weight loader uses it."""

    Event = Event

    @staticmethod
    def current_stream() -> Event:
        return Event()


@pytest.mark.parametrize("size", [1000, 4096, 64 << 20])
def test_weights_stream_in_chunks_to_their_places(engine_dir: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    engine, empty = engine_format.load(engine_dir), torch.empty
    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kind: empty(*shape, **kind))
    monkeypatch.setattr(weights, "CHUNK", size)
    loaded = weights.load_to_gpu(engine, torch.device("cpu"))
    expected = reference.map_weights(engine)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.reshape(loaded[name].shape).view(torch.uint8)), name
        assert loaded[name].data_ptr() % 16 == 0
    damaged = dataclasses.replace(engine, plan=dataclasses.replace(engine.plan, weights_digest="0" * 64))
    with pytest.raises(EngineError, match="damaged or exchanged"):
        weights.load_to_gpu(damaged, torch.device("cpu"))


def test_the_attention_plugin_says_how_its_cache_lies() -> None:
    key, value = attention.Attention.cache_shape(5, 2, 64, "float8_e4m3fn")
    assert key == (5, 2, 64, 64) and len(value) == 4


def test_a_recorder_sees_each_buffer_before_its_memory_is_used_again(
    on_stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, torch.Tensor]]] = []

    class Keep(Recorder):
        def end(self) -> None:
            seen[-1].append({name: recorded.raw for name, recorded in self.buffers()})

    for _ in range(2):
        seen.append([])
        llm = LLM(on_stubs, "cpu", 12, lag=0)
        llm.session.recorder = Keep(llm.session.plan, llm.session.executor.weight)
        llm.generate(PROMPTS[:2], SamplingParams(max_tokens=3, ignore_eos=True))
        if llm.session.graphs is not None:
            assert not llm.session.graphs._graphs, "no step is replayed from a CUDA graph"
        monkeypatch.undo()
    assert len(seen[0]) == len(seen[1]) > 3
    for on_buffers, plain in zip(*seen, strict=True):
        assert on_buffers.keys() == plain.keys()
        assert all(torch.equal(on_buffers[name].float(), plain[name].float()) for name in plain)
