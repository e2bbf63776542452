"""fp8-eval's perplexity: its arithmetic, and an engine against the Hugging Face model that it was built from."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import hf_llama
import numpy as np
import pytest
import tiny_engine
import torch

from fp8.runtime.scoring import token_losses, windows
from fp8.runtime.session import Session
from fp8.scripts import build, evaluate
from fp8.scripts.evaluation.models import Reference
from fp8.scripts.evaluation.tasks.perplexity import perplexity


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_llama.make(directory, torch.bfloat16)
    hf_llama.add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def engine_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "engine"
    limits = ["--max_batch_size", "2", "--max_seq_len", "96", "--max_num_tokens", "40", "--log_level", "error"]
    checkpoint = ["--checkpoint_dir", str(model_dir), "--output_dir", str(directory), "--target", "cpu"]
    assert build.main([*checkpoint, *limits]) == 0
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(source.choice("abcdef \n") for _ in range(500)))
    return path


def run(engine: Path, data: Path, *flags: object) -> int:
    return evaluate.main(["--engine_dir", str(engine), "--data", str(data), "--device", "cpu", *map(str, flags)])


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(500, 96, 48), (500, 96, 95), (10, 96, 48), (97, 96, 1), (96, 96, 48)]
)
def test_every_token_but_the_first_is_scored_once(tokens: int, length: int, stride: int) -> None:
    spans = windows(tokens, length, stride)
    assert [t for w in spans for t in range(w.scored, w.end)] == list(range(1, tokens))
    assert all(w.begin < w.scored < w.end <= w.begin + length for w in spans)
    assert all(w.scored - w.begin >= length - stride for w in spans[1:])


def test_losses_do_not_depend_on_the_chunks(tmp_path: Path) -> None:
    tokens = hf_llama.sequences(150, vocab=tiny_engine.VOCAB)[0]
    engine = tiny_engine.write(tmp_path / "small")
    wide = tiny_engine.Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=200)
    whole = tiny_engine.write(tmp_path / "large", limits=wide)
    a, b = (token_losses(Session(d, "cpu"), tokens) for d in (engine, whole))
    np.testing.assert_allclose(a[0], b[0], atol=1e-3)
    assert a[0].shape == (149,) and a[0].dtype == np.float64


def test_a_bf16_engine_agrees_with_the_float32_reference(
    engine_dir: Path, model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    flags = ("--reference", model_dir, "--output", output, "--max_ppl_increase", 0.02)
    assert run(engine_dir, text, *flags) == 0, capsys.readouterr().err
    result = json.loads(output.read_text())
    assert result["task"] == "perplexity" and result["tokens"] == 499 and result["bytes"] == 499
    assert math.isclose(result["perplexity"], math.exp(result["loss"]))
    assert math.isclose(result["bits_per_byte"], result["loss"] / math.log(2))  # a tokenizer of single bytes
    low, high = result["confidence_interval"]
    assert low < result["perplexity"] < high
    reference = result["reference"]
    assert abs(reference["increase"]) < 0.02 and reference["greedy_agreement"] > 0.9
    assert math.isclose(result["perplexity"] / reference["perplexity"] - 1, reference["increase"], abs_tol=1e-9)
    assert "perplexity" in capsys.readouterr().out


def test_a_missed_gate_is_a_failure_and_the_result_is_written(
    engine_dir: Path, model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    assert run(engine_dir, text, "--reference", model_dir, "--max_ppl_increase", -0.5, "--output", output) == 2
    assert "more than -50.000%" in capsys.readouterr().err and output.is_file()


def test_a_worse_engine_is_a_regression(
    engine_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights guess worse than a model that finds every token equally likely."""
    model = hf_llama.make(tmp_path)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    assert run(engine_dir, text, "--reference", tmp_path, "--max_regression", 0.01) == 2
    assert "the engine is worse than the reference: p = 0.0001" in capsys.readouterr().err
    assert run(engine_dir, text, "--reference", tmp_path) == 0


def test_the_reference_is_hugging_face_s_forward_pass(model_dir: Path) -> None:
    (tokens,) = hf_llama.sequences(60)
    losses, best = Reference(model_dir, "cpu").losses(tokens)
    logits = hf_llama.logits(hf_llama.load(model_dir), [tokens])[:-1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-6)
    assert (best == logits.argmax(1).numpy()).all()


def test_a_reference_that_transformers_does_not_compute_is_refused(
    engine_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(engine_dir, text, "--reference", tmp_path) == 1
    assert f"{tmp_path} is quantized (fp8)" in (error := capsys.readouterr().err) and "fp8-quantize" in error
    (tmp_path / "hf_quant_config.json").write_text("[]")
    assert run(engine_dir, text, "--reference", tmp_path) == 1
    assert "hf_quant_config.json is not a JSON object" in capsys.readouterr().err


def test_the_interval_narrows_with_the_number_of_windows() -> None:
    source = np.random.default_rng(0)
    few, many = ([source.normal(2.0, 0.5, 50) for _ in range(n)] for n in (10, 1000))
    widths = [np.diff(perplexity(w)["confidence_interval"])[0] for w in (few, many)]
    assert 5 < widths[0] / widths[1] < 20
    assert perplexity(few[:1])["confidence_interval"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window", "97"], "--window is 97; it must lie between 2 and 96"),
        (["--stride", "96"], "--stride is 96"),
        (["--max_tokens", "1"], "has 1 tokens; at least 2 are needed"),
        (["--max_ppl_increase", "0.01"], "compares with --reference"),
        (["--max_regression", "0.01"], "compares with --reference"),
        (["--min_accuracy", "0.5"], "--min_accuracy is not a flag of --task perplexity"),
        (["--num_shots", "2"], "--num_shots is not a flag of --task perplexity"),
        (["--reference", "nowhere"], "nowhere has no config.json"),
    ],
)
def test_bad_flags_are_refused(
    engine_dir: Path, text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(engine_dir, text, *flags) == 1
    assert message in capsys.readouterr().err


def test_bad_data_is_refused(engine_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (empty, "has 0 tokens"),
        (binary, "is not UTF-8"),
        (tmp_path / "none.txt", "none.txt cannot be read: No such file"),
    ):
        assert run(engine_dir, path) == 1
        assert message in capsys.readouterr().err


def test_an_engine_without_a_tokenizer_cannot_read_a_text(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_engine.write(tmp_path), text) == 1
    assert "holds no tokenizer" in capsys.readouterr().err
