"""LLM.generate on the CPU: the same text alone, batched, one step behind, and preempted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_engine

from fp8.runtime.llm import LLM, Completion
from fp8.runtime.request import RequestError, SamplingParams

RANDOM = random.Random(3)
PROMPTS = [[RANDOM.randrange(tiny_engine.VOCAB) for _ in range(RANDOM.randint(1, 150))] for _ in range(12)]
PARAMS = [
    SamplingParams(max_tokens=RANDOM.randint(1, 50), temperature=RANDOM.choice([0.0, 0.0, 0.9]), seed=i)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(engine_dir: Path) -> list[Completion]:
    llm = LLM(engine_dir, "cpu")
    return [llm.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("blocks", [None, 5])
def test_batching_lag_and_preemption_do_not_change_the_output(
    engine_dir: Path, alone: list[Completion], lag: int, blocks: int | None
) -> None:
    llm = LLM(engine_dir, "cpu", max_kv_blocks=blocks, lag=lag)
    together = llm.generate(PROMPTS, PARAMS)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks
    assert all(0 <= c.timing.queued <= c.timing.first_token <= c.timing.total for c in together)


def test_preemption_happens_in_the_small_pool(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu", max_kv_blocks=5)
    seen: set[int] = set()
    llm.generate(PROMPTS, PARAMS, progress=lambda r: seen.add(r.preemptions))
    assert max(seen) > 0


def test_a_seed_fixes_the_text_and_another_changes_it(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu")
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=s) for s in (1, 1, 2)]
    a, b, c = llm.generate([[5, 6, 7]] * 3, params)
    assert a.token_ids == b.token_ids != c.token_ids


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_token_ends_the_output_and_is_not_part_of_it(
    engine_dir: Path, alone: list[Completion], lag: int
) -> None:
    index = max(range(len(alone)), key=lambda i: len(alone[i].token_ids))
    tokens = alone[index].token_ids
    stop = tokens[len(tokens) // 2]
    llm = LLM(engine_dir, "cpu", lag=lag)
    (params,) = [PARAMS[index]]
    stopping = SamplingParams(params.max_tokens, params.temperature, params.seed, stop_token_ids=(stop,))
    (cut,) = llm.generate([PROMPTS[index]], stopping)
    assert (cut.token_ids, cut.finish_reason) == (tokens[: tokens.index(stop)], "stop")
    late = SamplingParams(
        params.max_tokens, params.temperature, params.seed, stop_token_ids=(stop,), min_tokens=tokens.index(stop) + 1
    )
    assert len(llm.generate([PROMPTS[index]], late)[0].token_ids) > tokens.index(stop)
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


def test_the_output_ends_at_max_seq_len(engine_dir: Path) -> None:
    (completion,) = LLM(engine_dir, "cpu").generate([[1] * 250], SamplingParams(max_tokens=100))
    assert (len(completion.token_ids), completion.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ("", "prompt 1 is empty"),
        ([1] * 256, "prompt 1 has 256 tokens, and the engine's max_seq_len is 256.*shorten it to 255"),
        ([1, 2, 97], r"prompt 1: token 97 at position 2 is outside the vocabulary \(0 to 96\)"),
        ([-1], "prompt 1: token -1 at position 0"),
        ("text", "prompt 1 is text, and the engine directory holds no tokenizer"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(engine_dir: Path, prompt: list[int] | str, message: str) -> None:
    llm = LLM(engine_dir, "cpu")
    with pytest.raises(RequestError, match=message):
        llm.generate([[1, 2], prompt])
    assert not llm.worker.busy


def test_a_pool_too_small_for_one_request_says_so_and_serves_the_next(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu", max_kv_blocks=2)
    with pytest.raises(RequestError, match="need 4 KV blocks, and the pool has 2"):
        llm.generate([[1, 2], [1] * 200], SamplingParams(max_tokens=10))
    assert llm.worker.pool.free_blocks == 2 and not llm.worker.busy
    assert len(llm.generate([[1, 2]], SamplingParams(max_tokens=10))[0].token_ids) == 10


def test_one_set_of_parameters_or_one_per_prompt(engine_dir: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts and 3 sampling parameters"):
        LLM(engine_dir, "cpu").generate([[1], [2]], [SamplingParams()] * 3)


@pytest.mark.parametrize("lag", [-1, 2])
def test_a_lag_at_which_unread_tokens_would_be_overwritten_is_refused(engine_dir: Path, lag: int) -> None:
    with pytest.raises(RequestError, match=f"lag is {lag}; .* up to 1 steps unread"):
        LLM(engine_dir, "cpu", lag=lag)
