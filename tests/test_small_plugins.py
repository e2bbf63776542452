"""Facts about embedding, norm_quant, quantize, act_quant and sampling that need no GPU."""

import pytest
import torch

from fp8.plugins.act_quant.plugin import ActQuant
from fp8.plugins.base import PluginError, StepShape, Tensor
from fp8.plugins.embedding.plugin import Embedding
from fp8.plugins.norm_quant.plugin import NormQuant
from fp8.plugins.quantize.launch import quantize_tactics
from fp8.plugins.quantize.plugin import Quantize
from fp8.plugins.quantize.reference import quantize_static
from fp8.plugins.sampling.plugin import Sampling
from fp8.plugins.sampling.reference import gumbel, philox

STEP = StepShape.prefill(4)
BF16, F32, I32 = "bfloat16", "float32", "int32"


def test_quantization_saturates_and_keeps_nan() -> None:
    x = torch.tensor([0.0, 1.0, -1e6, torch.inf, torch.nan, 460.0])
    codes = quantize_static(x, torch.tensor([1.0])).float()
    assert codes[:4].tolist() == [0.0, 1.0, -448.0, 448.0] and codes[4].isnan() and codes[5] == 448.0


def test_static_quantization_divides() -> None:
    """x / scale and x * (1 / scale) round to different codes somewhere; the graph divides."""
    x = torch.arange(1, 20000).float() / 64
    scale = torch.tensor([0.7])
    exact = (x.double() / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    assert torch.equal(quantize_static(x, scale).float(), exact.float())


def test_a_row_of_zeros_has_the_smallest_scale() -> None:
    y, scale = Quantize("per_token").reference(torch.zeros(2, 16, dtype=torch.bfloat16), step=STEP)
    assert scale.tolist() == pytest.approx([1 / (448 * 512)] * 2, rel=1e-6) and not y.float().any()


def test_per_token_scale_is_bounded() -> None:
    x = torch.full((1, 16), 4480.0, dtype=torch.bfloat16)
    assert Quantize("per_token", 1200.0).reference(x, step=STEP)[1].item() == pytest.approx(1200 / 448)
    assert Quantize("per_token").reference(x, step=STEP)[1].item() == pytest.approx(x[0, 0].item() / 448)


def test_norm_reads_the_rounded_sum() -> None:
    x, residual = torch.full((1, 8), 1.0).bfloat16(), torch.full((1, 8), 2.0**-10).bfloat16()
    x[0, 0] = 3.0
    weight = torch.ones(8).bfloat16()
    y, total = NormQuant(residual=True).reference(x, residual, weight, None, None, None, step=STEP)
    assert torch.equal(total, x)
    assert torch.equal(y, NormQuant().reference(x, None, weight, step=STEP)[0])


def test_gather_computes_the_asked_rows_only() -> None:
    x, weight = torch.randn(5, 8).bfloat16(), torch.randn(8).bfloat16()
    every = NormQuant("layer").reference(x, None, weight, weight, step=STEP)[0]
    rows = torch.tensor([4, 0, 4], dtype=torch.int32)
    some = NormQuant("layer", gather=True).reference(x, None, weight, weight, None, rows, step=STEP)[0]
    assert torch.equal(some, every[rows.long()])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norm_is_torchs(norm: str) -> None:
    x, weight, bias = torch.randn(3, 64), torch.randn(64), torch.randn(64)
    if norm == "rms":
        expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    else:
        expected = torch.nn.functional.layer_norm(x, (64,), weight, bias, 1e-5)
    got = NormQuant(norm).reference(x, None, weight, bias if norm == "layer" else None, step=STEP)[0]
    torch.testing.assert_close(got, expected)


def test_outputs_are_listed_only_if_present() -> None:
    x, weight = Tensor(BF16, ("T", 64)), Tensor(BF16, (64,))
    rows = Tensor(I32, ("L",))
    outputs = NormQuant(quant="per_token", residual=True).infer([x, x, weight, None, None, None])
    assert [(t.dtype, t.shape) for t in outputs] == [("float8_e4m3fn", ("T", 64)), (F32, ("T",)), (BF16, ("T", 64))]
    outputs = NormQuant(residual=True, gather=True).infer([x, x, weight, None, None, rows])
    assert outputs == (Tensor(BF16, ("L", 64)),)


def test_gate_comes_before_up() -> None:
    x = torch.tensor([[2.0, -1.0, 3.0, 5.0]])
    expected = torch.nn.functional.silu(x[:, :2]) * x[:, 2:]
    torch.testing.assert_close(ActQuant().reference(x, step=STEP)[0], expected)


def test_padding_ids_embed_to_zero() -> None:
    table = torch.randn(3, 8)
    y = Embedding().reference(torch.tensor([2, -1, 3, 0], dtype=torch.int32), table, step=STEP)[0]
    assert torch.equal(y, torch.stack([table[2], torch.zeros(8), torch.zeros(8), table[0]]))


def test_philox_gives_the_published_numbers() -> None:
    """kat_vectors of Random123: philox4x32-10 of zeros, of ones, and of the digits of pi."""
    one = lambda n: torch.tensor([n])
    assert [int(w) for w in philox([one(0)] * 4, [one(0)] * 2)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = one(0xFFFFFFFF)
    assert [int(w) for w in philox([ones] * 4, [ones] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = [one(n) for n in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    words = philox(counter, [one(0xA4093822), one(0x299F31D0)])
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_gumbel_noise_depends_on_seed_and_counter_only() -> None:
    seed, counter = torch.tensor([7, 7, -7]), torch.tensor([1, 1, 1], dtype=torch.int32)
    noise = gumbel(seed, counter, 1000)
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert noise.isfinite().all() and noise[0].mean().item() == pytest.approx(0.5772, abs=0.15)


def test_samples_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7, 0.0])
    logits = 2 * probabilities.log().expand(4000, 4)
    seed, counter = torch.full((4000,), 5), torch.arange(4000, dtype=torch.int32)
    token = Sampling().reference(logits, torch.full((4000,), 2.0), seed, counter, step=STEP)[0]
    frequency = torch.bincount(token, minlength=4) / 4000
    assert (frequency - probabilities).abs().max() < 0.03 and frequency[3] == 0


def test_greedy_takes_the_first_of_equals_and_never_nan() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [torch.nan, -1.0, torch.nan], [-torch.inf] * 3])
    token = Sampling().reference(logits, torch.zeros(3), torch.zeros(3, dtype=torch.int64), None, step=STEP)[0]
    assert token.tolist() == [1, 1, 0]


@pytest.mark.parametrize("quant", ["static", "per_token"])
@pytest.mark.parametrize("width", [8, 264, 4096, 14336, 65536])
def test_tactics_cover_the_row(width: int, quant: str) -> None:
    for tokens in (1, 4096):
        tactics = quantize_tactics(width, quant, tokens)
        assert tactics and len(set(tactics)) == len(tactics)
        assert all(t.threads % 32 == 0 and 0 < t.threads <= 1024 for t in tactics)
        assert quant == "static" or all(8 * t.threads * t.held >= width for t in tactics)


X, W, S = Tensor(BF16, ("T", 64)), Tensor(BF16, (64,)), Tensor(F32, (1,))
IDS = Tensor(I32, ("T",))


@pytest.mark.parametrize(
    ("plugin", "inputs", "message"),
    [
        (NormQuant("batch"), [X, None, W], "norm is 'batch'"),
        (NormQuant(), [X, None, Tensor(BF16, (32,))], r"weight is bfloat16 \[32\], expected bfloat16 \[64\]"),
        (NormQuant(), [X, X, W], "residual is given"),
        (NormQuant(residual=True), [X, None, W], "residual is absent"),
        (NormQuant(), [X, None, W, W], "bias is given"),
        (NormQuant(quant="static"), [X, None, W], "scale is absent"),
        (NormQuant(gather=True), [X, None, W], "rows is absent"),
        (NormQuant(), [Tensor(BF16, ("T", 60)), None, Tensor(BF16, (60,))], "H=60 is not a multiple of 8"),
        (NormQuant(), [Tensor(BF16, ("T", 32768)), None, Tensor(BF16, (32768,))], "exceeds 16384"),
        (NormQuant(), [Tensor(F32, ("T", 64)), None, Tensor(F32, (64,))], "choose a 16-bit dtype"),
        (Quantize("none"), [X], "quant is 'none'"),
        (Quantize("per_token"), [X, S], "scale is given"),
        (ActQuant("relu"), [X], "activation is 'relu'"),
        (ActQuant(), [Tensor(BF16, ("T", 63))], "even number"),
        (ActQuant(), [Tensor(BF16, ("T", 24))], "F=12 is not a multiple of 8"),
        (Embedding(), [Tensor("int64", ("T",)), Tensor(BF16, (10, 64))], "input_ids is int64"),
        (Sampling(), [Tensor(BF16, ("L", 10)), S, S], "logits is bfloat16"),
        (Sampling(), [Tensor(F32, ("L", "V")), Tensor(F32, ("L",)), Tensor("int64", ("L",))], "V=V"),
    ],
)
def test_what_cannot_run_says_why(plugin: object, inputs: list, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        plugin.check(inputs)
