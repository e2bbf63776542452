"""How well an engine predicts given tokens: those of a text, for perplexity; continuations of contexts, for choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fp8.runtime.kv_cache import KVCacheError, blocks_for
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session

if TYPE_CHECKING:
    import torch

    from fp8.runtime.llm import LLM, Completion

GROUP = 1024  # requests in the queue at a time: the scheduler looks through all that wait


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


class Score(NamedTuple):
    """ln p of a continuation, and whether each of its tokens was the likeliest."""

    logprob: float
    greedy: bool


def score_continuations(
    llm: LLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
) -> list[Score]:
    """How likely each continuation is after its context, in order; both at least one token long, together at most
    max_seq_len. All run through the scheduler, beside each other and on shared prefixes.

    The last token is looked up in what the rest of the sequence predicts, so continuations that differ in it alone, as
    one-token choices do, cost one pass together. `progress` is told how many are done. Raises RequestError for a
    sequence that is too long or holds a token outside the vocabulary.
    """
    scores: list[Score | None] = [None] * len(pairs)
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise RequestError(f"pair {i}: the context has {len(context)} tokens, the continuation {len(continuation)}")
        groups.setdefault(((*context, *continuation[:-1]), len(context)), []).append(i)
    for part in _parts(list(groups.items())):
        wanted = [tuple(dict.fromkeys(pairs[i][1][-1] for i in members)) for _, members in part]
        params = [
            SamplingParams(
                max_tokens=1, ignore_eos=True, logprobs=0, logprob_token_ids=last,
                prompt_logprobs=1 if start < len(prompt) else None, prompt_logprobs_start=start,
            ) for ((prompt, start), _), last in zip(part, wanted, strict=True)
        ]  # fmt: skip
        completions = llm.generate([list(prompt) for (prompt, _), _ in part], params)
        for ((_, start), members), completion in zip(part, completions, strict=True):
            for i in members:
                scores[i] = _score(completion, start, pairs[i][1][-1])
        if progress:
            progress(sum(len(members) for _, members in part))
    return [score for score in scores if score is not None]


def _parts(items: list) -> Iterator[list]:
    yield from (items[i : i + GROUP] for i in range(0, len(items), GROUP))


def _score(completion: Completion, start: int, last: int) -> Score:
    """Scores the prompt's tokens from `start` on and the token `last` after them."""
    known = [entry for entry in (completion.prompt_logprobs or [])[start:] if entry is not None]
    assert completion.logprobs is not None
    final = completion.logprobs[0]
    logprob = sum(entry.logprob for entry in known) + dict(final.asked)[last]
    return Score(logprob, final.token == last and all(entry.top[0][0] == entry.token for entry in known))
