"""Beam search: the outputs and scores of transformers' generate, whatever runs beside it; what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import tiny_engine
import torch

from fp8.builder.engine import Limits
from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM, Completion
from fp8.runtime.request import RequestError, SamplingParams

LIMITS = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96)
PROMPTS = [[(13 * i + 5 * j * j + j) % 97 for j in range(length)] for i, length in enumerate((3, 58, 64, 1, 120, 63))]
STOPS = (5, 17, 60, 80)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"), limits=LIMITS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_engine.twin()


def theirs(model: Any, prompt: list[int], p: SamplingParams) -> list[tuple[list[int], float]]:
    """(output with its stop token, score) of transformers, best first."""
    bias = {"sequence_bias": {(t,): float(b) for t, b in p.logit_bias.items()}} if p.logit_bias else {}
    stops = list(p.stop_token_ids)
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            num_beams=p.beam_width, num_return_sequences=p.n, max_new_tokens=p.max_tokens, min_new_tokens=p.min_tokens,
            length_penalty=p.length_penalty, early_stopping=p.early_stopping, eos_token_id=stops or None,
            pad_token_id=0, repetition_penalty=p.repetition_penalty, return_dict_in_generate=True, output_scores=True,
            **bias,
        )  # fmt: skip
    outputs = []
    for tokens, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        output = tokens[len(prompt) :]
        end = next((i + 1 for i, t in enumerate(output) if t in stops and i >= p.min_tokens), len(output))
        outputs.append((output[:end], score))
    return outputs


def ours(completion: Completion, p: SamplingParams) -> tuple[list[int], float]:
    stopped = completion.finish_reason == "stop"
    assert isinstance(completion.stop_reason, int) == stopped and completion.cumulative_logprob is not None
    tokens = [*completion.token_ids, completion.stop_reason] if stopped else completion.token_ids
    return tokens, completion.cumulative_logprob / len(tokens) ** p.length_penalty


def check(model: Any, prompts: list[list[int]], params: list[SamplingParams], found: list[Completion]) -> None:
    rest = iter(found)
    for prompt, p in zip(prompts, params, strict=True):
        expected = theirs(model, prompt, p)
        mine = [ours(next(rest), p) for _ in range(p.n)]
        assert [score for _, score in mine] == pytest.approx([score for _, score in expected], 1e-4, 1e-3), p
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in expected], p
    assert next(rest, None) is None


CASES = [
    {"beam_width": width, "n": width, "length_penalty": penalty, "early_stopping": early, "stop_token_ids": stops}
    for width, stops in ((2, STOPS), (4, STOPS[:1]), (8, STOPS[:2]), (3, ()))
    for penalty in (1.0, 0.0, 2.0, -1.0)
    for early in (True, False, "never")
]


@pytest.mark.parametrize("early", [True, False, "never"])
def test_outputs_and_scores_are_those_of_transformers(engine_dir: Path, model: Any, early: bool | str) -> None:
    params = [SamplingParams(max_tokens=14, **c) for c in CASES if c["early_stopping"] is early]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    found = LLM(engine_dir, "cpu").generate(prompts, params)
    check(model, prompts, params, found)
    assert {c.finish_reason for c in found} == {"stop", "length"}


def test_bias_penalty_and_min_tokens_act_on_the_log_probabilities(engine_dir: Path, model: Any) -> None:
    llm, prompts = LLM(engine_dir, "cpu"), PROMPTS[:5]
    plain = llm.generate(prompts, SamplingParams(max_tokens=12, beam_width=4))
    common = [c.token_ids[3] for c in plain]  # what would come early
    wanted: list[dict[str, Any]] = [
        {"logit_bias": {common[0]: -20.0, 17: 15.0}}, {"repetition_penalty": 2.5}, {"repetition_penalty": 0.4},
        {"min_tokens": 6}, {"min_tokens": 9, "repetition_penalty": 1.8, "logit_bias": {5: 12.0}},
    ]  # fmt: skip
    params = [
        SamplingParams(max_tokens=12, beam_width=4, n=2, stop_token_ids=(stop, 5), **w)
        for stop, w in zip(common, wanted, strict=True)
    ]
    found = llm.generate(prompts, params)
    check(model, prompts, params, found)
    assert not any(a.token_ids == b.token_ids for a, b in zip(found[::2], plain, strict=True))


@pytest.mark.parametrize(
    ("lag", "reuse", "policy"), [(0, True, "throughput"), (1, True, "fair"), (1, False, "throughput")]
)
def test_beams_run_beside_others_and_give_way(engine_dir: Path, model: Any, lag: int, reuse: bool, policy: str) -> None:
    params: list[SamplingParams] = []
    for i in range(24):
        beams = (
            {"beam_width": 2 + i // 2 % 2, "n": 2, "stop_token_ids": STOPS[3:]}
            if i % 2
            else {"temperature": 0.8, "seed": i}
        )
        params.append(SamplingParams(max_tokens=70, **beams))  # type: ignore[arg-type]
    prompts = [PROMPTS[(i // 2) % len(PROMPTS)] for i in range(24)]
    llm = LLM(engine_dir, "cpu", max_kv_blocks=10, lag=lag, reuse_prefixes=reuse, policy=policy)
    found = llm.generate(prompts, params)
    assert llm.worker.statistics.preemptions > 0
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks
    alone = LLM(engine_dir, "cpu").generate(prompts[::2], params[::2])
    at = [sum(p.n for p in params[:i]) for i in range(24)]
    assert [found[at[i]].token_ids for i in range(0, 24, 2)] == [c.token_ids for c in alone]
    beams = [c for i in range(1, 24, 2) for c in found[at[i] : at[i] + 2]]
    check(model, prompts[1::2], params[1::2], beams)
    assert all(0 <= c.timing.queued <= c.timing.first_token <= c.timing.total for c in found)
    assert llm.worker.statistics.finished.total() == 24


def test_cancelled_beams_free_all_their_blocks_and_a_failing_step_ends_them(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(engine_dir, "cpu", lag=1)
    request = llm.request(PROMPTS[1], SamplingParams(max_tokens=40, beam_width=6))
    llm.worker.submit(request)
    for _ in range(20):
        llm.worker.step()
    assert len(llm.worker.scheduler.running) == 6 and len({b for r in request.beams for b in r.blocks}) > 6
    llm.worker.cancel(request)
    while llm.worker.busy:
        llm.worker.step()
    assert request.finish_reason == "abort" and llm.worker.pool.free_blocks == llm.worker.pool.num_blocks
    with monkeypatch.context() as patch:
        patch.setattr(llm.session, "read", lambda ticket: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate([PROMPTS[0]], SamplingParams(beam_width=3))
    llm = LLM(engine_dir, "cpu", lag=1)
    other = llm.request(PROMPTS[1], SamplingParams(max_tokens=40, beam_width=6))
    llm.worker.submit(other)
    for _ in range(20):
        llm.worker.step()
    assert llm.worker.drop_all() == [other] and llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


def test_prompt_logprobs_and_texts_come_with_beams(tmp_path: Path) -> None:
    directory = tiny_engine.write(tmp_path)
    hf_llama.add_tokenizer(directory)
    llm = LLM(directory, "cpu")
    a, b = llm.generate(["AB!cd"], SamplingParams(max_tokens=5, beam_width=3, n=2, prompt_logprobs=1))
    (plain,) = llm.generate(["AB!cd"], SamplingParams(max_tokens=1, prompt_logprobs=1, logprobs=0))
    assert a.prompt_logprobs == b.prompt_logprobs == plain.prompt_logprobs
    assert plain.logprobs and plain.cumulative_logprob == plain.logprobs[0].logprob
    assert (a.index, b.index) == (0, 1) and a.text != b.text and a.text and b.text


WRONG = [
    ({"beam_width": 0}, r"beam_width is 0; it must be an integer, at least 1 \(1 is no beam search\)"),
    ({"beam_width": 2, "temperature": 0.5}, "temperature is 0.5 and beam_width 2; beam search draws nothing"),
    ({"beam_width": 2, "seed": 1}, "seed is 1 and beam_width 2"),
    ({"beam_width": 2, "top_p": 0.9}, "top_p is 0.9 and beam_width 2"),
    ({"beam_width": 2, "top_k": 5}, "top_k is 5"),
    ({"beam_width": 2, "min_p": 0.1}, "min_p is 0.1"),
    ({"beam_width": 2, "typical_p": 0.1}, "typical_p is 0.1"),
    ({"beam_width": 2, "stop": ["x"]}, r"stop is \('x',\) and beam_width 2"),
    ({"beam_width": 2, "logprobs": 0}, "logprobs is 0 and beam_width 2"),
    ({"beam_width": 2, "n": 3}, "n is 3 and beam_width 2"),
    ({"length_penalty": 11}, "length_penalty is 11; it must be at least -10 and at most 10"),
    ({"length_penalty": float("nan")}, "length_penalty is nan"),
    ({"early_stopping": "always"}, "early_stopping is 'always'; it must be True, False or \"never\""),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_makes_no_sense_with_beams_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wrong)


def test_what_the_engine_cannot_do_is_refused(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu", max_kv_blocks=6)
    with pytest.raises(RequestError, match="beam_width is 9, and the engine's max_batch_size is 8"):
        llm.generate([[1]], SamplingParams(beam_width=9))
    with pytest.raises(RequestError, match="compares 104 candidates, and the vocabulary has 97 tokens"):
        llm.generate([[1]], SamplingParams(beam_width=8, stop_token_ids=tuple(range(12))))
    with pytest.raises(
        RequestError, match="60 prompt and 20 output tokens of 4 beams need 8 KV blocks, and the pool has 6"
    ):
        llm.generate([[1] * 60], SamplingParams(beam_width=4, max_tokens=20))
    with pytest.raises(RequestError, match="which beam wins is known at the end"):
        llm.stream([1], SamplingParams(beam_width=2))
    with pytest.raises(RequestError, match="which beam wins is known at the end"):
        asyncio.run(anext(AsyncLLM(llm).generate([1], SamplingParams(beam_width=2))))  # type: ignore[arg-type]
    assert not llm.worker.busy
