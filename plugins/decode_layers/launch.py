"""The launch of decode_layers.cu: its table of layers, what the blocks exchange, the arguments."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import BLOCK_SIZE, Launcher, StepShape
from fp8.plugins.decode_layers.sizes import GRID, MOST_CONTEXT, SHARED, Sizes, of_layer

if TYPE_CHECKING:
    import torch

    from fp8.plugins.all_reduce.region import Regions
    from fp8.plugins.cuda import Function
    from fp8.plugins.decode_layers.plugin import DecodeLayers, Whole

LAYER_BYTES, MAP_BYTES = 896, 128  # of `Layer` in shape.cuh, and of a tensor map
LINEARS = ("o", "gate_up", "down", "qkv")
POINTERS = (*(f"{name}_w_scale" for name in LINEARS), "norm_weight", "next_norm_weight", "key_cache", "value_cache")
SCALES = (
    *(f"{name}_x_scale" for name in LINEARS),
    "attention_scale", "norm_scale", "swiglu_scale", "next_norm_scale", "q_scale", "k_scale", "v_scale",
)  # fmt: skip


def exchange_bytes(sizes: Sizes) -> int:
    """Bytes of `Exchange` in shape.cuh, in multiples of 1024."""
    words = 2 * sizes.hidden + sizes.mlp // 2 + sizes.attention // 2 + sizes.qkv + 1
    return -(-words * 4 // 1024) * 1024


def tile_bytes(plugin: DecodeLayers, context: int) -> int:
    """Bytes of the `Tile`s in attend.cuh, for all heads."""
    return plugin.num_heads * -(-context // BLOCK_SIZE) * (8 * plugin.head_dim + 16)


def kept_bytes(sizes: Sizes) -> int:
    """Bytes of the residual, which every block keeps where there are several ranks: `kept` in sums.cuh."""
    return GRID * sizes.hidden * 2


def bind(
    plugin: DecodeLayers,
    tactic: Whole,
    function: Function,
    tensors: Sequence[torch.Tensor | None],
    workspace: torch.Tensor,
    regions: Regions | None = None,
) -> Launcher:
    """`regions`: of the ranks that share the layers."""
    import torch

    from fp8.plugins.cuda import Launch

    layers = [of_layer(tensors, i) for i in range(plugin.layers)]
    shared = dict(zip(SHARED, tensors, strict=False))
    y, residual_out = tensors[-2:]
    sizes = plugin.sizes(layers[0])
    table = b"".join(_layer(w).ljust(LAYER_BYTES, bytes(1)) for w in layers)
    on_device = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(workspace.device)
    partials = workspace[exchange_bytes(sizes) :]
    order = ("qkv", "residual", "position_ids", "slot_mapping", "sequence_lengths", "block_tables", "cos", "sin")
    pointed = [on_device, *(shared[name] for name in order), y, residual_out, workspace, partials]
    peers: tuple[int, ...] = ()
    if regions is not None:
        kept = partials[tile_bytes(plugin, MOST_CONTEXT) :]
        peers = (kept.data_ptr(), *regions.addresses, regions.rank)
    params = (ctypes.c_uint64 * (len(pointed) + len(peers)))(*(t.data_ptr() for t in pointed), *peers)
    launch = Launch(function, tactic.threads, [params], plugin.shared_bytes(sizes, tactic), GRID)

    def run(step: StepShape) -> None:
        assert step.tokens == step.decode_sequences == 1 and step.max_context <= MOST_CONTEXT
        assert on_device.numel()  # the kernel reads it: it lives as long as the launch
        launch()

    return run


def _layer(w: dict[str, Any]) -> bytes:
    from fp8.plugins.cuda import matrix_map, tensor_map

    key, value = w["key_cache"], w["value_cache"]
    head_dim = key.shape[-1]
    maps = [matrix_map(key.view(-1, head_dim), head_dim, BLOCK_SIZE)]
    maps.append(matrix_map(value.view(-1, 128), 128, head_dim // 2, 0))
    for name in LINEARS:
        weight = w[f"{name}_weight"]
        if weight is not None:  # columns of 128 of K after one another: a stage is one box
            n, k = weight.shape
            maps.append(tensor_map(weight.data_ptr(), "uint8", [128, n, k // 128], [k, 128], [128, 16, 8]))
    packed = b"".join(ctypes.string_at(m.getPtr(), MAP_BYTES) for m in maps).ljust(6 * MAP_BYTES, bytes(1))
    pointers = (0 if w[name] is None else w[name].data_ptr() for name in POINTERS)
    scales = (1.0 if w[name] is None else w[name].item() for name in SCALES)
    return packed + struct.pack(f"<{len(POINTERS)}Q{len(SCALES)}f", *pointers, *scales)
