"""The meaning of advance: a decode step's inputs, one token on."""

from __future__ import annotations

import torch


def advance(
    token: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    slot_mapping: torch.Tensor,
    sequence_lengths: torch.Tensor,
    counter: torch.Tensor,
    stage: torch.Tensor,
    read: torch.Tensor,
) -> None:
    """Writes all but `token` and `slots` in place, of each as many rows as `token` has; see the plugin."""
    rows = torch.arange(len(token), device=token.device)
    table[slots] = token
    read[stage.long(), rows] = token
    stage.copy_((stage + 1) % len(read))
    live = (sequence_lengths > 0).int()
    input_ids.copy_(torch.where(live.bool(), token, input_ids))
    for values in (position_ids, slot_mapping, counter, sequence_lengths):
        values += live
