"""The checks of fp8.scripts.gpu_service on a tiny engine, by reference execution; and that they can fail."""

from __future__ import annotations

import random
from typing import Any

import hf_llama
import pytest
import tiny_engine

from fp8.builder.engine import Limits
from fp8.runtime.kv_cache import BlockPool
from fp8.scripts import service_checks as checks


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> checks.Engine:
    root = tmp_path_factory.mktemp("service")
    directory = tiny_engine.write(root / "engine", limits=Limits(32, 512, 96))
    hf_llama.add_tokenizer(directory)
    source = random.Random(0)
    tokens = [source.randrange(tiny_engine.VOCAB) for _ in range(2000)]
    return checks.Engine("bf16", directory, "cpu", 200, tokens, root, {}, root / "dumps")


def with_requests(engine: checks.Engine, count: int) -> checks.Engine:
    return checks.replace(engine, requests=count)


def test_200_requests_arriving_at_random_give_what_they_give_alone_and_no_block_is_lost(engine: checks.Engine) -> None:
    passed, figures = checks.random_arrivals(engine)
    assert passed and figures["equal"] == figures["texts"] == 200
    assert figures["preemptions"] > 20 and figures["reused_tokens"] > 0 and 0 < figures["cancelled"] <= 20


@pytest.mark.parametrize("check", [checks.sampling, checks.prefixes, checks.streaming])
def test_the_other_checks_pass(check: Any, engine: checks.Engine) -> None:
    passed, figures = check(engine)
    assert passed and figures["equal"] == figures["texts"] >= 16


def test_a_lost_block_is_noticed(engine: checks.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    release, pools = BlockPool.release, set()

    def forget_one(pool: BlockPool, blocks: list[int]) -> None:
        release(pool, blocks if pool in pools else blocks[1:])
        pools.add(pool)

    monkeypatch.setattr(BlockPool, "release", forget_one)
    passed, figures = checks.prefixes(engine)
    assert not passed and not figures["all_blocks_free"] and figures["equal"] == figures["texts"]


def test_texts_that_part_without_a_near_tie_are_noticed(engine: checks.Engine) -> None:
    llm, prompt = engine.open(), engine.tokens[:9]
    (alone,) = llm.generate([prompt], checks.greedy(8))
    wrong = [*alone.token_ids[:5], (alone.token_ids[5] + 1) % tiny_engine.VOCAB]
    texts = engine.texts()
    texts.add(alone, alone.token_ids)
    texts.add(alone, alone.token_ids[:3], whole=False)
    assert texts.without_cause == 0
    texts.add(alone, wrong, whole=False)
    texts.add(alone, alone.token_ids[:7])
    assert texts.without_cause == 2 and texts.parted == [pytest.approx(checks.top_margin(alone.logprobs[5]))]
    drawn = llm.generate([prompt], params := checks.SamplingParams(max_tokens=6, temperature=0.5, seed=1))[0]
    other = checks.replace(drawn, token_ids=[*drawn.token_ids[:5], (drawn.token_ids[5] + 1) % tiny_engine.VOCAB])
    assert not checks.by_noise(llm, drawn, other, params, 0.05)
    assert checks.by_noise(llm, drawn, other, params, 30.0)
