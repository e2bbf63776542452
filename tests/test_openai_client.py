"""fp8-serve as a process of its own, by OpenAI's client library: answers, errors, load, killed clients, SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_llama
import httpx
import openai
import pytest
import tiny_engine

from fp8.runtime.llm import LLM
from fp8.runtime.request import SamplingParams
from fp8.scripts import load_test

KEY = "k1"
LOAD = ["--api_key", KEY, "--words", "AB", "!", "C", "--prompt_words", "60"]
MESSAGES: Any = [{"role": "user", "content": "AB"}]


def start(engine_dir: Path, log: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """The process, and its address once it listens."""
    line = [sys.executable, "-m", "fp8.scripts.serve", "--engine_dir", str(engine_dir), "--port", "0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen([*line, "--device", "cpu"], stderr=output, stdout=output)
    deadline = time.monotonic() + 60
    while not (found := re.search(r"running on (http://\S+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return process, found[1]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine.write(tmp_path_factory.mktemp("openai") / "tiny")
    hf_llama.add_tokenizer(directory)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    return directory


@pytest.fixture(scope="module")
def server(engine_dir: Path) -> Iterator[str]:
    process, url = start(engine_dir, engine_dir.parent / "log", "--api_key", KEY, "--max_requests", "40")
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> LLM:
    return LLM(engine_dir, "cpu")


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "fp8-engine"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_completion_is_that_of_generate(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.generate(["AB!"], SamplingParams(max_tokens=12))
    answer = client.completions.create(model="tiny", prompt="AB!", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected.text and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 12, 15)


def test_streams_add_up_to_the_whole_and_tell_usage_when_asked(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(prompt="AB!", **options)
    chunks = list(
        client.completions.create(prompt="AB!", stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    chat = client.chat.completions.create(messages=MESSAGES, **options)
    pieces = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    assert chat.choices[0].message.role == pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == chat.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == chat.choices[0].finish_reason and pieces[-1].usage is None


def test_several_prompts_and_choices_come_in_order_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": ["AB", [33, 34]], "n": 3, "max_tokens": 8, "temperature": 0.9, "seed": 7}
    first, again = (client.completions.create(**ask) for _ in range(2))
    texts = [c.text for c in first.choices]
    assert [c.index for c in first.choices] == list(range(6)) and len(set(texts[:3])) > 1
    assert texts == [c.text for c in again.choices]
    assert first.usage is not None and first.usage.prompt_tokens == 4
    other = client.completions.create(**{**ask, "seed": 8})
    assert [c.text for c in other.choices] != texts


def test_stop_and_logit_bias_do_what_they_say(client: openai.OpenAI, llm: LLM) -> None:
    options: Any = {"model": "tiny", "prompt": "AB!", "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    stop = text[9:11]
    for given in (stop, [stop, "never"]):
        answer = client.completions.create(stop=given, **options).choices[0]
        assert (answer.text, answer.finish_reason) == (text[: text.index(stop)], "stop")
    (expected,) = llm.generate(["AB!"], SamplingParams(max_tokens=30))
    banned = expected.token_ids[0]
    biased = client.completions.create(logit_bias={str(banned): -100}, **options).choices[0].text
    assert biased and biased[0] != text[0]
    forced = client.completions.create(logit_bias={"40": 100}, **options).choices[0].text
    assert len(set(forced.split())) == 1


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "'gpt-9' does not exist"),
        ({"temperature": -1}, openai.BadRequestError, "temperature is -1"),
        ({"prompt": [[1] * 300]}, openai.BadRequestError, "max_seq_len is 256"),
        ({"prompt": ""}, openai.BadRequestError, "is empty"),
        ({"n": 0}, openai.BadRequestError, "n is 0"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix is 'x'; this server does not support it"),
        ({"extra_body": {"guided_regex": "a+"}}, openai.BadRequestError, "'guided_regex' is no field of completions"),
        ({"prompt": "A" * (5 << 20)}, openai.APIStatusError, "more than 4194304 bytes"),
        ({"n": 41}, openai.BadRequestError, "the server does 40 at a time"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_the_client_library_s_own(
    client: openai.OpenAI, wrong: dict[str, Any], error: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        client.completions.create(**{"model": "tiny", "prompt": "A", "max_tokens": 2, **wrong})
    assert client.completions.create(model="tiny", prompt="A", max_tokens=2).choices[0].finish_reason


def test_a_wrong_key_is_refused(server: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        openai.OpenAI(base_url=f"{server}/v1", api_key="other", max_retries=0).models.list()


CLIENT = """
import sys, openai
stream = openai.OpenAI(base_url=sys.argv[1], api_key="k1").completions.create(
    model="tiny", prompt="A", max_tokens=250, n=8, temperature=1, stream=True, extra_body={"ignore_eos": True})
for chunk in stream:
    print("began", flush=True)
"""


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_killed_client_frees_its_blocks_within_a_second(server: str) -> None:
    aborted = metrics(server)['fp8_requests_finished_total{reason="abort"}']
    process = subprocess.Popen([sys.executable, "-c", CLIENT, f"{server}/v1"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"began\n"
    held = metrics(server)
    assert held["fp8_requests_running"] == 8 and held["fp8_kv_blocks_free"] < held["fp8_kv_blocks"]
    process.kill()
    begin = time.monotonic()
    while (now := metrics(server))["fp8_kv_blocks_free"] < now["fp8_kv_blocks"] or now["fp8_requests_running"]:
        assert time.monotonic() - begin < 1, "blocks are still held"
        time.sleep(0.005)
    process.wait()
    assert now['fp8_requests_finished_total{reason="abort"}'] == aborted + 8


def test_clients_in_numbers_lose_nothing(server: str, tmp_path: Path) -> None:
    """Ten seconds of what `python -m fp8.scripts.load_test --clients 64 --seconds 600` does; the first seconds of a
    process say little of its memory."""
    flags = [*LOAD, "--url", server, "--clients", "32", "--seconds", "10", "--max_memory_growth", "0.2"]
    assert load_test.main([*flags, "--leave", "0.2", "--output", str(tmp_path / "load.json")]) == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["errors"] == 0 and all(found["checks"].values()) and max(found["freed_seconds"]) < 1
    assert {"chat", "chat, streamed", "completion", "completion, streamed, left"} <= found["requests"].keys()
    assert len(found["samples"]["rows"]) > 10


def test_the_load_test_notices_errors_and_a_server_that_is_not_there(server: str, capsys: Any) -> None:
    assert load_test.main(["--url", "http://127.0.0.1:9", "--seconds", "1"]) == 1
    assert "is fp8-serve running there?" in capsys.readouterr().err
    flags = [*LOAD, "--url", server, "--clients", "60", "--seconds", "2", "--max_memory_growth", "1"]
    assert load_test.main(flags) == 1  # 40 requests at once are allowed
    assert "RateLimitError" in capsys.readouterr().out


def test_sigterm_lets_requests_finish_and_the_process_ends(engine_dir: Path, tmp_path: Path) -> None:
    process, url = start(engine_dir, tmp_path / "log")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="tiny", prompt="A", max_tokens=120, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    os.kill(process.pid, signal.SIGTERM)
    assert [c.choices[0].finish_reason for c in stream][-1] == "length"
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "log").read_text()
