"""fetch: a step's inputs, from the host's memory to the device's, as a kernel that CUDA graphs replay.

The runtime launches it before a pipeline's steps, which cannot take over the inputs of the step before. A copy by
the driver stands between two graphs, and costs their last and first kernels the overlap.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Kernel, Launcher, OneTactic, PluginError, StepShape, Tensor, Threads
from fp8.plugins.quantize.types import check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

UNIT = 16  # bytes of a thread
COUNTED = ("tokens", "sequences", "sequences + 1", "logits rows")  # what the rows of a field are counted by


def counts(step: StepShape) -> tuple[int, int, int, int]:
    """Rows of each kind, in the order of COUNTED."""
    return step.tokens, step.sequences, step.sequences + 1, step.logits_rows


@dataclass(frozen=True)
class Fetch(OneTactic):
    """staging u8 [stages, S], fields i32 [F, 3], buffer u8 [S], state i32 [2]; no output.

    A field: its offset, a multiple of 16; the index in COUNTED of what counts its rows; bytes of a row. In place:
    buffer gets these rows of staging[state[0]], whole units of 16 bytes; state[0] goes one on and around, state[1]
    stays 0. `staging` may lie in pinned host memory. Fields do not share units.
    """

    name: ClassVar[str] = "fetch"
    updates: ClassVar[tuple[int, ...]] = (2, 3)

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        staging, fields, buffer, state = inputs
        _, size = check_tensor("staging", staging, ("uint8",), (None, None)).shape
        check_tensor("fields", fields, ("int32",), (None, 3))
        check_tensor("buffer", buffer, ("uint8",), (size,))
        check_tensor("state", state, ("int32",), (2,))
        return ()

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        staging, fields, buffer, state = inputs
        turn = int(state[0])
        for offset, counted, width in fields.tolist():
            here = slice(offset, offset + -(-counts(step)[counted] * width // UNIT) * UNIT)
            buffer[here] = staging[turn, here].to(buffer.device)
        state[0] = (turn + 1) % len(staging)
        return ()

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        super().check(inputs)
        size = inputs[0].shape[1]
        if isinstance(size, int) and size % UNIT:
            raise PluginError(f"staging has rows of {size} bytes, expected whole units of {UNIT}")

    def kernels(self, tactic: Threads, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return (Kernel("fetch", "fetch.cu", "fetch", (("THREADS", tactic.threads),)),)

    def bind(
        self,
        tactic: Threads,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        sizes = [(counted, width) for _, counted, width in tensors[1].tolist()]
        tokens, sequences, rows = (ctypes.c_int(0) for _ in range(3))
        stages, size = map(ctypes.c_int, tensors[0].shape)
        launch = Launch(functions[0], tactic.threads, [*tensors, stages, size, tokens, sequences, rows])

        def run(step: StepShape) -> None:
            tokens.value, sequences.value, rows.value = step.tokens, step.sequences, step.logits_rows
            longest = max(counts(step)[counted] * width for counted, width in sizes)
            launch((-(-longest // (UNIT * tactic.threads)), len(sizes), 1))

        return run
