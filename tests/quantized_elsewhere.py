"""Tiny Llamas as other tools quantize them to FP8: by the tool itself, where it is a library here, else by the names,
shapes and types that it publishes, with torch's own casts. And what they compute, in plain torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_llama
import torch
import transformers
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file

from fp8.builder.verify import Exact, float64_by_default
from fp8.models.rope import Rope

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
E4M3 = torch.float8_e4m3fn
STATIC = 0.011  # scale of activations of unit variance
Tensors = dict[str, torch.Tensor]

# What each configuration says, and by which names, shapes and types its scales are stored
CONFIGS: dict[str, dict[str, Any]] = {
    "autofp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "mistral": {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
        "modules_to_not_convert": ["lm_head"],
    },
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "finegrained": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
    },
    "modelopt": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
    "modelopt_rowwise": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]},
    "modelopt_block": {"quant_algo": "fp8_pb_wo", "exclude_modules": ["lm_head"]},
}  # fmt: skip
WEIGHT_SCALE = {"mistral": "weight_scale_inv", "finegrained": "weight_scale_inv"}
INPUT_SCALE = {"autofp8": "input_scale", "mistral": "activation_scale", "modelopt": "input_scale"}
KV_SCALES = {"modelopt": ("k_proj.k_scale", "v_proj.v_scale")}
FORMAT = {
    "autofp8": "fp8", "mistral": "fp8", "fbgemm": "fp8_rowwise", "finegrained": "fp8_block", "modelopt": "fp8",
    "modelopt_rowwise": "fp8_rowwise", "modelopt_block": "fp8_block",
}  # fmt: skip
PRESETS = {"FP8": "fp8", "FP8_CHANNEL": "fp8_channel", "FP8_DYNAMIC": "fp8_rowwise", "FP8_BLOCK": "fp8_block"}


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}


def compressed(weights: str, activations: Any, **more: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors, with weights of that strategy."""
    group = {"targets": ["Linear"], "weights": {**FLOAT8, "strategy": weights}, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


def blocks_amax(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    return weight.abs().reshape(n // 128, 128, k // 128, 128).amax((1, 3))


def spread(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A stored scale of any of the layouts for every element of the weight."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand_as(like)
    if scale.numel() == like.shape[0]:
        return scale.reshape(-1, 1).expand_as(like)
    blocks = scale.reshape(like.shape[0] // 128, like.shape[1] // 128)
    return blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)


def weight_scale(tool: str, weight: torch.Tensor) -> torch.Tensor:
    """amax / 448 in float32, shaped as the tool stores it."""
    n, k = weight.shape
    if FORMAT[tool] == "fp8":
        return weight.abs().amax() / 448
    if FORMAT[tool] == "fp8_rowwise":
        return weight.abs().amax(1, keepdim=tool == "fbgemm") / 448
    scale = blocks_amax(weight) / 448
    return scale.reshape(n // 128, 1, k // 128, 1) if tool == "modelopt_block" else scale


def write(
    directory: Path,
    tool: str,
    kv: bool = False,
    plain: Callable[[str], bool] = lambda module: False,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Path:
    """Writes the checkpoint of a random model; `plain` are the linears that it leaves in bfloat16."""
    hf_llama.make(directory, dtype, **{**SIZES, **changes})
    tensors: Tensors = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if "_proj" not in name or kind != "weight" or plain(module):
            tensors[name] = weight
            continue
        scale = weight_scale(tool, weight.float())
        tensors[name] = (weight.float() / spread(scale, weight)).clamp(-448, 448).to(E4M3)
        tensors[f"{module}.{WEIGHT_SCALE.get(tool, 'weight_scale')}"] = scale
        if tool in INPUT_SCALE:
            tensors[f"{module}.{INPUT_SCALE[tool]}"] = torch.tensor(STATIC)
        if kv and kind == "weight" and module.endswith("k_proj"):
            for part, value in zip(
                KV_SCALES.get(tool.partition("_")[0], ("k_scale", "v_scale")), (0.013, 0.017), strict=True
            ):
                tensors[f"{module.removesuffix('.k_proj')}.{part}"] = torch.tensor(value)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    write_config(directory, tool, kv)
    return directory


def write_config(directory: Path, tool: str, kv: bool) -> None:
    quantization = dict(CONFIGS[tool])
    if tool.startswith("modelopt"):
        quantization["kv_cache_quant_algo"] = "FP8" if kv else None
        found = {"producer": {"name": "modelopt", "version": "0.33.1"}, "quantization": quantization}
        (directory / "hf_quant_config.json").write_text(json.dumps(found))
        quantization = {"quant_library": "modelopt", **quantization}
    elif kv:
        quantization["kv_cache_scheme"] = "static"
    edit_config(directory, quantization_config=quantization)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def by_compressed_tensors(
    directory: Path, preset: str, kv: bool = False, ignore: tuple[str, ...] = ("lm_head",), **changes: Any
) -> Path:
    """Quantized and written by the library compressed-tensors, which llm-compressor uses."""
    hf_llama.make(directory, torch.bfloat16, **{**SIZES, **changes})
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    shutil.rmtree(directory)
    scheme = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    channel = scheme.model_copy(update={"strategy": "channel"})
    group = (
        QuantizationScheme(targets=["Linear"], weights=channel, input_activations=scheme)
        if preset == "FP8_CHANNEL"
        else preset_name_to_scheme(preset, ["Linear"])
    )
    config = QuantizationConfig(
        config_groups={"group_0": group},
        ignore=list(ignore),
        kv_cache_scheme=scheme if kv else None,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight, scale = module.weight.float(), module.weight_scale
            blocks = preset == "FP8_BLOCK"
            amax = blocks_amax(weight) if blocks else weight.abs().amax(1, keepdim=True)
            amax = amax if scale.numel() > 1 or blocks else weight.abs().amax().reshape(1)
            scale.data = (amax / 448).to(scale.dtype)
        for name, value in (("input_scale", STATIC), ("k_scale", 0.013), ("v_scale", 0.017)):
            if hasattr(module, name):
                getattr(module, name).data.fill_(value)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return directory


def exact_logits(model: Any, sequence: list[int]) -> torch.Tensor:
    """In float64 but for E4M3, so that no code depends on the order of a sum, nor on the last bit of a cosine: RoPE's
    tables are ours (tests/test_models.py holds them against transformers')."""
    tables = Rope(10000.0, SIZES["head_dim"]).tables(len(sequence))
    cos, sin = (torch.from_numpy(t).double().repeat(1, 2)[None] for t in tables)
    model.double().model.rotary_emb.forward = lambda x, position_ids: (cos, sin)
    with float64_by_default(), Exact():
        return hf_llama.logits(model, [sequence])


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """To E4M3 and back, saturating."""
    return (x / scale).clamp(-448, 448).to(E4M3).to(x.dtype) * scale


def quantize_input(x: torch.Tensor, format: str, bound: float) -> torch.Tensor:
    """What a linear of that format reads, of [..., K]."""
    if format == "fp8":
        return rounded(x, torch.tensor(STATIC))
    if format == "fp8_rowwise":
        amax = x.abs().amax(-1, keepdim=True).clamp(max=bound)
        return rounded(x, (amax / 448).clamp(min=1 / (448 * 512)))
    groups = x.unflatten(-1, (-1, 128))
    return rounded(groups, (groups.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))).flatten(-2)


def twin(directory: Path, tool: str) -> Any:
    """The checkpoint in transformers' model, in float64: weights dequantized, inputs of quantized linears rounded."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).eval().double()
    stored = load_file(directory / "model.safetensors")
    suffix = WEIGHT_SCALE.get(tool, "weight_scale")
    weights = {n: t for n, t in stored.items() if n.endswith((".weight", ".bias"))}
    for name, weight in list(weights.items()):
        weights[name] = weight.double()
        if weight.dtype == E4M3:
            module = name.removesuffix(".weight")
            weights[name] = weight.double() * spread(stored[f"{module}.{suffix}"].double(), weight)
            bound = CONFIGS[tool].get("activation_scale_ub", torch.inf)
            hook = lambda m, x, bound=bound: (quantize_input(x[0], FORMAT[tool], bound),)
            model.get_submodule(module).register_forward_pre_hook(hook)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def edit(directory: Path, name: str, value: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    assert name in tensors or value is not None
    tensors = {n: t for n, t in tensors.items() if n != name} | ({} if value is None else {name: value})
    save_file(tensors, path, {"format": "pt"})
