"""decode_layers: consecutive transformer layers of one decode token in one persistent kernel.

No pattern makes it: where a step has one token, the runtime launches it in place of the plan's steps that it stands for
(`builder/merge.py` says which).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.attention import layout
from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import Kernel, Launcher, Plugin, PluginError, StepShape, Tensor
from fp8.plugins.decode_layers import launch
from fp8.plugins.decode_layers.sizes import GRID, LAYER, MOST_CONTEXT, SHARED, Sizes, of_layer
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.gemm_swiglu.plugin import GemmSwiglu
from fp8.plugins.norm_quant.plugin import NormQuant

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

E4M3 = "float8_e4m3fn"
STAGE_BYTES = 16 * 1024  # 16 rows of weights by 1024 of K, or keys and values of 64 tokens
SHARED_MOST = 227 * 1024
MOST_GROUP = 8  # heads that share a KV head


@dataclass(frozen=True)
class Whole:
    """STAGES of the ring of weights, of which WINDOW are on their way at most; warpgroups that multiply."""

    STAGES: int = 12
    WINDOW: int = 3
    WARPGROUPS: int = 2

    @property
    def threads(self) -> int:
        """The warpgroups', and a warp each that sends for weights and that finishes sums."""
        return 128 * self.WARPGROUPS + 64


@dataclass(frozen=True)
class DecodeLayers(Plugin):
    """The inputs of `SHARED`, then those of `LAYER` for each layer, as the plugins take them that they stand for:
    attention, gemm (o), norm_quant, gemm_swiglu, gemm (down), norm_quant, gemm (qkv of the next layer)
    -> y DT [T, H], what the last layer's down_proj gives, and residual_out DT [T, H], what it is to be added to.

    Exactly one token, of one sequence with a context of at most MOST_CONTEXT. Every scale of activations is static.
    """

    name: ClassVar[str] = "decode_layers"
    grid: ClassVar[int] = GRID
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    layers: int
    epsilon: float = 1e-5
    out_dtype: str = "bfloat16"

    pack_cache = staticmethod(layout.pack_cache)
    unpack_cache = staticmethod(layout.unpack_cache)

    @property
    def attention(self) -> Attention:
        return Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, self.softmax_scale, True, True, self.out_dtype
        )

    @property
    def norm(self) -> NormQuant:
        return NormQuant("rms", self.epsilon, "static", residual=True)

    def cache_places(self) -> list[tuple[int, int]]:
        """The places of every layer's key and value cache among the inputs."""
        first = [len(SHARED) + i * len(LAYER) for i in range(self.layers)]
        return [(i, i + 1) for i in first]

    def _walk(self, inputs: Sequence[Any], run: Any) -> tuple[Any, Any]:
        """The steps that this op stands for, in order: `run(plugin, inputs)` gives each one's outputs."""
        if len(inputs) != len(SHARED) + self.layers * len(LAYER):
            raise PluginError(
                f"{len(inputs)} inputs, expected {len(SHARED)} and {len(LAYER)} for each of {self.layers}"
            )
        qkv, residual, *places = inputs[: len(SHARED)]
        linear, swiglu, norm = Gemm(self.out_dtype), GemmSwiglu(out_dtype=self.out_dtype), self.norm
        for i in range(self.layers):
            w = of_layer(inputs, i)
            caches = [w[name] for name in LAYER[:6]]
            (x,) = run(self.attention, [qkv, *places, *caches])
            (y,) = run(linear, [x, w["o_weight"], w["o_x_scale"], w["o_w_scale"], None])
            x, residual = run(norm, [y, residual, w["norm_weight"], None, w["norm_scale"], None])
            gate_up = [w[f"gate_up_{name}"] for name in ("weight", "x_scale", "w_scale")]
            (x,) = run(swiglu, [x, *gate_up, None, w["swiglu_scale"]])
            (y,) = run(linear, [x, w["down_weight"], w["down_x_scale"], w["down_w_scale"], None])
            if i + 1 == self.layers:
                break
            x, residual = run(norm, [y, residual, w["next_norm_weight"], None, w["next_norm_scale"], None])
            (qkv,) = run(linear, [x, w["qkv_weight"], w["qkv_x_scale"], w["qkv_w_scale"], None])
        return y, residual

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return self._walk(inputs, lambda plugin, given: plugin.infer(given))

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        return self._walk(inputs, lambda plugin, given: plugin.reference(*given, step=step))

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self._walk(inputs, self._checked)
        sizes = [self.sizes(of_layer(inputs, i)) for i in range(self.layers)]
        if len(set(sizes)) > 1:
            raise PluginError("the layers differ in their sizes, expected all alike")
        if self.head_dim != 128:
            raise PluginError(f"head_dim is {self.head_dim}, expected 128")
        if self.num_heads > GRID or self.num_heads // self.num_kv_heads > MOST_GROUP:
            raise PluginError(
                f"{self.num_heads} heads on {self.num_kv_heads} KV heads, expected at most {GRID} heads and "
                f"{MOST_GROUP} on each"
            )
        for name, size in sizes[0]._asdict().items():
            if size % 128:
                raise PluginError(f"the {name} size is {size}, expected a multiple of 128")
        if 2 * sizes[0].mlp < 16 * GRID:
            raise PluginError(f"the mlp size is {sizes[0].mlp}, expected at least {8 * GRID}: 8 for each block")
        stages = self._stages(sizes[0])
        if not stages:
            raise PluginError(f"the mlp size is {sizes[0].mlp}, which leaves no shared memory for a ring of weights")
        tiles = -(-self.num_kv_heads * MOST_CONTEXT // (64 * GRID))
        if tiles > stages:
            raise PluginError(f"{self.num_kv_heads} KV heads give a block {tiles} tiles, expected at most {stages}")

    def _checked(self, plugin: Plugin, inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
        plugin.check(inputs)
        if isinstance(plugin, Attention):
            key, cos = inputs[8], inputs[6]
            if key is None or key.dtype != E4M3:
                raise PluginError(f"the KV cache is {key and key.dtype}, expected {E4M3}")
            if cos is None or cos.shape[1] != self.head_dim // 2:
                raise PluginError("the rotary embedding does not turn whole heads")
        elif not isinstance(plugin, NormQuant):
            x, _, x_scale, w_scale = inputs[:4]
            if x is None or x.dtype != E4M3:
                raise PluginError(f"a linear's x is {x and x.dtype}, expected {E4M3}")
            if x_scale is None or x_scale.shape != (1,) or w_scale is None or len(w_scale.shape) != 1:
                raise PluginError("a linear's scales are not one of x and one for each row of w")
        return plugin.infer(inputs)

    def sizes(self, w: dict[str, Any]) -> Sizes:
        """The sizes of a layer with these inputs."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return Sizes(*w["o_weight"].shape, w["down_weight"].shape[1], qkv)

    @property
    def static_bytes(self) -> int:
        """Bytes of shared memory beside the ring, at most: attention's operands and scores, barriers."""
        return 3072 + 3584 * (self.num_heads // self.num_kv_heads)

    def shared_bytes(self, sizes: Sizes, tactic: Whole) -> int:
        """Ring, x, partial sums."""
        steps = -(-max(sizes.hidden, sizes.attention, sizes.mlp) // 1024)
        return tactic.STAGES * STAGE_BYTES + steps * 1024 + 128 + 2 * 4 * tactic.WARPGROUPS * 16 * 4

    def _stages(self, sizes: Sizes) -> int:
        """The deepest ring that fits; 0: none."""
        return next(
            (n for n in range(13, 3, -1) if self.shared_bytes(sizes, Whole(n)) <= SHARED_MOST - self.static_bytes), 0
        )

    def windows(self, sizes: Sizes) -> tuple[int, ...]:
        """WINDOWs to choose from, the fastest first."""
        return 3, 4

    def workspace(self, tactic: Whole, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int) -> int:
        """`Exchange` and the tiles' results."""
        return launch.exchange_bytes(self.sizes(of_layer(inputs, 0))) + launch.tile_bytes(self, MOST_CONTEXT)

    def bind(
        self,
        tactic: Whole,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        assert workspace is not None
        return launch.bind(self, tactic, functions[0], tensors, workspace)

    def buckets(self, max_tokens: int) -> list[int]:
        return [1]

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Whole]:
        self.check(inputs)
        sizes = self.sizes(of_layer(inputs, 0))
        stages = self._stages(sizes)
        return [Whole(stages, min(stages, window)) for window in self.windows(sizes)]

    def tactic(self, fields: dict[str, Any]) -> Whole:
        return Whole(**fields)

    def kernels(self, tactic: Whole, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        sizes = self.sizes(of_layer(inputs, 0))
        constants = (
            ("HIDDEN", sizes.hidden),
            ("MLP", sizes.mlp),
            ("HEAD_DIM", self.head_dim),
            ("KV_HEADS", self.num_kv_heads),
            ("GROUP", self.num_heads // self.num_kv_heads),
            ("FP8_CACHE", 1),
            ("DTYPE", ("bfloat16", "float16").index(self.out_dtype)),
            ("ROTARY_DIM", self.head_dim),
            ("SOFTMAX_SCALE", self.softmax_scale),
            ("EPSILON", self.epsilon),
            ("LAYERS", self.layers),
            ("GRID", GRID),
            ("STAGES", tactic.STAGES),
            ("WINDOW", tactic.WINDOW),
            ("WARPGROUPS", tactic.WARPGROUPS),
        )
        return (Kernel("decode_layers", "decode_layers.cu", "decode_layers", constants),)
