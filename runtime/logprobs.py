"""Log-probabilities of tokens, and of the likeliest beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fp8.runtime.request import Request
    from fp8.runtime.scheduler import Row
    from fp8.runtime.session import Session


@dataclass(frozen=True)
class TokenLogprobs:
    """ln p of a token, natural and by the model alone, of the likeliest tokens, best first, and of those asked about,
    in their order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    asked: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LogprobTable:
    """Tokens' log-probabilities, perhaps still on their way from the device: values f32 [S, 1 + k + m] and tokens
    int32 [S, 1 + k + m], the chosen token first, then the k likeliest, then those asked about. `wanted`: how many of
    the k, and of the m, each row asked for."""

    values: torch.Tensor
    tokens: torch.Tensor
    wanted: Sequence[tuple[int, int]]

    def entries(self) -> list[TokenLogprobs]:
        out = []
        first_asked = self.tokens.shape[1] - max((m for _, m in self.wanted), default=0)
        for values, tokens, (k, m) in zip(self.values.tolist(), self.tokens.tolist(), self.wanted, strict=True):
            pairs = list(zip(tokens, values, strict=True))
            out.append(TokenLogprobs(*pairs[0], tuple(pairs[1 : k + 1]), tuple(pairs[first_asked : first_asked + m])))
        return out


def logprob_table(
    log_p: torch.Tensor, chosen: torch.Tensor, wanted: Sequence[tuple[int, int]], asked: torch.Tensor | None = None
) -> LogprobTable:
    """The table of `chosen` int [S], of the likeliest and of `asked` int64 [S, m] in log_p f32 [S, V], copied to the
    host without a wait for the device."""
    import torch

    top = log_p.topk(min(max(k for k, _ in wanted), log_p.shape[1]), 1)
    index = chosen.long()[:, None] if asked is None else torch.cat([chosen.long()[:, None], asked], 1)
    values = log_p.gather(1, index)
    values = torch.cat([values[:, :1], top.values, values[:, 1:]], 1)
    tokens = torch.cat([index[:, :1], top.indices, index[:, 1:]], 1).int()
    return LogprobTable(_to_host(values), _to_host(tokens), wanted)


def prompt_logprobs(session: Session, requests: Sequence[Request]) -> list[list[TokenLogprobs | None]]:
    """One entry per prompt token of every request, None before its `prompt_logprobs_start`. These tokens pass through
    the requests' own blocks once more, those of several requests together; waits for the device."""
    import torch

    out: list[list[TokenLogprobs | None]] = [
        [None] * min(r.params.prompt_logprobs_start, len(r.prompt)) for r in requests
    ]
    at = {request: i for i, request in enumerate(requests)}
    for rows in _scoring_steps(requests, session.max_logits_rows, session.limits.max_batch_size):
        log_p = session.token_logits(rows).log_softmax(1)
        targets = [t for row in rows for t in row.request.prompt[row.start + 1 : row.start + 1 + row.count]]
        wanted = [(row.request.params.prompt_logprobs or 0, 0) for row in rows for _ in range(row.count)]
        table = logprob_table(log_p, torch.tensor(targets, device=log_p.device), wanted)
        if log_p.is_cuda:
            torch.cuda.synchronize(log_p.device)
        entries = iter(table.entries())
        for row in rows:
            out[at[row.request]] += itertools.islice(entries, row.count)
    return out


def _scoring_steps(requests: Sequence[Request], max_tokens: int, max_rows: int) -> Iterator[list[Row]]:
    """Steps of at most `max_tokens` tokens over all tokens before those that are wanted, in order for every request;
    single tokens come first in a step."""
    from fp8.runtime.scheduler import Row

    rows: list[Row] = []
    room = max_tokens
    for request in requests:
        start, end = request.params.prompt_logprobs_start - 1, len(request.prompt) - 1
        while start < end:
            if not room or len(rows) == max_rows:
                yield sorted(rows, key=lambda row: row.count > 1)
                rows, room = [], max_tokens
            count = min(end - start, room)
            rows.append(Row(request, start, count, False, 0))
            start, room = start + count, room - count
    if rows:
        yield sorted(rows, key=lambda row: row.count > 1)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
