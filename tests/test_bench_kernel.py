"""fp8-bench kernel: cases, peers, paces and processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import tiny_checkpoint
import torch

from fp8.builder import build as builder
from fp8.builder.checkpoint import Checkpoint
from fp8.models.config import load as load_model
from fp8.plugins import timing
from fp8.plugins.base import types_of
from fp8.plugins.gemm import cases as gemm_cases
from fp8.plugins.timing import Graph, Pace
from fp8.scripts import bench
from fp8.scripts.benchmarks import (
    case_buffers,
    isolated,
    kernel,
    kernel_rows,
    peers,
)
from fp8.scripts.benchmarks.kernel_cases import Timed


def test_matrices_of_a_case_lie_in_several_places(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = case_buffers.CaseBuffers(gemm_cases.case(2, 32, 64, "static"), 0, "cpu")
    monkeypatch.setattr(case_buffers, "sets_for", lambda size: 1)
    first, *others = buffers.sets
    assert len(others) == 2
    for tensors in others:
        assert all(a is None or a.data_ptr() != b.data_ptr() for a, b in zip(first, tensors, strict=True))
        assert all(torch.equal(first[i].view(torch.uint8), tensors[i].view(torch.uint8)) for i in (0, 1))
    del buffers.sets
    monkeypatch.setattr(case_buffers, "SMALLER", 0)
    assert len(buffers.sets) == 1


def test_kernels_are_timed_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("there is a Hopper GPU")
    assert bench.main(["kernel"]) == 1
    assert "needs a Hopper GPU" in capsys.readouterr().err


def test_deep_gemm_is_a_peer_of_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layouts that it documents: matrices, scales beside them, those of x in columns padded to 16 bytes."""
    outputs = []

    def fp8_gemm_nt(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], d: torch.Tensor) -> None:
        (x, x_scale), (w, w_scale) = a, b
        assert x_scale.stride() == (1, -(-x.shape[0] // 4) * 4)
        x = x.float() * x_scale.repeat_interleave(128, 1)
        w = w.float() * w_scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)
        outputs.append(d.copy_(x @ w.t()))

    package = ModuleType("deep_gemm")
    package.__spec__ = ModuleSpec("deep_gemm", None)
    package.fp8_gemm_nt = fp8_gemm_nt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    case = gemm_cases.case(7, 200, 384, "block")
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    (expected,) = case.plugin.reference(*inputs, step=case.step)
    found = peers.peers_of(case.plugin, case.step, inputs)
    assert list(found) == ["cuBLASLt", "DeepGEMM"]
    found["DeepGEMM"](inputs)()
    torch.testing.assert_close(outputs[0], expected, rtol=1e-2, atol=1e-2)
    for other in (gemm_cases.case(7, 200, 384, "block8"), gemm_cases.case(7, 200, 384, "block", out="float32")):
        assert not peers.peers_of(other.plugin, other.step, other.make(torch.Generator().manual_seed(0), "cpu"))


def test_scales_in_blocks_go_to_torch_in_the_layouts_that_tell_it_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ScaledBlas.cpp knows blocks of 1 x 128 by 128 x 128 by strides: (1, M) of x's scales, and of those of w^T
    (1, K / 128 rounded up to 4)."""

    def scaled_mm(
        a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, t: torch.Tensor, *, out_dtype: object, out: torch.Tensor
    ) -> torch.Tensor:
        assert a.stride(1) == b.stride(0) == 1 and s.dtype == t.dtype == torch.float32
        assert s.shape == (7, 3) and s.stride() == (1, 7) and t.shape == (3, 2) and t.stride() == (1, 4)
        x, w = (
            a.float() * s.repeat_interleave(128, 1),
            b.t().float() * t.t().repeat_interleave(128, 1).repeat_interleave(128, 0)[:200],
        )
        return out.copy_(x @ w.t())

    case = gemm_cases.case(7, 200, 384, "block")
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    (expected,) = case.plugin.reference(*inputs, step=case.step)
    launch = peers.peers_of(case.plugin, case.step, inputs)["cuBLASLt"](inputs)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.testing.assert_close(launch(), expected, rtol=1e-2, atol=1e-2)


def test_bursts_follow_a_pause_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("idle"))
    monkeypatch.setattr(timing.time, "sleep", seen.append)
    monkeypatch.setattr(timing, "replays", lambda graph, seconds: seen.append((graph, seconds)) or [len(seen)])
    assert timing.in_bursts(["a", "b"], 2, 0.012, 0.02) == [6.0, 9.0]  # type: ignore[list-item]
    once = ["idle", 0.02, ("a", 0.012), "idle", 0.02, ("b", 0.012)]
    assert seen == 2 * once


@pytest.mark.parametrize(("format", "mode", "rows"), [("fp8", "static", (0,)), ("fp8_rowwise", "rowwise", (0, 2))])
def test_the_tactics_timed_are_those_that_an_engine_gets(
    tmp_path: Path, format: str, mode: str, rows: tuple[int, ...]
) -> None:
    directory = tiny_checkpoint.write(tmp_path, tiny_checkpoint.qformat(format))
    source = builder.Source(load_model(Checkpoint(directory).config), Checkpoint(directory))
    request = builder.Request(max_num_tokens=kernel_rows.MAX_NUM_TOKENS)
    plan = builder.compile(source, request, builder.Reporter(), dry_run=True).plan
    step = next(s for s in plan.steps if s.name == "model.layers.0.mlp.down_proj")
    n, k = (int(d) for d in plan.buffer(step.inputs[1]).shape)
    for m in (1, 16, 64, 128, 4096):
        case = gemm_cases.case(m, n, k, mode)
        types = types_of(case.make(torch.Generator(), "cpu"))
        (tactic,), _ = kernel_rows.tactics_of(Timed("", "gemm", case, rows), types, 1)
        held = next(choice for choice in step.tactics if choice.max_tokens >= m)
        assert dataclasses.asdict(tactic) == held.tactic


def _answers(first: int) -> isolated.Answers:
    def answer(question: str) -> tuple[str, bool]:
        if question == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if question == "hang":
            time.sleep(60)
        return f"{first} {question}", question != "last"

    return answer


def test_a_process_that_is_lost_takes_its_question_along_and_no_more() -> None:
    process = isolated.Isolated(_answers, 5)
    assert process.ask("one", 60) == "5 one" and process.usable
    with pytest.raises(isolated.Lost, match="ended by SIGSEGV"):
        process.ask("die", 60)
    assert not process.usable
    with pytest.raises(isolated.Lost, match="no answer within 0 s"):
        isolated.Isolated(_answers, 5).ask("hang", 0.1)
    process = isolated.Isolated(_answers, 6)
    assert process.ask("last", 60) == "6 last" and not process.usable
    process.close()


def test_kernel_rows_go_on_where_a_process_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case ends its process; the next one starts with the third."""
    started = []

    class Process:
        def __init__(self, _: object, chosen: kernel_rows.Chosen, first: int) -> None:
            started.append(first)
            self.usable = True

        def ask(self, place: int, seconds: float) -> dict:
            if place == 1:
                self.usable = False
                raise isolated.Lost("its process was ended by SIGSEGV")
            return {"place": place}

        def close(self) -> None:
            self.usable = False

    monkeypatch.setattr(kernel, "Isolated", Process)
    chosen = kernel_rows.Chosen("norm_quant")
    measuring = kernel.Measuring(chosen)
    rows = [measuring.row(place, timed) for place, timed in enumerate(chosen.cases()[:3])]
    assert rows[0] == {"place": 0} and rows[2] == {"place": 2} and started == [0, 2]
    assert rows[1]["failure"] == "its process was ended by SIGSEGV" and rows[1]["name"].startswith("norm_quant")


def test_contestants_under_load_alternate_quickly_and_take_a_bounded_time() -> None:
    def graph(seconds: float, count: int = 1) -> Graph:
        return Graph(None, (), count, seconds)  # type: ignore[arg-type]

    pace = kernel_rows._loaded([graph(15e-6, 33), graph(14e-6, 35)])
    assert pace == Pace(kernel_rows.TURNS, kernel_rows.TURN, 5)
    assert kernel_rows._loaded([graph(15e-6, 33)]) == Pace(kernel_rows.TURNS, kernel_rows.TURN, 10)
    for count in (1, 2, 6):
        for seconds in (0.006, 0.04, 0.2):
            pace = kernel_rows._loaded([graph(seconds)] * count)
            turn = count * max(pace.seconds, seconds)
            assert pace.before is not None and pace.before * turn >= kernel_rows.HEATED, "the clock is steady by then"
            assert pace.turns >= 3 and pace.turns * turn <= max(
                3 * turn, min(kernel_rows.LOADED * count, kernel_rows.STEADY - kernel_rows.HEATED)
            )
