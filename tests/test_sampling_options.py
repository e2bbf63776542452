"""Sampling parameters: against transformers' processors, in any batch, across preemption, and refused where invalid."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import tiny_engine
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8.builder.engine import Limits
from fp8.plugins.sampling import memory
from fp8.runtime.llm import LLM, Completion, sample_seed
from fp8.runtime.logits import keep_likely, keep_near_best, keep_typical
from fp8.runtime.request import Request
from fp8.runtime.sampling_options import History, OptionSampler, options_of
from fp8.runtime.sampling_params import RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.text_stream import TextStream
from fp8.scripts import build
from fp8.scripts.service_checks.sampling import rows_with_every_option, sample_without_a_wait

V, ROWS = 211, 8
LIMITS = Limits(max_batch_size=40, max_seq_len=256, max_num_tokens=96)


def logits(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def row(slot: int, params: SamplingParams, prompt: Sequence[int] = (1,), output: Sequence[int] = ()) -> Row:
    request = Request(slot, list(prompt), params, 100, stop_tokens=frozenset(params.stop_token_ids), slot=slot)
    request.tokens += output
    return Row(request, len(request.tokens) - 1, 1, True, len(output))


def changed(rows: Sequence[Row], raw: torch.Tensor) -> torch.Tensor:
    """The logits that the draw gets to see."""
    options, out = options_of(rows, History()), raw.clone()
    if options is not None:
        OptionSampler(LIMITS, raw.device).sample(options, out, lambda x: x.argmax(1).int())
    return out


TEXTS = [([5, 6, 7, 5], [9, 9, 9, 5, 30]), ([1], []), (list(range(60)), [200] * 20)] + [([8, 8], [8, 3])] * 5

MIXED: list[dict[str, Any]] = [
    {}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.02}, {"typical_p": 0.7}, {"repetition_penalty": 1.4},
    {"presence_penalty": -0.9}, {"frequency_penalty": 1.5}, {"logit_bias": {4: 9.0, 9: -100}}, {"logprobs": 3},
    {"stop_token_ids": [8, 11, 30], "min_tokens": 9}, {"temperature": 0.3}, {"temperature": 0.0}, {"stop": ["0", "aB"]},
    {"top_p": 0.8, "repetition_penalty": 1.4, "logprobs": 0},
    {
        "temperature": 1.4, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {3: 2.5, 90: -7}, "stop_token_ids": [4],
        "min_tokens": 7, "logprobs": 2, "logprob_token_ids": [7],
    },
]  # fmt: skip


def test_a_row_comes_out_the_same_to_the_bit_in_any_batch() -> None:
    wanted = [SamplingParams(**{"temperature": 0.9, **MIXED[i % len(MIXED)]}) for i in range(32)]
    rows, raw = [row(i, p, *TEXTS[i % 8]) for i, p in enumerate(wanted)], logits(1, 32)
    together = changed(rows, raw)
    for i in range(32):
        assert torch.equal(changed([rows[i]], raw[i : i + 1])[0], together[i]), wanted[i]
    assert torch.equal(together[0], raw[0]), "a row that asks for nothing is not touched"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_option_waits_for_the_device() -> None:
    rows = rows_with_every_option(TEXTS)
    drawn, expected = (sample_without_a_wait(rows, LIMITS, logits().to(device)) for device in ("cuda", "cpu"))
    assert torch.equal(drawn.tokens.cpu(), expected.tokens)


@pytest.mark.parametrize("extreme", [{"temperature": 1e-6}, {"repetition_penalty": 1e-6}, {"repetition_penalty": 1e6}])
@pytest.mark.parametrize("wanted", [{"top_p": 0.9}, {"min_p": 0.1, "typical_p": 0.9}, {"top_k": 3}])
def test_the_extremes_leave_numbers(extreme: dict[str, Any], wanted: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **extreme, **wanted})
    out = changed([row(i, params, *text) for i, text in enumerate(TEXTS)], 1000 * logits())
    assert not out.isnan().any() and (out > -torch.inf).any(1).all() and not (out == torch.inf).any()
    if "temperature" in extreme:
        assert torch.equal(out.argmax(1), logits().argmax(1))


def test_rows_without_numbers_do_no_harm() -> None:
    bad = torch.full((2, V), -torch.inf)
    one = torch.ones(2)
    assert keep_likely(bad, one.long(), 0.5 * one).isinf().all()
    assert keep_near_best(bad, 0.1 * one).isinf().all() and keep_typical(bad, 0.5 * one).isinf().all()


# --- through the whole runtime ---


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine.write(tmp_path_factory.mktemp("tiny"), limits=Limits(32, 256, 96))
    hf_llama.add_tokenizer(directory)
    return directory


PROMPTS = [[(7 * i + j) % tiny_engine.VOCAB for j in range(3 + 11 * (i % 9))] for i in range(32)]
PARAMS = [
    SamplingParams(**{"max_tokens": 34 + i, "temperature": 0.9, "seed": i, **MIXED[i % len(MIXED)]}) for i in range(32)
]


@pytest.fixture(scope="module")
def alone(engine_dir: Path) -> list[Completion]:
    llm = LLM(engine_dir, "cpu", lag=0)
    return [llm.generate([prompt], params)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize(("lag", "blocks"), [(0, None), (1, None), (1, 5)])
def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch_of_32(
    engine_dir: Path, alone: list[Completion], lag: int, blocks: int | None
) -> None:
    preempted: set[int] = set()
    llm = LLM(engine_dir, "cpu", max_kv_blocks=blocks, lag=lag)
    together = llm.generate(PROMPTS, PARAMS, progress=lambda r: preempted.add(r.preemptions))
    assert (max(preempted) > 0) == (blocks is not None)
    assert blocks or max(s.decode_rows for s in llm.worker.statistics.steps) == 32
    for found, expected, params in zip(together, alone, PARAMS, strict=True):
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text), params
    assert {c.finish_reason for c in together} == {"stop", "length"}
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


def test_min_tokens_without_any_stop_token_is_nothing_to_do(engine_dir: Path) -> None:
    params = [SamplingParams(max_tokens=6), SamplingParams(max_tokens=6, min_tokens=5, ignore_eos=True)]
    plain, lengthened = LLM(engine_dir, "cpu").generate([[1, 2]] * 2, params)
    assert plain.token_ids == lengthened.token_ids


def test_a_frequency_penalty_forbids_repeats(engine_dir: Path) -> None:
    params = SamplingParams(max_tokens=40, logit_bias={5: 100.0, 6: 99.0}, frequency_penalty=2.0)
    (completion,) = LLM(engine_dir, "cpu", lag=1).generate([[5, 6]], params)
    counts = Counter(completion.token_ids)
    assert abs(counts[5] - counts[6]) <= 15 and counts[6] > 0, "5 falls behind 6 again and again"


def test_logprobs_are_the_model_s_own(engine_dir: Path) -> None:
    params = SamplingParams(
        max_tokens=9, temperature=1.2, seed=3, top_k=4, repetition_penalty=1.5, logprobs=5, prompt_logprobs=2
    )
    llm = LLM(engine_dir, "cpu", lag=1)
    prompt = PROMPTS[8]
    (completion,) = llm.generate([prompt], params)
    tokens = prompt + completion.token_ids
    request = Request(0, tokens, SamplingParams(), 1, blocks=[0, 1], slot=0)
    chunks = [
        llm.session.token_logits([Row(request, a, b - a, False, 0)]).clone() for a, b in ((0, 90), (90, len(tokens)))
    ]
    expected = torch.cat(chunks).log_softmax(1)
    assert completion.prompt_logprobs is not None and completion.prompt_logprobs[0] is None
    entries = [*completion.prompt_logprobs[1:], *(completion.logprobs or [])]
    assert [e.token for e in entries if e] == tokens[1:]
    for at, entry in enumerate(entries):
        assert entry is not None and len(entry.top) == (2 if at < len(prompt) - 1 else 5)
        assert entry.logprob == pytest.approx(float(expected[at, entry.token]), abs=1e-3)
        assert [v for _, v in entry.top] == pytest.approx(expected[at].topk(len(entry.top)).values.tolist(), abs=1e-3)


def test_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    model = hf_llama.make(tmp_path / "model", torch.bfloat16)
    limits = ["--max_batch_size", "2", "--max_seq_len", "96", "--max_num_tokens", "40", "--log_level", "error"]
    where = ["--checkpoint_dir", str(tmp_path / "model"), "--output_dir", str(tmp_path / "engine"), "--target", "cpu"]
    assert build.main([*where, *limits]) == 0
    prompt = [(11 * i) % 300 for i in range(60)]
    params = SamplingParams(
        max_tokens=12, ignore_eos=True, top_k=3, temperature=0.8, seed=1, logprobs=0, prompt_logprobs=0
    )
    (completion,) = LLM(tmp_path / "engine", "cpu").generate([prompt], params)
    tokens = [*prompt, *completion.token_ids]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].float().log_softmax(1)
    entries = [*(completion.prompt_logprobs or [])[1:], *(completion.logprobs or [])]
    assert len(entries) == len(tokens) - 1
    found = torch.tensor([entry.logprob for entry in entries if entry])
    error = found - expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert error.abs().max() < 0.2 and error.square().mean().sqrt() < 0.05, "as far as activations in bf16 go"


def test_n_samples_differ_and_the_first_is_that_of_one(engine_dir: Path) -> None:
    llm = LLM(engine_dir, "cpu")
    many = llm.generate([[1, 2], [3]], SamplingParams(temperature=1.0, seed=4, n=3))
    assert [c.index for c in many] == [0, 1, 2, 0, 1, 2] and [len(c.prompt) for c in many] == [2] * 3 + [1] * 3
    assert len({tuple(c.token_ids) for c in many[:3]}) == 3
    assert many[3].token_ids == llm.generate([[3]], SamplingParams(temperature=1.0, seed=4))[0].token_ids
    assert -(2**63) <= sample_seed(2**63 - 1, 5) < 2**63


@pytest.mark.parametrize("lag", [0, 1])
def test_the_text_ends_before_a_stop_string_that_spans_tokens(engine_dir: Path, lag: int) -> None:
    llm = LLM(engine_dir, "cpu", lag=lag)
    (whole,) = llm.generate([[9, 8]], SamplingParams(max_tokens=30, temperature=0.9, seed=2))
    assert whole.text and len(whole.text) > 12
    stop = whole.text[8:11]
    (cut,) = llm.generate([[9, 8]], SamplingParams(max_tokens=30, temperature=0.9, seed=2, stop=["no such text", stop]))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop) and len(cut.token_ids) < 30


class Pieces:
    """A tokenizer of byte strings that drops the space before a text's first word, as SentencePiece does."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[t] for t in tokens).decode("utf-8", "replace").removeprefix(" ")


def test_text_grows_token_by_token_to_what_decoding_all_gives() -> None:
    tokenizer = Pieces(b" a", b" bc", b"\xe2\x82", b"\xac", b" d")
    tokens = [0, 1, 2, 3, 4, 4, 1]
    stream = TextStream(tokenizer)
    seen = list(accumulate(stream.add([t]) for t in tokens))
    assert seen == ["a", "a bc", "a bc", "a bc\u20ac", "a bc\u20ac d", "a bc\u20ac d d", tokenizer.decode(tokens)]


def test_the_earliest_stop_string_counts_and_none_before_min_tokens() -> None:
    stream = TextStream(Pieces(b"ab", b"cd", b"ef"), ["cde", "bc", "abc"])
    assert stream.add([0]) == "" and stream.found is None
    assert stream.add([1, 2]) == stream.finish() == stream.text == "" and stream.found == "abc"
    late = TextStream(Pieces(b"ab", b"cd", b"ef"), ["bc"], min_tokens=2)
    assert (late.add([0, 1, 0]), late.found) == ("abcda", None)
    assert late.add([1]) == "" and (late.found, late.text) == ("bc", "abcda")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": -1}, r"top_k is -1; it must be an integer, at least 0 \(0 keeps"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be at least 0 and at most 1"),
        ({"typical_p": 0}, "typical_p is 0; it must be above 0"),
        ({"temperature": "hot"}, r"temperature is 'hot'; it must be at least 0 and at most 1e\+06 \(0 is greedy"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0 \\(greedy\\) or at least 1e-06"),
        ({"temperature": 1e300}, "temperature is 1e.300; it must be at least 0 and at most"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; it must be at least 1e-06 and at most 1e\+06"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 3}, "presence_penalty is 3; it must be at least -2 and at most 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is 101; it must be at least -100 and at most 100"),
        ({"logit_bias": {-3: 1}}, "a token id of logit_bias is -3"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\]; it must map"),
        ({"stop": "end"}, "stop is 'end'; it must be a list"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
        ({"n": 0}, "n is 0; it must be an integer, at least 1"),
        ({"n": 2}, "n is 2 and temperature 0"),
        ({"logprobs": 21}, "logprobs is 21; it must be an integer, from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_an_invalid_value_is_refused_with_its_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit_bias": {97: 1.0}}, r"prompt 0: logit_bias holds token 97, outside the vocabulary \(0 to 96\)"),
        ({"stop_token_ids": [400]}, "stop_token_ids holds token 400"),
        ({"stop": ["x"]}, "no tokenizer; give stop_token_ids"),
    ],
)
def test_what_the_engine_does_not_have_is_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    llm = LLM(tiny_engine.write(tmp_path), "cpu")
    with pytest.raises(RequestError, match=message):
        llm.generate([[1]], SamplingParams(**wrong))
    assert not llm.worker.busy


# --- memory ---


class Peak(TorchDispatchMode):
    """The most bytes at a time of tensors that are made within, with what torch's sort takes beside them on a GPU:
    places and values, and copies of both for the radix sort; places once more."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._held = 0, Counter[tuple[int, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not (args and t is args[0]):
                storage = t.untyped_storage()
                key = (storage.data_ptr(), storage.nbytes())
                self._held[key] += 1
                weakref.finalize(t, self._held.subtract, [key])
        scratch = args[0].numel() * (24 + 2 * args[0].itemsize) if "sort" in str(func) else 0
        self.most = max(self.most, scratch + sum(size for (_, size), holders in self._held.items() if holders > 0))
        return out


@pytest.mark.parametrize(("vocabulary", "length"), [(4096, 256), (512, 4096)])
@pytest.mark.parametrize("group", [1 << 20, 1 << 40])
def test_options_take_no_more_memory_than_the_budget_has_for_them(
    vocabulary: int, length: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GROUP", group)
    limits = Limits(32, length, 64)
    rows = rows_with_every_option([([1] * (length // 2), [2] * (length // 2 - 1))] * 32)
    options, raw = options_of(rows, History()), torch.randn(32, vocabulary)
    assert options is not None
    with Peak() as peak:
        OptionSampler(limits, raw.device).sample(options, raw, lambda x: x.argmax(1).int())
    budget = memory.option_bytes(32, length, vocabulary, 32)
    assert budget / 2 < peak.most <= budget


def test_rows_in_groups_come_out_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, SamplingParams(**{"temperature": 0.9, **MIXED[i % 16]}), *TEXTS[i % 8]) for i in range(32)]
    expected = changed(rows, logits(1, 32))
    monkeypatch.setattr(memory, "GROUP", 5 * memory.TYPICAL * V)
    assert memory.group_rows(memory.TYPICAL * V) == 5
    assert torch.equal(changed(rows, logits(1, 32)), expected)
