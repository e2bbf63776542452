"""How well an engine predicts a text: negative log-likelihoods of given tokens, for perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fp8.runtime.kv_cache import KVCacheError, blocks_for
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session

if TYPE_CHECKING:
    import torch


class Window(NamedTuple):
    """Tokens `begin` to `end` of a text; those from `scored` on count (each once over all windows)."""

    begin: int
    scored: int
    end: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of at most `length` tokens, `stride` apart: every token but the first is predicted once, and all but
    those of the first window from at least `length - stride` tokens before it."""
    out, scored = [], 1
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        if end > scored:
            out.append(Window(begin, scored, end))
        scored = max(scored, end)
        if end == tokens:
            break
    return out


def token_losses(session: Session, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(-ln p(token | those before) float64 [n - 1], the likeliest tokens int64 [n - 1]) for every token but the first.

    The text goes through in chunks of `session.max_logits_rows`, each attending to the cache of those before.
    """
    limits = session.limits
    count = blocks_for(len(tokens), limits.block_size)
    if count > session.num_blocks:
        raise KVCacheError(
            f"{len(tokens)} tokens need {count} KV blocks, and the pool has {session.num_blocks}; take shorter windows"
        )
    request = Request(0, tokens, SamplingParams(), 1, blocks=list(range(count)), slot=0)
    losses, best = [], []
    for start in range(0, len(tokens) - 1, session.max_logits_rows):
        size = min(session.max_logits_rows, len(tokens) - 1 - start)
        logits = session.token_logits([Row(request, start, size, False, 0)])
        chunk = logit_losses(logits, tokens[start + 1 : start + 1 + size])
        losses.append(chunk[0])
        best.append(chunk[1])
    return np.concatenate(losses), np.concatenate(best)


def logit_losses(logits: torch.Tensor, targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(losses float64 [n], argmax int64 [n]) of logits [n, V] for the tokens that came."""
    import torch

    wanted = torch.tensor(list(targets), device=logits.device)
    wide = logits.double()
    losses = wide.logsumexp(1) - wide.gather(1, wanted[:, None])[:, 0]
    return losses.cpu().numpy(), logits.argmax(1).cpu().numpy()
