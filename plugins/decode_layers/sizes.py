"""What decode_layers takes: the names of its inputs, in order, and the limits of its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SHARED = (
    "qkv", "residual", "position_ids", "slot_mapping", "query_start", "sequence_lengths", "block_tables", "cos", "sin",
)  # fmt: skip
LAYER = (
    "key_cache", "value_cache", "q_scale", "k_scale", "v_scale", "attention_scale",
    "o_weight", "o_x_scale", "o_w_scale", "norm_weight", "norm_scale",
    "gate_up_weight", "gate_up_x_scale", "gate_up_w_scale", "swiglu_scale",
    "down_weight", "down_x_scale", "down_w_scale",
    "next_norm_weight", "next_norm_scale", "qkv_weight", "qkv_x_scale", "qkv_w_scale",
)  # fmt: skip
NEXT = 5  # of them are absent in the last layer
GRID = 132  # blocks, which wait for each other: a multiprocessor for each
MOST_CONTEXT = 2048  # tokens: every tile of 64 leaves a result that a block has to join


class Sizes(NamedTuple):
    """The sizes of the linears."""

    hidden: int
    attention: int
    mlp: int
    qkv: int

    @property
    def stages(self) -> int:
        """Stages of a layer's weights: 16 rows by 1024 of K each."""
        linears = (
            (self.hidden, self.attention), (2 * self.mlp, self.hidden), (self.hidden, self.mlp), (self.qkv, self.hidden)
        )  # fmt: skip
        return sum(n // 16 * -(-k // 1024) for n, k in linears)


def of_layer(inputs: Sequence[Any], layer: int) -> dict[str, Any]:
    """A layer's inputs by name."""
    start = len(SHARED) + layer * len(LAYER)
    return dict(zip(LAYER, inputs[start : start + len(LAYER)], strict=True))
