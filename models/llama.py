"""Llama 1 to 3.x: MHA, GQA and MQA, biases, tied embeddings, linear, llama3 and YaRN RoPE scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from fp8.builder.graph import F32, I32, Checkpoint, Format, Graph, GraphBuilder, Linear
from fp8.models import blocks
from fp8.models.config import ConfigError, flag, integer, number, refuse
from fp8.models.rope import Rope, read_rope

# Keys that some Llama descendant gives another value, with the values under which the result is Llama's.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (None, 0, 1),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k and v
    output_bias: bool  # of o
    mlp_bias: bool
    rope: Rope

    @property
    def attention(self) -> blocks.Attention:
        return blocks.Attention(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.attention_bias, self.output_bias
        )


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Reads config.json. Raises ConfigError, by key, for what is malformed or not supported."""
    refuse(config, SUPPORTED)
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ConfigError("config.json: layer_types other than full_attention are not supported")
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = integer(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embedding rotates pairs")
    positions = integer(config, "max_position_embeddings", 2048)
    return LlamaConfig(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        attention_bias=flag(config, "attention_bias"),
        output_bias=flag(config, "attention_bias"),
        mlp_bias=flag(config, "mlp_bias"),
        rope=read_rope(config, head_dim, positions),
    )


def emit(
    config: LlamaConfig,
    checkpoint: Checkpoint,
    format: Format,
    dtype: str,
    layers: range | None = None,
    max_positions: int | None = None,
) -> Graph:
    """The graph of some consecutive layers, by default of all; positions up to `max_positions` (default: the model's).

    A slice that does not begin at layer 0 reads `hidden_states` (DT [T, H]) in place of `input_ids`; one that does not
    end at the last layer has the output `hidden_states.out` in place of `logits` (f32 [L, V]).
    """
    layers = range(config.num_layers) if layers is None else layers
    positions = config.max_position_embeddings if max_positions is None else max_positions
    if positions > config.max_position_embeddings:
        raise ConfigError(
            f"{positions} positions exceed the model's max_position_embeddings {config.max_position_embeddings}"
        )
    b = GraphBuilder("llama", checkpoint, format, dtype)
    table = "model.embed_tokens"
    if layers.start == 0:
        weight = b.weight(f"{table}.weight", (config.vocab_size, config.hidden_size), ("vocab", "embed"))
        x: gs.Tensor = b.gather(weight, b.input("input_ids", I32, ["T"]), f"{table}/gather")
    else:
        x = b.input("hidden_states", b.dtype, ["T", config.hidden_size])
    step = blocks.step_inputs(b, *config.rope.tables(positions))
    for layer in layers:
        x = _layer(b, x, config, step, layer)
    if layers.stop == config.num_layers:
        _head(b, x, config)
    else:
        b.output(x, "hidden_states.out")
    return b.graph


def _layer(b: GraphBuilder, x: gs.Tensor, c: LlamaConfig, step: blocks.Step, layer: int) -> gs.Tensor:
    name = f"model.layers.{layer}"
    n = blocks.rms_norm(b, x, f"{name}.input_layernorm", c.hidden_size, c.rms_norm_eps)
    y = blocks.attention(b, n, c.attention, step, f"{name}.self_attn", layer)
    x = b.same("Add", f"{name}/attention_residual", x, y)
    n = blocks.rms_norm(b, x, f"{name}.post_attention_layernorm", c.hidden_size, c.rms_norm_eps)
    y = blocks.swiglu_mlp(b, n, c.hidden_size, c.intermediate_size, c.mlp_bias, f"{name}.mlp")
    return b.same("Add", f"{name}/mlp_residual", x, y)


def _head(b: GraphBuilder, x: gs.Tensor, c: LlamaConfig) -> None:
    """Norm and logits of the wanted rows only; never quantized."""
    rows = b.gather(x, b.input("logits_indices", I32, ["L"]), "model.norm/rows")
    n = blocks.rms_norm(b, rows, "model.norm", c.hidden_size, c.rms_norm_eps)
    head = Linear("lm_head", c.vocab_size, c.hidden_size, ("vocab", "embed"))
    tied = "model.embed_tokens.weight" if c.tie_word_embeddings else None
    b.output(b.plain_linear(n, head, F32, weight=tied), "logits")
