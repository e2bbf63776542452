"""Quantization formats: weights, scales, exclusion, and what config.json says of them."""

from __future__ import annotations

from typing import Any

import hf_llama
import pytest
import tiny_checkpoint
import torch
from compressed_tensors.quantization import QuantizationConfig

from fp8.builder.e4m3 import quantize, scale_of
from fp8.builder.formats.base import Format, FormatError, load, names
from fp8.builder.formats.fp8 import Fp8
from fp8.builder.formats.fp8_rowwise import SCALE_FLOOR, Fp8Rowwise
from fp8.builder.graph import GraphBuilder
from fp8.builder.interpret import Interpreter
from fp8.builder.quantization_config import read_dtype, read_format, write_engine_section, write_quantization

LINEARS = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]

STATIC = ("fp8", "fp8_channel")  # scales of activations


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def config_of(format: Format) -> dict[str, Any]:
    config: dict[str, Any] = {"dtype": format.dtype or "bfloat16"}
    quantization = write_quantization(format, LINEARS)
    if quantization is not None:
        config["quantization_config"] = quantization
    return {**config, "fp8_engine": write_engine_section(format, "0", None)}


def test_formats_are_the_files_of_the_folder() -> None:
    assert names() == ["bf16", "fp16", "fp8", "fp8_block", "fp8_channel", "fp8_rowwise"]
    assert [load(n).name for n in names()] == names()


def test_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match="qformat 'int3' does not exist; there are bf16, fp16, fp8"):
        load("int3")
    with pytest.raises(FormatError, match="kv_cache_dtype 'int8' is not one of auto, fp8"):
        Fp8(kv_cache_dtype="int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", [Fp8(), Fp8Rowwise()])
def test_dequantized_weight_is_within_half_a_step(format: Format, dtype: torch.dtype) -> None:
    weight = random(24, 48).to(dtype)
    stored = format.quantize(weight)
    codes, scale = stored["weight"], stored["weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale.shape == ((1,) if format.name == "fp8" else (24, 1))
    amax = weight.float().abs().amax(*(() if format.name == "fp8" else (1, True)))
    assert torch.equal(scale, (amax / 448).reshape(scale.shape))
    # 3 mantissa bits: half a step is 2^-4 relative; below 2^-6 codes are spaced 2^-9.
    error = (codes.float() * scale - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs() * 2**-4, scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("format", [Fp8(), Fp8Rowwise()])
def test_zero_weights_have_a_usable_scale(format: Format) -> None:
    weight = random(4, 16)
    weight[1] = 0
    for w in (weight, torch.zeros(4, 16), torch.full((4, 16), 1e-42)):
        stored = format.quantize(w)
        scale = stored["weight_scale"]
        assert torch.isfinite(scale).all() and (scale > 0).all()
        torch.testing.assert_close(stored["weight"].float() * scale, w, atol=0.2, rtol=0)


def test_e4m3_saturates() -> None:
    x = torch.tensor([449.0, 1e30, -1e30, float("inf"), 448.0, 0.0])
    assert quantize(x, torch.tensor(1.0)).float().tolist() == [448, 448, -448, 448, 448, 0]
    assert torch.isnan(quantize(torch.tensor([float("nan")]), torch.tensor(1.0)).float()).all()


def test_scale_of_amax() -> None:
    assert scale_of(torch.tensor([448.0, 0.0])).tolist() == [1.0, (torch.tensor(1 / 512) / 448).item()]


def builder(format: Format, tmp_path: Any) -> GraphBuilder:
    from fp8.builder.checkpoint import Checkpoint

    return GraphBuilder("test", Checkpoint(tiny_checkpoint.write(tmp_path, format)), format, "bfloat16")


@pytest.mark.parametrize("ub", [1200.0, None])
def test_rowwise_token_scale_is_fbgemms(ub: float | None, tmp_path: Any) -> None:
    format = Fp8Rowwise(activation_scale_ub=ub)
    b = builder(format, tmp_path)
    x = b.input("x", torch.zeros(1).numpy().dtype, ["T", 32])
    b.output(format.token_scale(b, x, "m"), "scale")
    rows = torch.stack([random(32), random(32) * 1e4, torch.zeros(32), torch.full((32,), 1e-9)])
    amax = rows.abs().amax(1)
    expected = torch.clamp(amax.clamp(max=ub or torch.inf) / 448.0, min=1.0 / (448.0 * 512.0))
    assert torch.equal(Interpreter(b.graph)({"x": rows})["scale"], expected)
    assert expected[2] == torch.tensor(SCALE_FLOOR)


def test_bad_activation_bound_is_refused() -> None:
    for ub in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FormatError, match="activation_scale_ub"):
            Fp8Rowwise(activation_scale_ub=ub)


def test_globs_and_regular_expressions_exclude() -> None:
    format = Fp8(exclude_modules=("model.layers.0.*", "re:.*up_proj"))
    assert [m for m in LINEARS if format.quantizes(m)] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert not format.calibrated("model.layers.1.mlp.up_proj.input_scale")
    assert format.calibrated("model.layers.1.mlp.down_proj.input_scale")


def test_what_each_format_has_calibrated() -> None:
    scales = ("model.layers.0.mlp.up_proj.input_scale", "model.layers.0.self_attn.k_scale")
    found = {(n, kv): [load(n)(kv).calibrated(s) for s in scales] for n in names() for kv in ("auto", "fp8")}
    for (name, kv), (inputs, cache) in found.items():
        assert inputs == (name in STATIC) and cache == (kv == "fp8"), (name, kv)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("name", names())
def test_config_is_read_back_as_the_same_format(name: str, kv: str) -> None:
    format = load(name)(kv_cache_dtype=kv)
    assert read_format(config_of(format)) == format
    if load(name).scheme is not None:
        excluding = load(name)(kv_cache_dtype=kv, exclude_modules=("*.down_proj",))
        read = read_format(config_of(excluding))
        assert [read.quantizes(m) for m in LINEARS] == [excluding.quantizes(m) for m in LINEARS]


def test_activation_bound_is_read_back() -> None:
    assert read_format(config_of(Fp8Rowwise(activation_scale_ub=7.0))) == Fp8Rowwise(activation_scale_ub=7.0)
    foreign = config_of(Fp8Rowwise())
    del foreign["fp8_engine"]
    assert read_format(foreign) == Fp8Rowwise(activation_scale_ub=None)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("name", ["fp8", "fp8_channel", "fp8_rowwise", "fp8_block"])
def test_compressed_tensors_reads_the_config(name: str, kv: str) -> None:
    written = write_quantization(load(name)(kv_cache_dtype=kv), LINEARS)
    config = QuantizationConfig.model_validate(written)
    group = config.config_groups["group_0"]
    weights, activations = {
        "fp8": ("tensor", "tensor"),
        "fp8_rowwise": ("channel", "token"),
        "fp8_channel": ("channel", "tensor"),
        "fp8_block": ("block", "group"),
    }[name]
    assert group.weights.num_bits == 8 and group.weights.strategy == weights
    assert group.input_activations.strategy == activations and group.input_activations.dynamic is (name not in STATIC)
    assert (config.kv_cache_scheme is not None) == (kv == "fp8")


def test_unquantized_checkpoint_is_bf16_or_fp16_by_its_dtype() -> None:
    assert read_format({"torch_dtype": "float16"}).name == "fp16"
    assert read_format({"dtype": "bfloat16"}).name == read_format({}).name == "bf16"
    assert read_dtype({"dtype": "torch.float16"}) == "float16"


INT8 = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "gptq"}, "quant_method 'gptq' is not read"),
    "scheme": ({"quant_method": "compressed-tensors", "config_groups": {"g": INT8}}, "int 8 channel"),
    "no object": ("compressed-tensors", "quantization_config is 'compressed-tensors', expected an object"),
    "groups that are none": ({"quant_method": "compressed-tensors", "config_groups": 3}, "config_groups is 3"),
    "a group that is none": ({"quant_method": "compressed-tensors", "config_groups": {"g": "x"}}, "g is 'x'"),
    "weights that are none": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": 8}}},
        "weights is 8",
    ),
    "no list": ({"quant_method": "compressed-tensors", "ignore": "lm_head"}, "ignore is 'lm_head'"),
    "no scheme": ({"quant_method": "compressed-tensors", "kv_cache_scheme": "fp8"}, "kv_cache_scheme fp8 is not read"),
    "no pattern": ({"quant_method": "compressed-tensors", "ignore": ["re:(["]}, "is no regular expression"),
    "groups": ({"quant_method": "compressed-tensors", "config_groups": {"a": {}, "b": {}}}, "2 config_groups"),
    "kv": ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_quantization_is_refused_by_name(kind: str) -> None:
    quantization, message = FOREIGN[kind]
    with pytest.raises(FormatError, match=message):
        read_format({**hf_llama.BASE, "quantization_config": quantization})


def test_quantized_format_without_quantization_config_is_refused() -> None:
    with pytest.raises(FormatError, match="no quantization_config"):
        read_format({"fp8_engine": {"format": "fp8"}})
    with pytest.raises(FormatError, match="dtype 'int8'"):
        read_dtype({"dtype": "int8"})
