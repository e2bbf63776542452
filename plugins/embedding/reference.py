"""The meaning of an embedding: a gather of rows."""

from __future__ import annotations

import torch


def embedding(input_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table[input_ids]; an id outside [0, V) gives a row of zeros. input_ids: int32 [T], table: [V, H] -> [T, H]."""
    inside = (input_ids >= 0) & (input_ids < table.shape[0])
    rows = table[torch.where(inside, input_ids, 0).long()]
    return torch.where(inside[:, None], rows, torch.zeros((), dtype=table.dtype, device=table.device))
