"""fp8-run on the tiny engine: what it prints, and how it fails."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import hf_llama
import pytest
import tiny_engine

from fp8.scripts import run


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


def test_json_output_holds_every_completion_in_order(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--engine_dir",
        str(engine_dir),
        "--input_tokens",
        "1,2,3",
        "4 5",
        "--max_output_len",
        "6",
        "--device",
        "cpu",
    ]
    assert run.main([*args, "--output", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [c["prompt"] for c in result["completions"]] == [[1, 2, 3], [4, 5]]
    assert all(len(c["token_ids"]) == 6 and c["finish_reason"] == "length" for c in result["completions"])
    assert result["output_tokens"] == 12 and result["device"] == "cpu" and result["tokens_per_second"] > 0


def test_text_output_begins_with_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    assert run.main(["--engine_dir", str(directory), "--input_text", "AB!", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("AB!") and "[length, 64 tokens]" in out and "tokens/s on cpu" in out


def test_a_seed_gives_the_same_text_again(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--engine_dir", str(engine_dir), "--input_tokens", "1,2,3", "--temperature", "0.9", "--output", "json"]
    texts = []
    for seed in ("5", "5", "6"):
        run.main([*args, "--seed", seed])
        texts.append(json.loads(capsys.readouterr().out)["completions"][0]["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_every_sampling_flag_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    flags = shlex.split(
        "--temperature 0.9 --seed 3 --top_k 40 --top_p 0.9 --min_p 0.01 --typical_p 0.95 --repetition_penalty 1.1 "
        "--presence_penalty 0.1 --frequency_penalty 0.1 --logit_bias 5:-100 6:1.5 --stop xyz --stop_token_ids 9 --n 2 "
        "--min_tokens 3 --max_tokens 6 --logprobs 2 --prompt_logprobs 1 --device cpu"
    )
    arguments = ["--engine_dir", str(directory), "--input_text", "AB!", *flags]
    assert run.main([*arguments, "--output", "json"]) == 0
    completions = json.loads(capsys.readouterr().out)["completions"]
    assert [c["index"] for c in completions] == [0, 1]
    assert all(len(c["logprobs"]) == len(c["token_ids"]) >= 3 and 5 not in c["token_ids"] for c in completions)
    assert all(len(c["logprobs"][0]["top"]) == 2 and c["prompt_logprobs"][0] is None for c in completions)
    assert run.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        ", output 1, ln p -" in out and "output token, ln p, likeliest:" in out and "(the first token has none)" in out
    )


def test_beams_are_printed_best_first(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--engine_dir", str(engine_dir), "--input_tokens", "1,2,3", "4 5", "--max_tokens", "8", "--device", "cpu"]
    flags = ["--beam_width", "4", "--n", "3", "--length_penalty", "0.5", "--early_stopping", "never"]
    assert run.main([*where, *flags, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["completions"]
    assert [c["index"] for c in found] == [0, 1, 2] * 2 and [c["prompt"] for c in found] == [[1, 2, 3]] * 3 + [
        [4, 5]
    ] * 3
    scores = [c["cumulative_logprob"] for c in found]  # all have eight tokens
    assert scores[:3] == sorted(scores[:3], reverse=True) and scores[3:] == sorted(scores[3:], reverse=True)
    assert run.main([*where, *flags]) == 0
    assert f"[length, 8 tokens, output 2, ln p {scores[2]:.4f}]" in capsys.readouterr().out
    assert run.main([*where, "--beam_width", "2", "--streaming"]) == 1
    assert "which beam wins is known at the end" in capsys.readouterr().err


def test_help_teaches_the_order_and_the_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "bias, penalties, temperature, then what is unlikely" in text and "0 < X <= 1" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_tokens", "1,x"], "'1,x' is not a list of token ids"),
        (["--input_tokens", "5", "--max_output_len", "0"], "max_tokens is 0"),
        (["--input_tokens", "5", "--temperature", "-1"], "temperature is -1.0"),
        (["--input_tokens", "5", "--top_p", "1.5"], "top_p is 1.5; it must be above 0 and at most 1"),
        (["--input_tokens", "5", "--n", "2"], "n is 2 and temperature 0"),
        (["--input_tokens", "5", "--beam_width", "2", "--temperature", "1"], "temperature is 1.0 and beam_width 2"),
        (["--input_tokens", "5", "--beam_width", "9"], "beam_width is 9, and the engine's max_batch_size is 8"),
        (["--input_tokens", "5", "--logit_bias", "x:1"], "--logit_bias 'x:1' is not a token id and a number"),
        (["--input_tokens", "5", "--stop", "end"], "holds no tokenizer; give stop_token_ids"),
        (["--input_tokens", "97"], "token 97 at position 0 is outside the vocabulary"),
        (["--input_tokens", ""], "prompt 0 is empty"),
        (["--input_text", "hello"], "holds no tokenizer"),
        (["--input_tokens", "5", "--device", "abacus"], "device 'abacus' is unknown"),
        (["--input_tokens", "5", "--max_kv_blocks", "1"], "need 2 KV blocks, and the pool has 1"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failure(
    engine_dir: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run.main(["--engine_dir", str(engine_dir), *flags]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_tokenizer_that_does_not_match_the_vocabulary_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)  # of 256 bytes, for a model of 97 tokens
    assert run.main(["--engine_dir", str(directory), "--input_text", "AB é", "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "is outside the vocabulary (0 to 96); does the tokenizer belong to this model?" in message


@pytest.mark.parametrize("text", ["AB\udcff", "\ud800"])
def test_a_text_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    assert run.main(["--engine_dir", str(directory), "--input_text", text, "--device", "cpu"]) == 1
    assert f"half a surrogate pair at position {len(text) - 1}" in capsys.readouterr().err


def test_a_directory_without_an_engine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--engine_dir", str(tmp_path), "--input_tokens", "1"]) == 1
    assert "is not an engine directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "AB\n\n!!\n"),
        ("a.jsonl", '{"text": "AB"}\n\n{"prompt": "!!"}\n'),
        ("a.csv", 'id,text\n1,AB\n2,"!!"\n'),
    ],
)
def test_prompts_come_from_a_file_and_texts_go_out_as_jsonl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    (tmp_path / name).write_text(content)
    args = ["--engine_dir", str(directory), "--input_file", str(tmp_path / name), "--max_output_len", "9"]
    assert run.main([*args, "--output", "jsonl"]) == 0
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [c["prompt"] for c in whole] == ["AB", "!!"]
    assert run.main([*args, "--output", "jsonl", "--streaming"]) == 0
    pieces = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for i in (0, 1):
        assert "".join(p["text"] for p in pieces if p["index"] == i) == whole[i]["text"]
        assert [t for p in pieces if p["index"] == i for t in p["token_ids"]] == whole[i]["token_ids"]
    assert run.main([*args, "--streaming"]) == 0
    assert capsys.readouterr().out.startswith(f"AB{whole[0]['text']}\n[length]\n")


def test_a_chat_goes_through_the_template_of_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    args = ["--engine_dir", str(directory), "--input_text", "AB", "--max_output_len", "5", "--output", "json", "--chat"]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert run.main(args) == 1 and "has no chat template" in capsys.readouterr().err
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert run.main(args) == 0
    (completion,) = json.loads(capsys.readouterr().out)["completions"]
    assert (completion["prompt"], len(completion["prompt_token_ids"])) == ("AB", 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.csv", "id,text\n", "holds no prompt"),
        ("a.doc", "AB", "ends in .doc; known are .txt, .jsonl, .csv"),
        ("a.jsonl", '{"text": "AB"}\n{', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl:1 is not JSON"),
        ("a.csv", 'text\n"AB\n', "is not CSV (unexpected end of data); is a quote missing?"),
        ("a.jsonl", '{"question": "AB"}', "a.jsonl:1 has none of the keys text, prompt, messages"),
        ("a.jsonl", '{"messages": ["x"]}', "messages must be a list of objects"),
        ("a.csv", "id,question\n1,AB\n", "has the columns id, question; one must be text or prompt"),
        ("a.csv", "id,text\n1\n", "a.csv:2 has no column text"),
    ],
)
def test_a_bad_file_of_prompts_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    assert run.main(["--engine_dir", str(tmp_path), "--input_file", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err
