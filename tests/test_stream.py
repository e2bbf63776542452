"""Streaming by threads and asyncio: the text of generate in pieces; cancellation, failures, shutdown lose nothing."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import aclosing
from pathlib import Path

import hf_llama
import pytest
import tiny_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM
from fp8.runtime.request import RequestError, SamplingParams
from fp8.runtime.service import ServiceError
from fp8.runtime.text_stream import TextStream
from fp8.runtime.tokenizer import FastTokenizer

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-python-llama" / "tokenizer.json"


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[FastTokenizer]:
    directory = tmp_path_factory.mktemp("bytes")
    hf_llama.add_tokenizer(directory)
    return [FastTokenizer(directory / "tokenizer.json"), FastTokenizer(EXAMPLE)]


def wait_for_free_blocks(llm: LLM, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while llm.worker.busy or llm.service.open_requests:
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.01)
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from([0, 1]), st.integers(1, 3))
def test_pieces_add_up_to_the_text_and_split_no_character(tokenizers, text: str, which: int, step: int) -> None:
    tokenizer = tokenizers[which]
    tokens, stream = tokenizer.encode(text), TextStream(tokenizer)
    pieces = [stream.add(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=200))
def test_bytes_that_are_no_text_come_as_the_tokenizer_writes_them(tokenizers, tokens: list[int]) -> None:
    stream = TextStream(tokenizers[0])
    assert "".join([*(stream.add([t]) for t in tokens), stream.finish()])[:3] == tokenizers[0].decode(tokens)[:3]


@settings(max_examples=100, deadline=None)
@given(st.text("ab\u20ac", max_size=30), st.lists(st.text("ab\u20ac", min_size=1, max_size=4), max_size=3),
       st.integers(0, 5), st.integers(1, 3))  # fmt: skip
def test_a_stop_string_is_found_however_the_tokens_come(
    tokenizers, text: str, stop: list[str], early: int, step: int
) -> None:
    tokens = tokenizers[1].encode(text)
    one, several = TextStream(tokenizers[1], stop, early), TextStream(tokenizers[1], stop, early)
    pieces = [several.add(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    for token in tokens:
        one.add([token])
    assert one.finish() is not None and "".join([*pieces, several.finish()]) == several.text == one.text
    assert one.found == several.found
    begun = len(tokenizers[1].decode(tokens[:early]).rstrip("\ufffd"))
    places = [at for s in stop if (at := text.find(s, begun)) >= 0]
    assert (one.found is not None) == bool(places)
    assert text.startswith(one.text) and (one.found is not None or one.text == text)


def test_requests_arriving_at_random_on_a_small_pool_give_what_they_give_alone(engine_dir: Path) -> None:
    source = random.Random(5)
    shared = [source.randrange(tiny_engine.VOCAB) for _ in range(130)]
    prompts = [[*shared[: source.randint(1, 130)], source.randrange(97)] for _ in range(40)]
    params = [SamplingParams(max_tokens=source.randint(1, 30), temperature=0.7 * (i % 2), seed=i) for i in range(40)]
    plain = LLM(engine_dir, "cpu", reuse_prefixes=False)
    alone = [plain.generate([p], q)[0].token_ids for p, q in zip(prompts, params, strict=True)]
    llm, found = LLM(engine_dir, "cpu", max_kv_blocks=6, policy="fair", lag=1), {}

    def run(i: int) -> None:
        time.sleep(source.random() / 5)
        deltas = llm.stream(prompts[i], params[i], priority=i % 3, user=str(i % 4))
        found[i] = [token for delta in deltas for token in delta.token_ids]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found.get(i) for i in range(40)] == alone
    wait_for_free_blocks(llm)
    statistics = llm.worker.statistics
    assert statistics.preemptions > 0 and statistics.reused_tokens > 0
    assert statistics.finished == {"length": 40} and statistics.generated_tokens == sum(map(len, alone))
    llm.close()


def test_closing_a_stream_frees_its_blocks_and_others_go_on(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu")
    expected = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=100))[0].token_ids
    doomed, other = llm.stream([4] * 70, SamplingParams(max_tokens=150)), llm.stream([1, 2, 3], SamplingParams(100))
    next(doomed)
    doomed.close()
    assert [t for delta in other for t in delta.token_ids] == expected
    wait_for_free_blocks(llm)
    assert llm.worker.statistics.finished == {"length": 2, "abort": 1}
    llm.close()


def test_asyncio_gives_the_same_and_cancels_with_the_iterator(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu")
    expected = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=20))[0].token_ids
    engine = AsyncLLM(llm)

    async def collect() -> list[int]:
        return [t async for delta in engine.generate([1, 2, 3], SamplingParams(max_tokens=20)) for t in delta.token_ids]

    async def leave() -> None:
        async with aclosing(engine.generate([5] * 70, SamplingParams(max_tokens=150))) as deltas:
            await anext(deltas)

    async def main() -> list[list[int]]:
        return [r for r in await asyncio.gather(collect(), leave(), collect()) if r]

    assert asyncio.run(main()) == [expected] * 2
    wait_for_free_blocks(llm)
    llm.close()


def test_a_failing_step_ends_its_requests_and_the_next_one_works(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(engine_dir, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(llm.session, "enqueue", lambda *_: 1 / 0)
        with pytest.raises(ServiceError, match=r"a step of the engine failed .*ZeroDivisionError"):
            list(llm.stream([1, 2]))
    wait_for_free_blocks(llm)
    assert len(list(llm.stream([1, 2], SamplingParams(max_tokens=3)))) == 3
    llm.close()


def test_close_lets_open_requests_finish_and_refuses_new_ones(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu")
    stream = llm.stream([1, 2], SamplingParams(max_tokens=40))
    count = len(next(stream).token_ids)
    llm.close(drain_seconds=30)
    assert count + sum(len(delta.token_ids) for delta in stream) == 40
    with pytest.raises(ServiceError, match="shutting down"):
        next(llm.stream([1, 2]))


def test_a_bad_prompt_is_refused_before_the_first_element(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu", max_kv_blocks=2)
    with pytest.raises(RequestError, match="is empty"):
        llm.stream([])
    with pytest.raises(RequestError, match="need 4 KV blocks"):
        llm.stream([1] * 200, SamplingParams(max_tokens=10))
    with pytest.raises(RequestError, match="policy 'random' is unknown"):
        LLM(engine_dir, "cpu", policy="random")


def test_a_stop_string_never_shows_in_a_stream(tmp_path: Path) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    llm = LLM(directory, "cpu")
    (whole,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=40))
    assert whole.text
    for stop in (whole.text[10:13], whole.text[-2:], "none such"):
        params = SamplingParams(max_tokens=40, stop=(stop,))
        (expected,) = llm.generate([[1, 2, 3]], params)
        deltas = list(llm.stream([1, 2, 3], params))
        assert "".join(delta.text or "" for delta in deltas) == expected.text
        assert deltas[-1].finish_reason == expected.finish_reason
    llm.close()
