"""fp8_block: weights and activations against compressed-tensors and torch, its kernels' references, an engine of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hf_llama
import onnx_graphsurgeon as gs
import pytest
import tiny_checkpoint as tiny
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file

from fp8.builder.checkpoint import Checkpoint
from fp8.builder.formats.base import FormatError
from fp8.builder.formats.fp8_block import Fp8Block
from fp8.builder.interpret import Interpreter, empty_caches, step_inputs
from fp8.builder.quantization_config import read_format
from fp8.builder.request import Request
from fp8.builder.weights import concatenate, prepared, to_torch
from fp8.models import llama
from fp8.plugins.base import PluginError, StepShape, Tensor
from fp8.plugins.gemm.pattern import per_channel
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.quantize.plugin import Quantize
from fp8.runtime.request import Request as Sequence
from fp8.runtime.request import SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.scripts import build as build_engine
from fp8.scripts import quantize

REQUEST = Request(max_seq_len=128)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_compressed_tensors(x: torch.Tensor, amax: torch.Tensor, **strategy) -> torch.Tensor:
    """The other library's own rounding: x quantized and back."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, **strategy)
    scale, zero = calculate_qparams(-amax, amax, args)
    return fake_quantize(x, scale, zero, args)


def test_weights_are_those_of_compressed_tensors() -> None:
    weight = random(256, 384) * torch.linspace(0.1, 3, 384)
    stored = Fp8Block().quantize(weight)
    blocks = weight.reshape(2, 128, 3, 128).abs().amax((1, 3))
    assert torch.equal(stored["weight_scale"], blocks / 448)
    scale = stored["weight_scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = by_compressed_tensors(weight, blocks, strategy="block", block_structure=[128, 128])
    torch.testing.assert_close(stored["weight"].float() * scale, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(200, 128), (8, 256), (129, 384)])
def test_a_last_block_may_have_fewer_rows(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    scale = Fp8Block().quantize(weight)["weight_scale"]
    assert scale.shape == (-(-shape[0] // 128), shape[1] // 128)
    last = weight[shape[0] // 128 * 128 :].reshape(-1, shape[1] // 128, 128)
    assert torch.equal(scale[-1], last.abs().amax((0, 2)) / 448)


def test_activations_are_those_of_compressed_tensors() -> None:
    x = random(5, 256)
    codes, scale = Quantize("block").reference(x.bfloat16(), step=StepShape.prefill(5))
    rounded = x.bfloat16().float()
    groups = rounded.reshape(5, 2, 128).abs().amax(2)
    assert torch.equal(scale, groups / 448)
    expected = by_compressed_tensors(rounded, groups, strategy="group", group_size=128)
    torch.testing.assert_close(codes.float() * scale.repeat_interleave(128, 1), expected, rtol=1e-6, atol=0)


def test_a_linear_that_the_blocks_do_not_fit_is_refused(tmp_path: Path) -> None:
    source = tiny.source(tmp_path, Fp8Block(), hidden_size=192)
    with pytest.raises(FormatError, match=r"q_proj: K=192 is not a multiple of 128; keep this layer in 16 bits"):
        source.emit(source.limits(REQUEST))
    source = tiny.source(tmp_path, Fp8Block(exclude_modules=("*",)), hidden_size=192)
    source.emit(source.limits(REQUEST))


def test_blockwise_operands_of_a_gemm_are_checked() -> None:
    def operands(k: int, n: int, scales: tuple) -> list[Tensor | None]:
        codes = [Tensor("float8_e4m3fn", ("T", k)), Tensor("float8_e4m3fn", (n, k))]
        return [*codes, *(Tensor("float32", s) for s in scales), None]

    for scales in ((17, 2), (2, 2)):  # per 8 rows, per 128
        assert Gemm().infer(operands(256, 136, (("T", 2), scales))) == (Tensor("bfloat16", ("T", 136)),)
    for wrong, message in [
        (operands(192, 136, (("T", 2), (17, 2))), "expected N in multiples of 8 and K of 128"),
        (operands(256, 132, (("T", 2), (17, 2))), "expected N in multiples of 8 and K of 128"),
        (operands(256, 136, (("T", 3), (17, 2))), r"x_scale is float32 \['T', 3\], expected float32 \['T', 2\]"),
        (operands(256, 136, (("T", 2), (136,))), r"w_scale is float32 \[136\], expected float32 \[17, 2\]"),
    ]:
        with pytest.raises(PluginError, match=message):
            Gemm().infer(wrong)


@pytest.mark.parametrize("group", [8, 128])
def test_the_gemm_is_that_of_the_dequantized_operands(group: int) -> None:
    x, w = (random(n, 256).to(torch.float8_e4m3fn) for n in (6, 136))
    x_scale, w_scale = random(6, 2).abs(), random(-(-136 // group), 2).abs()
    (y,) = Gemm("float32").reference(x, w, x_scale, w_scale, None, step=StepShape.prefill(6))
    wide_x = x.double() * x_scale.double().repeat_interleave(128, 1)
    wide_w = w.double() * w_scale.double().repeat_interleave(group, 0)[:136].repeat_interleave(128, 1)
    torch.testing.assert_close(y.double(), wide_x @ wide_w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts, stored", [((256, 136), 4), ((136, 256), 49), ((8,), 1), ((384, 128, 128), 5)])
def test_scales_of_joined_parts_are_stored_per_128_rows_where_their_blocks_meet(parts: tuple, stored: int) -> None:
    rows = [torch.rand(-(-n // 128), 2).repeat_interleave(128, 0)[:n] for n in parts]
    constants = [gs.Constant(f"part{i}", r.numpy()) for i, r in enumerate(rows)]
    joined = prepared("joined", constants, concatenate)
    scale = prepared("w_scale", [joined], partial(per_channel, rows=sum(parts)))
    assert tuple(scale.shape) == (stored, 2)
    group = 128 if stored == -(-sum(parts) // 128) else 8
    assert torch.equal(to_torch(scale).repeat_interleave(group, 0)[: sum(parts)], torch.cat(rows))


def test_transformers_loads_the_checkpoint_and_an_engine_of_it_agrees(tmp_path: Path) -> None:
    """Weights bit for bit; logits up to what flipped codes of activations leave."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    hf_llama.make(tmp_path / "model", torch.bfloat16, **sizes)
    flags = ["--model_dir", str(tmp_path / "model"), "--output_dir", str(tmp_path / "ckpt"), "--qformat", "fp8_block"]
    assert quantize.main(flags) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt", dtype=torch.float32)
    tokens = hf_llama.sequences(40)[0]
    expected = hf_llama.logits(model, [tokens])  # decompresses the model
    stored = load_file(tmp_path / "ckpt/model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    scale = stored[f"{module}.weight_scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(model.get_submodule(module).weight.float(), stored[f"{module}.weight"].float() * scale)

    checkpoint = Checkpoint(tmp_path / "ckpt")
    graph = llama.emit(llama.read_config(checkpoint.config), checkpoint, read_format(checkpoint.config), "float32")
    feeds = step_inputs([(tokens, 0)])
    found = Interpreter(graph)({**feeds, **empty_caches(graph, feeds)})["logits"]
    assert hf_llama.sqnr(expected, found) > 45

    build = ["--checkpoint_dir", str(tmp_path / "ckpt"), "--output_dir", str(tmp_path / "engine"), "--target", "cpu"]
    assert build_engine.main(build) == 0
    logits = Session(tmp_path / "engine", "cpu", 4).token_logits(
        [Row(Sequence(0, tokens, SamplingParams(), 1, blocks=[0], slot=0), 0, len(tokens), False, 0)]
    )
    assert hf_llama.sqnr(expected[: len(logits)], logits) > 20
