"""Cases of decode_layers: few layers, of shapes with and without grouped heads, short contexts and long ones."""

from __future__ import annotations

import torch

from fp8.plugins.attention.decode_cases import block_tables, cache, slot
from fp8.plugins.base import Case, StepShape
from fp8.plugins.decode_layers.plugin import DecodeLayers
from fp8.plugins.decode_layers.sizes import NEXT

E4M3 = torch.float8_e4m3fn
HEAD_DIM = 128
WHY = (
    "a code of an e4m3 activation that falls on the other side of a rounding boundary is off by 2^-3 of itself, and "
    "each linear spreads it over all of the next one's"
)


def case(
    heads: int, kv_heads: int, hidden: int, mlp: int, length: int, layers: int = 2, dtype: torch.dtype = torch.bfloat16
) -> Case:
    name = str(dtype).removeprefix("torch.")
    plugin = DecodeLayers(heads, kv_heads, HEAD_DIM, HEAD_DIM**-0.5, layers, out_dtype=name)
    qkv, width = (heads + 2 * kv_heads) * HEAD_DIM, heads * HEAD_DIM

    def make(generator: torch.Generator, device: str) -> list[torch.Tensor | None]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def linear(n: int, k: int, x_scale: float) -> list[torch.Tensor | None]:
            return [(16 * normal(n, k)).to(E4M3), scalar(x_scale), (1 + 0.2 * normal(n)).abs() / (16 * k**0.5)]

        def scalar(value: float) -> torch.Tensor:
            return torch.tensor([value], device=device)

        def int32(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def norm() -> list[torch.Tensor | None]:
            return [(1 + 0.2 * normal(hidden)).to(dtype), scalar(0.02)]

        def layer(last: bool) -> list[torch.Tensor | None]:
            caches = [cache(normal, blocks, kv_heads, HEAD_DIM, True, dtype) for _ in range(2)]
            mixer = [*caches, scalar(0.02), scalar(0.025), scalar(0.03), scalar(0.004), *linear(hidden, width, 0.004)]
            gate_up = linear(2 * mlp, hidden, 0.02)
            down = [scalar(0.01), *linear(hidden, mlp, 0.01)]
            following = [None] * NEXT if last else [*norm(), *linear(qkv, hidden, 0.02)]
            return [*mixer, *norm(), *gate_up, *down, *following]

        tables, blocks = block_tables([length])
        angles = torch.arange(length, device=device)[:, None] * 10000.0 ** -torch.linspace(
            0, 1, HEAD_DIM // 2, device=device
        )
        shared = [
            (2 * normal(1, qkv)).to(dtype), normal(1, hidden).to(dtype), int32([length - 1]),
            int32([slot(tables[0], length - 1)]), int32([0, 1]), int32([length]), int32(tables),
            angles.cos(), angles.sin(),
        ]  # fmt: skip
        every = [tensor for i in range(layers) for tensor in layer(i + 1 == layers)]
        return [*shared, *every]

    weights = layers * (hidden * width + 3 * hidden * mlp) + (layers - 1) * hidden * qkv
    return Case(
        f"{layers} layers of {hidden} and {mlp}, {heads}/{kv_heads} heads, 1 x {length}, {name}",
        plugin,
        make,
        StepShape(1, 1, 1, 0, length, 1),
        0.06 if layers == 1 else 0.09,
        WHY,
        weights + 2 * layers * length * kv_heads * HEAD_DIM,
        2 * weights,
    )


CASES = [
    case(2, 2, 256, 1152, 70, layers=1),
    case(8, 2, 1024, 1152, 1, layers=1),
    case(8, 1, 384, 1280, 333, dtype=torch.float16),
    case(32, 32, 4096, 11008, 1088),
    case(32, 32, 4096, 11008, 2048),
    case(32, 8, 4096, 14336, 1088),
    case(40, 40, 5120, 13824, 64),
    case(64, 8, 8192, 28672, 700, layers=1),
]
