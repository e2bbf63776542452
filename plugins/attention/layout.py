"""The paged KV cache: the layout of the references and the CUDA kernels' own, and the way between the two.

Reference: key and value [num_blocks, 64, KVH, D], in e4m3 or the model's dtype. A slot is block * 64 + offset.
CUDA, 16 bits: key and value [num_blocks, KVH, 64, D].
CUDA, e4m3: key [num_blocks, KVH, 64, D]; value [num_blocks, KVH, 4 * D, 16]: of 16 tokens after the other, transposed,
because 8-bit wgmma wants both operands contiguous along the summed dimension, and those tokens permuted: position p of
each group of 32 holds token `PERMUTATION[p]`. So an accumulator fragment of Q K^T, packed to e4m3, is an operand
fragment of P V without a shuffle. A new token's value is one byte of each of D rows, which lie in 2 KB here, and would
in 8 if rows were of all 64 tokens: every line that such a byte makes dirty costs the memory more than what is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8.plugins.base import BLOCK_SIZE

if TYPE_CHECKING:
    import torch

GROUP = 16  # tokens that lie together
# Thread c of a quad holds columns 8j + 2c, 8j + 2c + 1 of an accumulator and feeds positions 4c .. 4c + 3 (+ 16).
PERMUTATION = tuple(
    half + 8 * (i // 2) + 2 * c + i % 2 for half in (0, 16) for c in range(4) for i in range(4)
)  # position -> token


def cache_shape(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Shapes of the key and the value pool in the CUDA layout."""
    key = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    if dtype == "float8_e4m3fn":
        return key, (num_blocks, num_kv_heads, BLOCK_SIZE // GROUP * head_dim, GROUP)
    return key, key


def pack_cache(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference layout -> CUDA layout (new tensors)."""
    import torch

    packed_key = _bytes(key).permute(0, 2, 1, 3).contiguous()
    packed_value = _bytes(value).permute(0, 2, 1, 3)
    if value.dtype == torch.float8_e4m3fn:
        groups = packed_value[:, :, _token_of_position(value.device)].unflatten(2, (-1, GROUP))
        packed_value = groups.transpose(3, 4).flatten(2, 3)
    return packed_key.view(key.dtype), packed_value.contiguous().view(value.dtype)


def unpack_cache(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA layout -> reference layout (new tensors)."""
    import torch

    unpacked_value = _bytes(value)
    if value.dtype == torch.float8_e4m3fn:
        position_of_token = _token_of_position(value.device).argsort()
        groups = unpacked_value.unflatten(2, (BLOCK_SIZE // GROUP, -1)).transpose(3, 4)
        unpacked_value = groups.flatten(2, 3)[:, :, position_of_token]
    unpacked_key = _bytes(key).permute(0, 2, 1, 3).contiguous()
    return unpacked_key.view(key.dtype), unpacked_value.permute(0, 2, 1, 3).contiguous().view(value.dtype)


def _token_of_position(device: torch.device) -> torch.Tensor:
    import torch

    groups = range(0, BLOCK_SIZE, 32)
    return torch.tensor([group + token for group in groups for token in PERMUTATION], device=device)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """Integers of the same width: torch moves them everywhere, float8 not."""
    import torch

    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()])
