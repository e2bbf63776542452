"""Flags of TensorRT-LLM's commands: each is refused with what stands for it here, and none is one of ours by now."""

from __future__ import annotations

import importlib

import pytest

from fp8.scripts.moved_flags import MOVED

COMMANDS = {
    "quantize": ["--model_dir", "m", "--output_dir", "o"],
    "build": ["--checkpoint_dir", "c", "--output_dir", "o"],
    "run": ["--engine_dir", "e", "--input_text", "t"],
    "serve": ["--engine_dir", "e"],
    "evaluate": ["--engine_dir", "e"],
    "inspect": ["e"],
}
# As examples/quantization/quantize.py, trtllm-build, examples/run.py and examples/summarize.py take them.
CASES = {
    "quantize": [("--tp_size 2", "fp8-build"), ("--use_fp8_rowwise", "--qformat fp8_rowwise")],
    "build": [
        ("--gpt_attention_plugin float16 --gemm_plugin float16", "fp8-inspect"),
        ("--use_fp8_context_fmha enable", "--kv_cache_dtype fp8"),
        ("--remove_input_padding=enable", "always"),
        ("--max_input_len 1024", "--max_seq_len"),
        ("--lora_plugin auto", "merge"),
        ("--max_batchsize 8", "did you mean --max_batch_size?"),
    ],
    "run": [("--tokenizer_dir gpt2", "engine directory"), ("--num_beams 4", "--beam_width")],
    "evaluate": [("--test_trt_llm --hf_model_dir m", "--reference HF_DIR"), ("--ntrain 5", "--num_shots")],
    "serve": [("--max_batch_size 8", "fp8-build")],
    "inspect": [("--rnak 3", "did you mean --rank?")],
}


def refusal(command: str, flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    module = importlib.import_module(f"fp8.scripts.{command}")
    with pytest.raises(SystemExit) as exit:
        module.main([*COMMANDS[command], *flags.split()])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("command", "flags", "says"), [(c, f, s) for c, cases in CASES.items() for f, s in cases])
def test_a_flag_of_tensorrt_llm_is_refused_with_what_to_give(
    command: str, flags: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(command, flags, capsys)
    assert says in line
    for flag in (word.partition("=")[0] for word in flags.split() if word.startswith("--")):
        assert f"; {flag}: " in line, "each of them has its answer"


def test_what_is_unlike_any_flag_has_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal("build", "--zzz", capsys).endswith("unrecognized arguments: --zzz")


def test_every_answer_is_for_a_flag_that_some_command_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, answer in MOVED.items():
        said = []
        for command in ("quantize", "build", "run"):
            try:
                said.append(refusal(command, f"--{flag}", capsys))
            except pytest.fail.Exception:  # the command takes it
                continue
        assert any(f"--{flag}: {answer}" in line for line in said), flag


def test_flags_that_answers_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`fp8-run --seed` in an answer is a flag of fp8-run."""
    scripts = {"fp8-quantize": "quantize", "fp8-build": "build", "fp8-run": "run", "fp8-eval": "evaluate"}
    for answer in set(MOVED.values()):
        words = answer.replace(",", " ").replace(";", " ").split()
        for at, word in enumerate(words[:-1]):
            if word in scripts and words[at + 1].startswith("--"):
                with pytest.raises(SystemExit):
                    importlib.import_module(f"fp8.scripts.{scripts[word]}").main(["--help"])
                assert words[at + 1] in capsys.readouterr().out, answer
