"""Log-probabilities of given tokens through the scheduler, against one pass of the whole sequence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny_engine
import torch

from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.scoring import score_continuations
from fp8.runtime.session import Session


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = tiny_engine.Limits(max_batch_size=4, max_seq_len=256, max_num_tokens=96)
    return tiny_engine.write(tmp_path_factory.mktemp("engine"), limits=limits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Session:
    limits = tiny_engine.Limits(max_batch_size=1, max_seq_len=256, max_num_tokens=256)
    return Session(tiny_engine.write(tmp_path_factory.mktemp("whole"), limits=limits), "cpu")


def log_p(session: Session, tokens: list[int]) -> torch.Tensor:
    """ln p f32 [n, V] after each token."""
    request = Request(0, tokens, SamplingParams(), 1, blocks=[0, 1, 2, 3], slot=0)
    return session.token_logits([Row(request, 0, len(tokens), True, 0)]).log_softmax(1)


def tokens(count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(tiny_engine.VOCAB) for _ in range(count)]


def likeliest(session: Session, context: list[int], count: int) -> list[int]:
    out: list[int] = []
    for _ in range(count):
        out.append(int(log_p(session, context + out)[-1].argmax()))
    return out


def test_continuations_are_scored_as_in_one_pass(engine: Path, whole: Session) -> None:
    """Of one and of several tokens, after long prefixes that they share, more of them than run at once."""
    shared = tokens(130, 0)
    contexts = [shared + tokens(n, n) for n in (1, 2, 20, 62)] + [tokens(1, 9), tokens(200, 8)]
    pairs = [(c, tokens(n, 10 * i + n)) for i, c in enumerate(contexts) for n in (1, 1, 2, 5, 40)]
    pairs += [(c, likeliest(whole, c, 4)) for c in contexts]
    pairs += [(contexts[0], [t]) for t in range(30)]
    done: list[int] = []
    llm = LLM(engine, "cpu")
    scores = score_continuations(llm, pairs, done.append)
    assert sum(done) == len(pairs) == len(scores)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        expected = log_p(whole, [*context, *continuation])[len(context) - 1 : -1]
        found = expected.gather(1, torch.tensor(continuation)[:, None])
        assert score.logprob == pytest.approx(found.sum().item(), abs=1e-3)
        assert score.greedy == (expected.argmax(1).tolist() == continuation)
    assert sum(score.greedy for score in scores) >= len(contexts)
    assert llm.worker.scheduler.reused_tokens > 1000, "prefixes are shared"
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


def test_one_token_choices_cost_one_pass(engine: Path) -> None:
    llm = LLM(engine, "cpu")
    score_continuations(llm, [(tokens(20, 1), [t]) for t in range(50)])
    assert llm.worker.statistics.prompt_tokens == 20


def test_scoring_survives_preemption(engine: Path) -> None:
    """A pool that holds fewer sequences than the batch, so that some are computed twice."""
    pairs = [(tokens(60, i), tokens(70, 50 + i)) for i in range(6)]
    ample, tight = (LLM(engine, "cpu", max_kv_blocks=n) for n in (16, 4))
    for a, b in zip(score_continuations(ample, pairs), score_continuations(tight, pairs), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_the_longest_sequence_has_max_seq_len_tokens(engine: Path, whole: Session) -> None:
    llm = LLM(engine, "cpu")
    sequence = tokens(256, 3)
    (score,) = score_continuations(llm, [(sequence[:200], sequence[200:])])
    expected = log_p(whole, sequence[:-1])[199:].gather(1, torch.tensor(sequence[200:])[:, None])
    assert score.logprob == pytest.approx(expected.sum().item(), abs=2e-3)
    with pytest.raises(RequestError, match="max_seq_len is 256"):
        score_continuations(llm, [(sequence, [1])])


def test_prompt_logprobs_begin_where_asked(engine: Path, whole: Session) -> None:
    prompt = tokens(150, 4)
    llm = LLM(engine, "cpu")
    llm.generate([prompt], SamplingParams(max_tokens=1))
    params = SamplingParams(max_tokens=1, prompt_logprobs=2, prompt_logprobs_start=140)
    (completion,) = llm.generate([prompt], params)
    entries = completion.prompt_logprobs
    assert entries is not None and len(entries) == 150 and entries[:140] == [None] * 140
    expected = log_p(whole, prompt)[139:-1]
    for entry, row, token in zip(entries[140:], expected, prompt[140:], strict=True):
        assert (
            entry is not None and entry.token == token and entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        )
        assert [t for t, _ in entry.top] == row.topk(2).indices.tolist()
    assert llm.worker.scheduler.reused_tokens == 128, "the prefix before it is shared"


def test_log_probabilities_of_tokens_asked_about(engine: Path, whole: Session) -> None:
    prompts = [tokens(5, 6), tokens(9, 7)]
    params = [
        SamplingParams(max_tokens=2, logprobs=3, logprob_token_ids=(5, 0, 96)),
        SamplingParams(max_tokens=1, logprobs=0, logprob_token_ids=(7,)),
    ]
    for prompt, p, completion in zip(prompts, params, LLM(engine, "cpu").generate(prompts, params), strict=True):
        assert completion.logprobs is not None
        row = log_p(whole, prompt)[-1]
        first = completion.logprobs[0]
        assert [t for t, _ in first.asked] == list(p.logprob_token_ids) and len(first.top) == p.logprobs
        assert [v for _, v in first.asked] == pytest.approx([row[t].item() for t in p.logprob_token_ids], abs=1e-3)
        assert all(len(entry.asked) == len(p.logprob_token_ids) for entry in completion.logprobs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"prompt_logprobs": 0, "prompt_logprobs_start": 0}, "prompt_logprobs_start is 0"),
        ({"logprob_token_ids": (1,)}, "set logprobs"),
        ({"logprobs": 0, "logprob_token_ids": (-1,)}, "logprob_token_ids is -1"),
        ({"logprobs": 0, "logprob_token_ids": 7}, "logprob_token_ids is 7; it must be a list"),
    ],
)
def test_bad_values_are_refused(params: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)


def test_tokens_asked_about_must_be_in_the_vocabulary(engine: Path) -> None:
    with pytest.raises(RequestError, match="logprob_token_ids holds token 97"):
        LLM(engine, "cpu").generate([[1]], SamplingParams(logprobs=0, logprob_token_ids=(97,)))
    with pytest.raises(RequestError, match="continuation 0"):
        score_continuations(LLM(engine, "cpu"), [([1], [])])
