"""Launches of an all-reduce on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.plugins.all_reduce.tactics import AllReduceTactic
from fp8.plugins.base import Launcher, StepShape

if TYPE_CHECKING:
    import torch

    from fp8.plugins.all_reduce.region import Regions
    from fp8.plugins.cuda import Function


def bind(
    tactic: AllReduceTactic,
    functions: Sequence[Function],
    x: torch.Tensor,
    y: torch.Tensor,
    operation: str,
    comm: Any,
) -> Launcher:
    """y = the ranks' x summed up, or their maximum, over a step's rows. `comm` is the GPU's communicator; where the
    ranks have no peer memory (`comm.regions` is None), the sum is NCCL's, or, of e4m3 parts, the reference's."""
    if tactic.method != "nccl" and comm.regions is not None:
        return peer_launch(tactic, functions[0], x, y, comm.regions)

    def nccl(step: StepShape) -> None:
        if step.tokens:
            comm.nccl_all_reduce(x[: step.tokens], y[: step.tokens], operation)

    def reference(step: StepShape) -> None:
        from fp8.plugins.all_reduce.reference import sum_of_e4m3

        if step.tokens:
            y[: step.tokens] = sum_of_e4m3(x[: step.tokens], comm)

    return reference if tactic.fp8 else nccl


def peer_launch(
    tactic: AllReduceTactic, function: Function, x: torch.Tensor, y: torch.Tensor, regions: Regions
) -> Launcher:
    from fp8.plugins.cuda import Launch

    row = x[:1].nbytes
    size = ctypes.c_uint64(0)
    arguments = [x, y, regions.argument, ctypes.c_uint32(regions.rank), size]
    launch = Launch(function, tactic.threads, arguments)

    def run(step: StepShape) -> None:
        if step.tokens:
            size.value = step.tokens * row
            launch(tactic.grid(size.value, len(regions.addresses)))

    return run
