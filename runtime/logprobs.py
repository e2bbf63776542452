"""Log-probabilities of tokens, and of the likeliest beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fp8.runtime.request import Request
    from fp8.runtime.session import Session


@dataclass(frozen=True)
class TokenLogprobs:
    """ln p of a token, natural and by the model alone, and of the likeliest tokens, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LogprobTable:
    """`rows` tokens' log-probabilities, perhaps still on their way from the device: values f32 [S, 1 + k] and tokens
    int32 [S, 1 + k], the chosen token first. `wanted`: how many of the k each row asked for."""

    values: torch.Tensor
    tokens: torch.Tensor
    wanted: Sequence[int]

    def entries(self) -> list[TokenLogprobs]:
        out = []
        for values, tokens, k in zip(self.values.tolist(), self.tokens.tolist(), self.wanted, strict=True):
            top = tuple(zip(tokens[1 : k + 1], values[1 : k + 1], strict=True))
            out.append(TokenLogprobs(tokens[0], values[0], top))
        return out


def logprob_table(log_p: torch.Tensor, chosen: torch.Tensor, wanted: Sequence[int]) -> LogprobTable:
    """The table of `chosen` int [S] in log_p f32 [S, V], copied to the host without a wait for the device."""
    import torch

    top = log_p.topk(min(max(wanted), log_p.shape[1]), 1)
    index = chosen.long()[:, None]
    values = torch.cat([log_p.gather(1, index), top.values], 1)
    tokens = torch.cat([index, top.indices], 1).int()
    return LogprobTable(_to_host(values), _to_host(tokens), wanted)


def prompt_logprobs(session: Session, request: Request) -> list[TokenLogprobs | None]:
    """One entry per prompt token, None for the first. The prompt passes through the request's own blocks once more, in
    chunks of `session.max_logits_rows`; waits for the device."""
    import torch

    from fp8.runtime.scheduler import Row

    prompt, k = request.prompt, request.params.prompt_logprobs
    assert k is not None
    out: list[TokenLogprobs | None] = [None]
    for start in range(0, len(prompt) - 1, session.max_logits_rows):
        size = min(session.max_logits_rows, len(prompt) - 1 - start)
        log_p = session.token_logits([Row(request, start, size, False, 0)]).log_softmax(1)
        targets = torch.tensor(list(prompt[start + 1 : start + 1 + size]), device=log_p.device)
        table = logprob_table(log_p, targets, [k] * size)
        if log_p.is_cuda:
            torch.cuda.synchronize(log_p.device)
        out += table.entries()
    return out


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
