"""Verification: the interpreter runs the graph before and after every pass on the same random steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch.overrides import TorchFunctionMode

from fp8.builder.engine import Limits
from fp8.builder.interpret import Interpreter, empty_caches, step_inputs
from fp8.builder.parallel.lockstep import Ranks

NARROW = (torch.float32, torch.bfloat16, torch.float16)

PLAIN_SQNR, QUANTIZED_SQNR = 80.0, 45.0  # dB; with quantization a last-bit difference may flip an FP8 code


class VerificationError(RuntimeError):
    """A pass changed what the graph computes: names the pass, the SQNR found and the bound. Or there is nothing to hold
    it against."""


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(|expected|^2 / |found - expected|^2); inf if equal, -inf if
    anything is not finite."""
    signal, noise = expected.double().square().sum(), (found.double() - expected.double()).square().sum()
    if not torch.isfinite(signal) or not torch.isfinite(noise):
        return float("-inf")
    return float(10 * torch.log10(signal / noise)) if noise > 0 else float("inf")


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    """Makes float64 the default type. That is the process's, not a thread's, so set it around all ranks."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class Exact(TorchFunctionMode):
    """Every float type but e4m3 becomes float64 in this thread, in plugins' references too.

    Two equal graphs then agree to 1e-15, so that no code flips between them: in float32 a last-bit difference flips one
    code in 10^4 to 10^6, the flip disturbs its row, and after a few layers the logits differ by 30 to 40 dB.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.view:  # stored bytes are read as what they are
            return func(*args, **kwargs or {})
        wider = {k: _wider(v) for k, v in (kwargs or {}).items()}
        return func(*map(_wider, args), **wider)


def _wider(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.dtype in NARROW else x


class ExactInterpreter(Interpreter):
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        with Exact():
            return super().__call__(*args, **kwargs)

    def _constant_value(self, tensor: gs.Tensor) -> torch.Tensor:
        return exact(super()._constant_value(tensor))


class Verifier:
    """Logits of a prefill step of three sequences and of a mixed step after it (decode rows and a chunk)."""

    def __init__(self, graph: gs.Graph, vocabulary: int, limits: Limits, quantized: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.context = min(limits.max_seq_len, 128)
        longest = max(1, self.context - 4)
        lengths = [min(n, longest) for n in (70, 5, 9)]

        def tokens(count: int) -> list[int]:
            return torch.randint(vocabulary, (count,), generator=generator).tolist()

        self.steps = [
            [(tokens(n), 0) for n in lengths],
            [(tokens(min(n, self.context - past)), past) for n, past in zip((1, 1, 3), lengths, strict=True)],
        ]
        self.bound = QUANTIZED_SQNR if quantized else PLAIN_SQNR
        self.before = self._logits([graph], 1)
        if not torch.isfinite(self.before).all():
            raise VerificationError("the model's logits are not finite before any pass: look for NaN in its weights")

    def check(self, name: str, *graphs: gs.Graph, tp_size: int = 1, bound: float | None = None) -> float:
        """SQNR in dB of the graph (of all ranks' graphs, in order) after the pass `name` against before it. Raises
        VerificationError below the bound, the verifier's if none is given."""
        after = self._logits(graphs, tp_size)
        found = sqnr(after, self.before)
        bound = self.bound if bound is None else bound
        if not found >= bound:
            raise VerificationError(
                f"pass {name} changed the result: SQNR {found:.1f} dB, expected at least {bound:.0f} dB; "
                "--dump_passes DIR writes the graph after every pass"
            )
        self.before = after
        return found

    def _logits(self, graphs: Sequence[gs.Graph], tp_size: int) -> torch.Tensor:
        ranks = Ranks(graphs, tp_size, ExactInterpreter)
        logits: list[torch.Tensor] = []
        for sequences in self.steps:
            feeds = step_inputs(sequences, self.context)
            if not logits:
                ranks.caches = [{n: exact(c) for n, c in empty_caches(g, feeds).items()} for g in graphs]
            with float64_by_default():
                logits.append(ranks(feeds))
        return torch.cat(logits)
