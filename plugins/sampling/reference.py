"""The meaning of sampling: the Gumbel-max trick over random bits of the counter-based generator Philox4x32-10."""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds. counter: four, key: two broadcastable int64 tensors of 32-bit words; returns four likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps to the 64 bits that are wanted
        c0, c2 = ((product1 >> 32) & MASK) ^ c1 ^ k0, ((product0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = product1 & MASK, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def gumbel(seed: torch.Tensor, counter: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise f32 [L, V]. Column v of row l is word v % 4 of Philox(counter (v / 4, 0, counter[l], 0),
    key seed[l]), taken as u = (word + 1/2) / 2^32 and g = -log(-log1p(-u)). seed: int64 [L], counter: int32 [L]."""
    seed, counter = seed.long()[:, None], counter.long()[:, None] & MASK
    quads = torch.arange((vocabulary + 3) // 4, device=seed.device)[None]
    zero = torch.zeros_like(quads)
    words = philox([quads, zero, counter, zero], [seed & MASK, (seed >> 32) & MASK])
    bits = torch.stack(torch.broadcast_tensors(*words), 2).flatten(1)[:, :vocabulary]
    u = bits.float() * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-u))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, counter: torch.Tensor | None
) -> torch.Tensor:
    """argmax(logits / temperature + Gumbel noise), or argmax(logits) where temperature <= 0: int32 [L].

    Equal scores go to the lowest index; a NaN never wins; a row without any number above -inf gives token 0.
    """
    counter = torch.zeros_like(seed, dtype=torch.int32) if counter is None else counter
    hot = temperature.float()[:, None]
    noisy = logits.float() / torch.where(hot > 0, hot, 1.0) + gumbel(seed, counter, logits.shape[1])
    scores = torch.where(hot > 0, noisy, logits.float())
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    best = scores.amax(1, keepdim=True)
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return torch.where(scores == best, columns, scores.shape[1]).amin(1).int()
