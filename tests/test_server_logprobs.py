"""Log-probabilities through the server, read with OpenAI's client library: those of generate, in both of its forms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import hf_llama
import httpx
import openai
import pytest
import tiny_engine
import tokenizers

from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM, Completion
from fp8.runtime.request import SamplingParams
from fp8.runtime.server.app import create_app

PROMPT = "AB!c"
CHAT = [{"role": "user", "content": "AB"}]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine.write(tmp_path_factory.mktemp("tiny"))
    hf_llama.add_tokenizer(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pieces add up to the text
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def ask(engine_dir: Path, questions: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        app = create_app(AsyncLLM(LLM(engine_dir, "cpu")), "tiny")
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0) as client,
        ):
            return await questions(client)

    return asyncio.run(main())


def generated(engine_dir: Path, prompt: str, **wanted: Any) -> Completion:
    return LLM(engine_dir, "cpu").generate([prompt], SamplingParams(max_tokens=12, **wanted))[0]


@pytest.mark.parametrize("echo", [False, True])
def test_completions_have_those_of_generate_whole_and_streamed(engine_dir: Path, echo: bool) -> None:
    expected = generated(engine_dir, PROMPT, logprobs=3, prompt_logprobs=3 if echo else None)
    body: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": echo,
    }  # fmt: skip

    async def both(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.completions.create(**body)
        return whole.choices[0], [c.choices[0] async for c in await client.completions.create(**body, stream=True)]

    whole, chunks = ask(engine_dir, both)
    assert whole.text == (PROMPT if echo else "") + (expected.text or "")
    found, entries = whole.logprobs, expected.logprobs or []
    assert "".join(found.tokens[-12:]).startswith((expected.text or "").rstrip("\ufffd"))
    for at, (token, offset) in enumerate(zip(found.tokens, found.text_offset, strict=True)):
        assert "\ufffd" in token or whole.text[offset:].startswith(token), at
    if echo:
        assert found.tokens[:4] == list(PROMPT) and found.text_offset[:4] == [0, 1, 2, 3]
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        entries = [*(expected.prompt_logprobs or [])[1:], *entries]
    count = len(entries)
    assert len(found.tokens) == count + echo
    assert found.token_logprobs[echo:] == pytest.approx([e.logprob for e in entries if e], abs=1e-4)
    tokenizer = LLM(engine_dir, "cpu").tokenizer
    assert tokenizer is not None
    for top, entry in zip(found.top_logprobs[echo:], entries, strict=True):
        assert entry is not None and 1 <= len(top) <= 4
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert top[tokenizer.piece(entry.top[0][0])] == pytest.approx(entry.top[0][1], abs=1e-4)
        assert tokenizer.piece(entry.token) in top
    streamed = [c.logprobs for c in chunks if c.logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for s in streamed for x in getattr(s, name)] == getattr(found, name)
    assert "".join(c.text for c in chunks) == whole.text


def test_a_chat_has_those_of_generate_whole_and_streamed(engine_dir: Path) -> None:
    expected = generated(engine_dir, "AB", logprobs=2)
    body: dict[str, Any] = {
        "model": "tiny", "messages": CHAT, "max_completion_tokens": 12, "temperature": 0, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip

    async def both(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(**body)
        stream = await client.chat.completions.create(**body, stream=True)
        return whole.choices[0], [c.choices[0] async for c in stream]

    whole, chunks = ask(engine_dir, both)
    content = whole.logprobs.content
    assert whole.logprobs.refusal is None
    for found, entry in zip(content, expected.logprobs or [], strict=True):
        assert found.logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert [t.logprob for t in found.top_logprobs] == pytest.approx([v for _, v in entry.top], abs=1e-4)
        assert found.bytes == (None if "\ufffd" in found.token else list(found.token.encode()))
    assert "".join(c.token for c in content).startswith((expected.text or "").rstrip("\ufffd"))
    assert [entry for c in chunks if c.logprobs for entry in c.logprobs.content] == content


def test_none_come_unasked_and_what_makes_no_sense_is_refused(engine_dir: Path) -> None:
    async def questions(client: openai.AsyncOpenAI) -> tuple[Any, Any, list[str]]:
        plain = await client.completions.create(model="tiny", prompt="A", max_tokens=2)
        chosen = await client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, logprobs=True)
        messages = []
        for wrong in (
            {"logprobs": 21}, {"logprobs": True}, {"echo": "yes"},
            {"messages": CHAT, "top_logprobs": 2}, {"messages": CHAT, "logprobs": 3},
            {"messages": CHAT, "logprobs": True, "top_logprobs": -1}, {"messages": CHAT, "echo": True},
        ):  # fmt: skip
            path, body = (
                ("/chat/completions", wrong) if "messages" in wrong else ("/completions", {"prompt": "A", **wrong})
            )
            with pytest.raises(openai.BadRequestError) as caught:
                await client.post(path, body={"model": "tiny", **body}, cast_to=object)
            messages.append(caught.value.message)
        return plain.choices[0], chosen.choices[0], messages

    plain, chosen, messages = ask(engine_dir, questions)
    assert plain.logprobs is None and [e.top_logprobs for e in chosen.logprobs.content] == [[], []]
    wanted = [
        "from 0 to 20",
        "of type int",
        "of type bool",
        "needs logprobs",
        "of type bool",
        "from 0 to 20",
        "no prompt",
    ]
    for message, part in zip(messages, wanted, strict=True):
        assert part in message
