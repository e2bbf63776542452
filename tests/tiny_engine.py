"""A tiny Llama-like engine for target cpu, written by hand: two layers with random weights, no builder involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fp8.builder import engine as engine_format
from fp8.builder.engine import Buffer, Compatibility, Limits, ModelInfo, Plan, Step

VOCAB, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 97, 48, 80, 4, 2, 16, 2
E4M3 = "float8_e4m3fn"
WIDTH = HEADS * HEAD_DIM
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def write(
    directory: Path,
    kv_dtype: str = "float32",
    limits: Limits = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96),  # noqa: B008 (frozen)
    target: str = "cpu",
) -> Path:
    """Writes the engine and returns its directory. Linears are float32, so that batching changes next to nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = _weights(limits.max_seq_len)
    save_file(weights, directory / "rank0.safetensors")
    digest = engine_format.file_digest(directory / "rank0.safetensors")
    plan = _plan(weights, kv_dtype, limits, target, digest)
    (directory / "rank0.engine").write_bytes(engine_format.engine_bytes(plan, {}))
    return directory


def twin() -> Any:
    """The same model in transformers, in float32: the oracle of whole texts."""
    import transformers

    weights = _weights(256)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=256, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    for name in [n for n in weights if "qkv_proj" in n or "gate_up_proj" in n]:
        kv = KV_HEADS * HEAD_DIM
        parts = {"q": WIDTH, "k": kv, "v": kv} if "qkv" in name else {"gate": MLP, "up": MLP}
        for part, weight in zip(parts, weights.pop(name).split(list(parts.values())), strict=True):
            weights[f"{name.rsplit('.', 2)[0]}.{part}_proj.weight"] = weight
    model = transformers.LlamaForCausalLM(config).eval()
    kept = {n: w for n, w in weights.items() if n.endswith(".weight")}
    model.load_state_dict(kept, strict=True)
    return model


def _weights(max_seq_len: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * shape[-1] ** -0.5

    angles = torch.arange(max_seq_len)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    weights = {"rotary.cos": angles.cos(), "rotary.sin": angles.sin(), "model.norm.weight": torch.ones(HIDDEN)}
    weights |= {"model.embed_tokens.weight": 3 * random(VOCAB, HIDDEN), "lm_head.weight": 8 * random(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.qkv_proj.weight": 3 * random(QKV, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": 2 * random(HIDDEN, WIDTH),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.mlp.gate_up_proj.weight": 2 * random(2 * MLP, HIDDEN),
            f"{layer}.mlp.down_proj.weight": 2 * random(HIDDEN, MLP),
            **{f"{layer}.self_attn.{n}_scale": torch.tensor([0.02]) for n in "qkv"},
        }
    return weights


def _plan(weights: dict[str, torch.Tensor], kv_dtype: str, limits: Limits, target: str, digest: str) -> Plan:
    buffers = [Buffer(n, "float32", tuple(w.shape), "weight") for n, w in weights.items()]
    for name, shape in {
        "input_ids": ("T",), "position_ids": ("T",), "slot_mapping": ("T",), "query_start": ("B+1",),
        "sequence_lengths": ("B",), "block_tables": ("B", -(-limits.max_seq_len // 64)), "logits_indices": ("L",),
    }.items():  # fmt: skip
        buffers.append(Buffer(name, "int32", shape, "input"))
    steps: list[Step] = []

    def step(plugin: str, inputs: list[str], outputs: dict[str, tuple], **attributes: object) -> list[str]:
        kind = "output" if "logits" in outputs else "activation"
        buffers.extend(Buffer(n, "float32", s, kind) for n, s in outputs.items())
        steps.append(Step("/".join(outputs), plugin, attributes, tuple(inputs), tuple(outputs)))
        return list(outputs)

    def linear(x: str, module: str) -> str:
        w = f"{module}.weight"
        return step("gemm", [x, w, "", "", ""], {module: ("T", weights[w].shape[0])}, out_dtype="float32")[0]

    def norm(x: str, residual: str, name: str) -> tuple[str, str]:
        inputs = [x, residual, f"{name}.weight", "", "", ""]
        outputs = {name: ("T", HIDDEN)} | ({f"{name}/residual": ("T", HIDDEN)} if residual else {})
        out = step("norm_quant", inputs, outputs, residual=bool(residual))
        return out[0], out[-1] if residual else x

    x, residual = step("embedding", ["input_ids", "model.embed_tokens.weight"], {"x": ("T", HIDDEN)})[0], ""
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for side in ("key", "value"):
            buffers.append(Buffer(f"kv_cache.{i}.{side}", kv_dtype, ("blocks", 64, KV_HEADS, HEAD_DIM), "kv_cache"))
        n, residual = norm(x, residual, f"{layer}.input_layernorm")
        qkv = linear(n, f"{layer}.self_attn.qkv_proj")
        scales = [f"{layer}.self_attn.{s}_scale" if kv_dtype == E4M3 else "" for s in "qkv"]
        inputs = [
            qkv, "position_ids", "slot_mapping", "query_start", "sequence_lengths", "block_tables", "rotary.cos",
            "rotary.sin", f"kv_cache.{i}.key", f"kv_cache.{i}.value", *scales, "",
        ]  # fmt: skip
        (y,) = step(
            "attention", inputs, {f"{layer}.self_attn": ("T", WIDTH)}, num_heads=HEADS, num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM, softmax_scale=HEAD_DIM**-0.5, out_dtype="float32",
        )  # fmt: skip
        n, residual = norm(linear(y, f"{layer}.self_attn.o_proj"), residual, f"{layer}.post_attention_layernorm")
        h = step("act_quant", [linear(n, f"{layer}.mlp.gate_up_proj"), ""], {f"{layer}.mlp.act": ("T", MLP)})[0]
        x = linear(h, f"{layer}.mlp.down_proj")
    last = ["model.norm.weight", "", "", "logits_indices"]
    (n,) = step("norm_quant", [x, residual, *last], {"model.norm": ("L", HIDDEN)}, residual=True, gather=True)
    step("gemm", [n, "lm_head.weight", "", "", ""], {"logits": ("L", VOCAB)}, out_dtype="float32", rows="L")
    model = ModelInfo(
        "llama", "float32", "bf16", VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, limits.max_seq_len, kv_dtype
    )  # fmt: skip
    compatibility = Compatibility(engine_format.FORMAT_VERSION, "0.1.0", target)
    return Plan(compatibility, model, limits, tuple(buffers), tuple(steps), 0, 0, digest)
