"""What sampling parameters do to logits f32 [S, V], as torch functions without a wait for the device.

Every row comes out the same to the bit whatever the other rows are: apart from maxima and sorts, values are only
combined across a row as integers (probabilities in fixed point), whose sums do not depend on the order that a device
takes for a batch of that size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FIXED_POINT = 2.0**40  # steps per unit of probability: 2^18 tokens at most 1 each stay below 2^63


def penalize(
    logits: torch.Tensor,
    history: torch.Tensor,
    prompt: torch.Tensor,
    length: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Logits after the penalties. history: int [S, M], each row's `length` tokens, the first `prompt` from the prompt.

    Repetition as Keskar et al. 2019 (prompt and output); presence and frequency as OpenAI's interface (output alone).
    """
    import torch

    rows, vocabulary = logits.shape
    place = torch.arange(history.shape[1], device=logits.device)[None]
    nowhere = torch.full_like(history, vocabulary, dtype=torch.int64)  # one column beside the vocabulary
    known = torch.where(place < length[:, None], history.long(), nowhere)
    output = torch.where(place >= prompt[:, None], known, nowhere)
    seen = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=logits.device).scatter_(1, known, True)
    count = torch.zeros(rows, vocabulary + 1, dtype=torch.int32, device=logits.device)
    count = count.scatter_add_(1, output, torch.ones_like(output, dtype=torch.int32))[:, :-1]
    factor = repetition[:, None]
    repeated = torch.where(logits < 0, logits * factor, logits / factor)
    logits = torch.where(seen[:, :-1], repeated, logits)
    return logits - torch.where(count > 0, presence[:, None], 0.0) - frequency[:, None] * count


def keep_likely(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """-inf for all but the `top_k` [S] largest scores, then for all but the fewest whose probabilities reach `top_p`.

    top_k from V on and top_p 1 keep all; scores equal to the last one kept stay too.
    """
    import torch

    ordered = scores.sort(dim=1, descending=True).values
    floor = ordered.gather(1, (top_k.long()[:, None] - 1).clamp(0, scores.shape[1] - 1))
    weight = _fixed_point(torch.where(ordered >= floor, ordered, -torch.inf))
    before = weight.cumsum(1) - weight
    wanted = top_p[:, None].double() * weight.sum(1, keepdim=True)
    nucleus = ordered.gather(1, ((before < wanted).sum(1, keepdim=True) - 1).clamp(min=0))
    floor = torch.where(top_p[:, None] < 1, torch.maximum(floor, nucleus), floor)
    return torch.where(scores >= floor, scores, -torch.inf)


def keep_near_best(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """-inf for scores whose probability is below `min_p` [S] times the largest one."""
    import torch

    floor = scores.amax(1, keepdim=True) + min_p.log()[:, None]  # log 0 = -inf keeps all
    return torch.where(scores >= floor, scores, -torch.inf)


def keep_typical(scores: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """-inf for all but the fewest scores whose information is nearest to the entropy and whose probabilities reach
    `typical_p` [S] (Meister et al. 2022); 1 keeps all."""
    import torch

    weight = _fixed_point(scores)
    total = weight.sum(1, keepdim=True).double()
    shifted = scores.double() - scores.amax(1, keepdim=True).double()
    information = torch.where(scores > -torch.inf, (total / FIXED_POINT).log() - shifted, torch.inf)
    share = torch.where(weight > 0, weight.double() / total * information, 0.0)
    entropy = (share * FIXED_POINT).round().long().sum(1, keepdim=True).double() / FIXED_POINT
    distance = (information - entropy).abs()
    ordered, order = distance.sort(dim=1, stable=True)
    reached = weight.gather(1, order).cumsum(1)
    last = (reached < typical_p[:, None].double() * total).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    typical = (distance <= ordered.gather(1, last)) | (typical_p[:, None] >= 1)
    return torch.where(typical, scores, -torch.inf)


def _fixed_point(scores: torch.Tensor) -> torch.Tensor:
    """exp(score - largest score) as int64, in units of 1 / FIXED_POINT."""
    import torch

    relative = (scores - scores.amax(1, keepdim=True)).double()
    return torch.where(scores > -torch.inf, relative.exp() * FIXED_POINT, 0.0).round().long()
