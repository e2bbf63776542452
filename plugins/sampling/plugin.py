"""sampling: the next token of each row of logits, greedy or at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fp8.plugins.base import Kernel, Launcher, OneTactic, PluginError, StepShape, Tensor, Threads
from fp8.plugins.quantize.types import check_tensor

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class Sampling(OneTactic):
    """logits f32 [L, V], temperature f32 [L], seed int64 [L], counter int32 [L]? -> token int32 [L].

    argmax(logits) where temperature <= 0, else argmax(logits / temperature + Gumbel noise): a draw from
    softmax(logits / temperature), fixed by (seed, counter). Equal scores go to the lowest index.
    """

    name: ClassVar[str] = "sampling"

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        logits, temperature, seed, counter = (*inputs, None)[:4]
        rows, _ = check_tensor("logits", logits, ("float32",), (None, None)).shape
        check_tensor("temperature", temperature, ("float32",), (rows,))
        check_tensor("seed", seed, ("int64",), (rows,))
        if counter is not None:
            check_tensor("counter", counter, ("int32",), (rows,))
        return (Tensor("int32", (rows,)),)

    def reference(self, *inputs: torch.Tensor | None, step: object) -> tuple[torch.Tensor, ...]:
        from fp8.plugins.sampling.reference import sample

        return (sample(*(*inputs, None)[:4]),)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        super().check(inputs)
        vocabulary = inputs[0].shape[1]
        if not isinstance(vocabulary, int) or not 0 < vocabulary < 2**31:
            raise PluginError(f"V={vocabulary}, expected a known size below 2^31")

    def kernels(self, tactic: Threads, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        constants = (("VOCABULARY", inputs[0].shape[1]), ("THREADS", tactic.threads))
        return (Kernel("sampling", "sampling.cu", "sampling", constants),)

    def workspace(self, tactic: Threads, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int) -> int:
        """16 bytes per row: its best key so far and how many blocks have arrived."""
        rows = inputs[0].shape[0]
        return 16 * (rows if isinstance(rows, int) else max(max_sequences, 256))

    def bind(
        self,
        tactic: Threads,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        from fp8.plugins.cuda import Launch

        logits, temperature, seed, *counter, token = tensors
        launch = Launch(
            functions[0], tactic.threads, [logits, temperature, seed, *(counter or [None]), token, workspace]
        )

        def run(step: StepShape) -> None:
            if step.logits_rows:
                launch((self._splits(tactic, logits.shape[1], step.logits_rows), step.logits_rows, 1))

        return run

    @staticmethod
    def _splits(tactic: Threads, vocabulary: int, rows: int) -> int:
        """Blocks per row: up to eight per multiprocessor in all, and no thread without four columns."""
        return max(1, min(-(-vocabulary // (4 * tactic.threads)), 8 * 132 // rows))
