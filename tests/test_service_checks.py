"""The checks of fp8.scripts.gpu_service on a tiny engine, by reference execution; and that they can fail."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import hf_llama
import pytest
import tiny_engine

from fp8.builder.engine import Limits
from fp8.runtime.kv_cache import BlockPool
from fp8.runtime.request import SamplingParams
from fp8.runtime.scheduler import Scheduler
from fp8.scripts.service_checks import beams, load, sampling
from fp8.scripts.service_checks import engine as checks


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> checks.Engine:
    root = tmp_path_factory.mktemp("service")
    directory = tiny_engine.write(root / "engine", limits=Limits(32, 512, 96))
    hf_llama.add_tokenizer(directory)
    source = random.Random(0)
    tokens = [source.randrange(tiny_engine.VOCAB) for _ in range(2000)]
    tiny_engine.twin().save_pretrained(root / "model")
    return checks.Engine("bf16", directory, "cpu", 200, tokens, root / "model", {}, root / "dumps")


def with_requests(engine: checks.Engine, count: int) -> checks.Engine:
    return replace(engine, requests=count)


def test_200_requests_arriving_at_random_give_what_they_give_alone_and_no_block_is_lost(engine: checks.Engine) -> None:
    passed, figures = load.random_arrivals(engine)
    assert passed and figures["equal"] == figures["texts"] == 200
    assert figures["preemptions"] > 20 and figures["reused_tokens"] > 0 and 0 < figures["cancelled"] <= 20


@pytest.mark.parametrize("check", [sampling.sampling, load.prefixes, load.streaming])
def test_the_other_checks_pass(check: Any, engine: checks.Engine) -> None:
    passed, figures = check(engine)
    assert passed and figures["equal"] == figures["texts"] >= 16


def test_beams_beside_others_are_those_of_transformers(engine: checks.Engine) -> None:
    passed, figures = beams.beams(engine)
    assert passed and figures["equal"] == figures["searches"] == figures["beside"]["equal"] == 8, figures
    assert figures["largest_error_of_a_score"] < 1e-4


def test_a_beam_that_takes_its_neighbour_s_blocks_is_noticed(
    engine: checks.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = Scheduler._branch
    monkeypatch.setattr(Scheduler, "_branch", lambda self, search, parents: branch(self, search, parents[::-1]))
    passed, figures = beams.beams(engine)
    assert not passed and figures["largest_error_of_a_score"] > 0.05 and figures["all_blocks_free"]


def test_beams_that_no_noise_explains_are_noticed(engine: checks.Engine) -> None:
    prompt, params = engine.tokens[:20], beams.searching(None)
    found = [beams.as_found(c) for c in engine.open().generate([prompt], params)]
    assert beams.against_transformers(engine, [prompt], [params], [found]) == (0, 0)
    worse = [([*tokens[:-1], (tokens[-1] + 1) % tiny_engine.VOCAB], score - 0.5) for tokens, score in found]
    assert beams.against_transformers(engine, [prompt], [params], [worse]) == (1, 1)


def test_every_option_at_once_gives_the_same_step_after_step(engine: checks.Engine) -> None:
    passed, figures = sampling.options_without_a_wait(engine)
    assert passed and figures["equal"] == figures["rows"] == 16


def test_a_lost_block_is_noticed(engine: checks.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    release, pools = BlockPool.release, set()

    def forget_one(pool: BlockPool, blocks: list[int]) -> None:
        release(pool, blocks if pool in pools else blocks[1:])
        pools.add(pool)

    monkeypatch.setattr(BlockPool, "release", forget_one)
    passed, figures = load.prefixes(engine)
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
    drawn = llm.generate([prompt], params := SamplingParams(max_tokens=6, temperature=0.5, seed=1))[0]
    other = replace(drawn, token_ids=[*drawn.token_ids[:5], (drawn.token_ids[5] + 1) % tiny_engine.VOCAB])
    assert not sampling.by_noise(llm, drawn, other, params, 0.05)
    assert sampling.by_noise(llm, drawn, other, params, 30.0)
