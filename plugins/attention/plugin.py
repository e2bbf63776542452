"""attention: rotary embedding, KV-cache write, causal attention over a paged cache; decode and prefill rows mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.attention import decode, joined, layout, prefill, rope_kv_write
from fp8.plugins.attention.decode import Decode
from fp8.plugins.attention.prefill import Prefill
from fp8.plugins.base import BLOCK_SIZE, Dim, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor, types_of

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function
    from fp8.plugins.gemm.linear import Linear

E4M3 = "float8_e4m3fn"
DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (64, 128)
INPUTS = (
    "qkv", "position_ids", "slot_mapping", "query_start", "sequence_lengths", "block_tables", "cos", "sin",
    "key_cache", "value_cache", "q_scale", "k_scale", "v_scale", "out_scale",
)  # fmt: skip


@dataclass(frozen=True)
class AttentionTactic(Decode, Prefill):
    """Both parts' fields side by side."""


@dataclass(frozen=True)
class Attention(Plugin):
    """qkv DT [T, (H + 2 KVH) D], position_ids i32 [T], slot_mapping i32 [T] (-1: not written), query_start i32 [B + 1],
    sequence_lengths i32 [B] (context, new tokens included), block_tables i32 [B, MB], cos and sin f32 [P, R/2]?
    (R <= D), key_cache and value_cache [blocks, 64, KVH, D] e4m3 or DT (the kernels' own layout: `layout`), q_scale,
    k_scale and v_scale f32 [1]? (e4m3 cache only), out_scale f32 [1]? (quant_out only)
    -> y (e4m3 | out_dtype) [T, H D].

    Rows: first the sequences with one new token (decode), then prefill chunks, whose tokens are the last of their
    context. A token's slot is the place of its position in the block tables, or -1. Writes the caches in place. Rows of
    a sequence of length 0 and rows of none become zero.
    """

    name: ClassVar[str] = "attention"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    rotary: bool = True
    quant_out: bool = False
    out_dtype: str = "bfloat16"

    cache_shape = staticmethod(layout.cache_shape)
    pack_cache = staticmethod(layout.pack_cache)
    unpack_cache = staticmethod(layout.unpack_cache)

    def cache_places(self) -> list[tuple[int, int]]:
        """The places of the key and the value cache among the inputs."""
        return [(INPUTS.index("key_cache"), INPUTS.index("value_cache"))]

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise PluginError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if self.out_dtype not in DTYPES:
            raise PluginError(f"out_dtype is {self.out_dtype}, expected one of {', '.join(DTYPES)}")
        named = dict(zip(INPUTS, inputs, strict=True))
        tokens = self._check_rows(named)
        self._check_optional(named, ("cos", "sin"), self.rotary, f"rotary={self.rotary}")
        self._check_optional(named, ("out_scale",), self.quant_out, f"quant_out={self.quant_out}")
        self._check_cache(named)
        if self.rotary:
            self._check_rotary(named)
        return (Tensor(E4M3 if self.quant_out else self.out_dtype, (tokens, self.num_heads * self.head_dim)),)

    def _check_rows(self, named: dict[str, Tensor | None]) -> Dim:
        for name in (*INPUTS[:6], "key_cache", "value_cache"):
            if named[name] is None:
                raise PluginError(f"{name} must be given")
        qkv = named["qkv"]
        assert qkv is not None
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if qkv.dtype not in DTYPES or len(qkv.shape) != 2 or qkv.shape[1] != width:
            raise PluginError(
                f"qkv is {qkv.dtype} {list(qkv.shape)}, expected one of {', '.join(DTYPES)} and [T, {width}] "
                f"(({self.num_heads} + 2 * {self.num_kv_heads}) heads of {self.head_dim})"
            )
        for name in INPUTS[1:6]:
            found, rank = named[name], 2 if name == "block_tables" else 1
            assert found is not None
            if found.dtype != "int32" or len(found.shape) != rank:
                raise PluginError(f"{name} is {found.dtype} {list(found.shape)}, expected int32 of {rank} dimensions")
        return qkv.shape[0]

    @staticmethod
    def _check_optional(named: dict[str, Tensor | None], names: Sequence[str], wanted: bool, reason: str) -> None:
        for name in names:
            found = named[name]
            if (found is not None) != wanted:
                verb = "takes" if wanted else "does not take"
                raise PluginError(f"{name} is {'given' if found else 'absent'}, but an op with {reason} {verb} it")
            if found is not None and found.dtype != "float32":
                raise PluginError(f"{name} is {found.dtype}, expected float32")

    def _check_cache(self, named: dict[str, Tensor | None]) -> None:
        qkv, key, value = named["qkv"], named["key_cache"], named["value_cache"]
        assert qkv is not None and key is not None and value is not None
        expected = (BLOCK_SIZE, self.num_kv_heads, self.head_dim)
        for name, cache in (("key_cache", key), ("value_cache", value)):
            if cache.dtype not in (E4M3, qkv.dtype) or cache.dtype != key.dtype:
                raise PluginError(f"{name} is {cache.dtype}, expected {E4M3} or qkv's {qkv.dtype} for both caches")
            if len(cache.shape) != 4 or tuple(cache.shape[1:]) != expected:
                raise PluginError(
                    f"{name} has shape {list(cache.shape)}, expected [blocks, {', '.join(map(str, expected))}]"
                )
        fp8 = key.dtype == E4M3
        self._check_optional(named, ("q_scale", "k_scale", "v_scale"), fp8, f"a {key.dtype} cache")

    def _check_rotary(self, named: dict[str, Tensor | None]) -> None:
        cos, sin = named["cos"], named["sin"]
        assert cos is not None and sin is not None
        half = cos.shape[1] if len(cos.shape) == 2 else None
        if not isinstance(half, int) or cos.shape != sin.shape or not 0 < 2 * half <= self.head_dim:
            raise PluginError(
                f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}, expected [positions, R/2] for both "
                f"with R at most head_dim {self.head_dim}"
            )

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        import torch

        from fp8.plugins.attention.reference import attention

        return (
            attention(
                *inputs,
                step=step,
                num_heads=self.num_heads,
                softmax_scale=self.softmax_scale,
                out_dtype=getattr(torch, self.out_dtype),
            ),
        )

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)
        qkv = inputs[0]
        assert qkv is not None
        if self.head_dim not in HEAD_DIMS:
            raise PluginError(
                f"head_dim is {self.head_dim}, but the kernels take {' or '.join(map(str, HEAD_DIMS))}; "
                "build for --target cpu, or pad the heads"
            )
        if qkv.dtype == "float32":
            raise PluginError("qkv is float32, but the tensor cores take bfloat16 or float16; choose a 16-bit dtype")
        if not self.quant_out and self.out_dtype != qkv.dtype:
            raise PluginError(f"out_dtype is {self.out_dtype}, but the kernels write qkv's {qkv.dtype}; insert a Cast")

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[AttentionTactic]:
        """The favourites of both parts, then each alternative of one part beside the favourite of the other."""
        decodes, prefills = decode.candidates(self, inputs), prefill.candidates(self, inputs)
        pairs = [(d, prefills[0]) for d in decodes] + [(decodes[0], p) for p in prefills[1:]]
        return [AttentionTactic(**asdict(d), **asdict(p)) for d, p in pairs]

    def tactic(self, fields: dict[str, Any]) -> AttentionTactic:
        return AttentionTactic(**fields)

    def kernels(self, tactic: AttentionTactic, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        parts = (*decode.kernels(self, tactic, inputs), *prefill.kernels(self, tactic, inputs))
        return (rope_kv_write.kernel(self, inputs), *parts)

    def workspace(
        self, tactic: AttentionTactic, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int
    ) -> int:
        """The decode part's, the prefill part's, and the queries."""
        return sum(self._regions(tactic, inputs, max_tokens, max_sequences))

    def _regions(
        self, tactic: AttentionTactic, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int
    ) -> tuple[int, int, int]:
        """Bytes of each, in multiples of 1024."""
        sizes = (
            decode.workspace(self, tactic, inputs, max_tokens, max_sequences),
            prefill.workspace(self, tactic, inputs, max_tokens, max_sequences),
            max_tokens * self.num_heads * prefill.row_bytes(self, inputs),
        )
        return tuple(-(-size // 1024) * 1024 for size in sizes)  # type: ignore[return-value]

    def bind(
        self,
        tactic: AttentionTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        write, *rest = self.bind_parts(tactic, functions, tensors, workspace)
        behind = self._both(*rest)

        def run(step: StepShape) -> None:
            if step.tokens > step.decode_sequences:
                write(step)
            behind(step)

        return run

    @staticmethod
    def _both(decode_rows: Launcher, prefill_rows: Launcher) -> Launcher:
        def run(step: StepShape) -> None:
            if step.decode_sequences:
                decode_rows(step)
            if step.sequences > step.decode_sequences:
                prefill_rows(step)

        return run

    def bind_joined(
        self,
        tactic: AttentionTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        linear: Linear,
        choices: Sequence[tuple[Any, Function | None]],
        operands: Sequence[torch.Tensor | None],
    ) -> tuple[list[Launcher | None], Launcher]:
        """The linear in front with the first part in its epilogue, for each of its tactics that has a kernel for that
        (`joined.kernel`), and what is left of this; for steps with prompts, whose rows all belong to sequences.
        operands: the linear's inputs and output."""
        _, *rest = self.bind_parts(tactic, functions, tensors, workspace)
        q, _, tiles = self._scratch(tensors, tactic, workspace)
        fronts = [joined.bind(linear, t, f, operands, q, tensors, tiles) if f else None for t, f in choices]
        return fronts, self._both(*rest)

    def bind_parts(
        self,
        tactic: AttentionTactic,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> tuple[Launcher, Launcher, Launcher]:
        """Rotary embedding, quantization and cache write of what is no decode row; decode rows; prefill rows."""
        q, for_decode, for_prefill = self._scratch(tensors, tactic, workspace)
        prefill_functions = len(prefill.kernels(self, tactic, types_of(tensors[: len(INPUTS)])))
        decode_functions, of_prefill = functions[1:-prefill_functions], functions[-prefill_functions:]
        write = rope_kv_write.bind(self, functions[0], q, tensors, for_prefill)
        decode_rows = decode.bind(self, tactic, decode_functions, tensors, for_decode)
        return write, decode_rows, prefill.bind(self, tactic, of_prefill, q, tensors, for_prefill)

    def _scratch(
        self, tensors: Sequence[torch.Tensor | None], tactic: AttentionTactic, workspace: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The workspace's parts: the queries [max_tokens, H, D] of the cache's dtype, and bytes of the decode part and
        of the prefill part."""
        qkv, lengths, key = tensors[0], tensors[4], tensors[8]
        assert qkv is not None and lengths is not None and key is not None and workspace is not None
        sizes = self._regions(tactic, types_of(tensors[: len(INPUTS)]), len(qkv), len(lengths))
        for_decode, for_prefill, for_q = workspace[: sum(sizes)].split(sizes)
        size = len(qkv) * self.num_heads * self.head_dim * key.element_size()
        return for_q[:size].view(key.dtype).view(len(qkv), self.num_heads, self.head_dim), for_decode, for_prefill
