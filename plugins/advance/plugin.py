"""advance: a decode step's inputs become those of the step after it, where the sampled tokens are.

The runtime launches it after the sampler. The next step then needs nothing from the host, as long as the sequences are
the same and none of them begins a page.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Kernel, Launcher, OneTactic, StepShape, Tensor, Threads
from fp8.plugins.quantize.types import check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

ROWS = ("input_ids", "position_ids", "slot_mapping", "sequence_lengths", "counter", "stage")  # one value a row


@dataclass(frozen=True)
class Advance(OneTactic):
    """token i32 [L], slots i64 [L], table i32 [S], ROWS i32 [L or more] each, read i32 [stages, L or more]; no output.

    In place, for each row: table[slots] and read[stage] get the token, `stage` goes one on and around. Where
    sequence_lengths > 0, input_ids gets the token and the others grow by one: `slot_mapping` stays on its page.
    Slots of rows with a context differ. `read` may lie in pinned host memory.
    """

    name: ClassVar[str] = "advance"
    threads: ClassVar[int] = 128
    updates: ClassVar[tuple[int, ...]] = tuple(range(2, 2 + 1 + len(ROWS) + 1))  # from the table on

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        check_tensor("token", inputs[0], ("int32",), (None,))
        check_tensor("slots", inputs[1], ("int64",), (None,))
        for name, tensor in zip(("table", *ROWS), inputs[2:-1], strict=True):
            check_tensor(name, tensor, ("int32",), (None,))
        check_tensor("read", inputs[-1], ("int32",), (None, None))
        return ()

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.advance.reference import advance

        token, slots, table, *rows, read = inputs
        n = step.logits_rows
        advance(token[:n], slots[:n], table, *(t[:n] for t in rows), read)
        return ()

    def kernels(self, tactic: Threads, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        return (Kernel("advance", "advance.cu", "advance", (("THREADS", tactic.threads),)),)

    def bind(
        self,
        tactic: Threads,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        read, rows = tensors[-1], ctypes.c_int(0)
        sizes = (ctypes.c_int(n) for n in read.shape)
        launch = Launch(functions[0], tactic.threads, [*tensors, rows, *sizes])

        def run(step: StepShape) -> None:
            rows.value = step.logits_rows
            if step.logits_rows:
                launch(-(-step.logits_rows // tactic.threads))

        return run
