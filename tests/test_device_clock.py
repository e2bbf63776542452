"""The device's time and clock at the steps of a session."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny_engine
import torch

from fp8.plugins.compile import compile_kernel
from fp8.runtime.llm import LLM
from fp8.runtime.request import SamplingParams
from fp8.runtime.session import Session
from fp8.scripts.benchmarks import (
    device_clock,
)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


class _Event:
    """An event of a device whose clock is a list of times to come."""

    times: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.times.pop(0)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


def test_the_device_is_busy_while_steps_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(_Event, "times", [0.0, 9.0, 10.0, 14.0, 14.0, 20.0])
    session = SimpleNamespace(device=torch.device("cuda"))
    clock = device_clock.DeviceClock(session)  # type: ignore[arg-type]
    for again in (False, False, True):
        with session.around_step(None):
            pass
        if again:
            assert clock.facts() == {"device_ms_per_step": 19 / 3, "device_busy": 19 / 20}
    clock.restart()
    assert clock.facts() == {"device_ms_per_step": None, "device_busy": None}


def test_clocks_between_two_stamps_are_those_of_the_multiprocessors_that_both_saw(engine_dir: Path) -> None:
    """Each counts from a begin of its own; no block came to the second at first, none to the third at the end."""
    clock = device_clock.CoreClock(Session(engine_dir, "cpu"))
    stamps = ([[5_000, 100], [0, 0], [70, 100], [9, 200]], [[5_000 + 1_400, 1_100], [3, 1_100], [0, 0], [2_809, 2_200]])
    begin, end = (device_clock.Stamp(torch.tensor(rows)) for rows in stamps)
    assert clock.mhz(begin, end) == pytest.approx(1400)
    assert clock.mhz(clock.stamp(), clock.stamp()) is None, "a CPU has none"


def test_stamps_stand_behind_the_steps_that_take_in_prompts(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(engine_dir, "cpu")
    clock, at = device_clock.CoreClock(llm.session), list[int]()
    monkeypatch.setattr(clock, "stamp", lambda: at.append(llm.worker.statistics.step_count))
    before = llm.session.around_step
    with clock.behind_prompts() as found:
        llm.generate([list(range(70)), list(range(10, 80))], SamplingParams(max_tokens=5, ignore_eos=True))
    assert llm.session.limits.max_num_tokens == 96 and at == [0, 1], "140 tokens are two steps"
    assert len(found) == 2 and llm.session.around_step is before


def test_the_kernel_that_stamps_compiles() -> None:
    found = compile_kernel(device_clock.STAMP)
    assert not found.spill_bytes and found.registers < 32
