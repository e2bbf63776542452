"""What tokens are drawn from, for every sampling option and combinations of them: the distribution that transformers'
`generate` comes to, that of a plain torch implementation, and draws counted against it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hf_llama
import pytest
import tiny_engine
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from fp8.builder.engine import Limits
from fp8.plugins.sampling.reference import sample
from fp8.runtime.llm import LLM
from fp8.runtime.request import Request
from fp8.runtime.sampling_options import History, OptionSampler, options_of
from fp8.runtime.sampling_params import SamplingParams
from fp8.runtime.scheduler import Row

V = tiny_engine.VOCAB
TEXTS = [([5, 6, 7, 5], [9, 9, 9, 5, 30]), ([1], []), (list(range(60)), [90] * 20), ([8, 4], [8, 3])]
VALUES: dict[str, list[Any]] = {
    "temperature": [0.4, 1.0, 1.8],
    "top_k": [1, 12, 500],
    "top_p": [0.001, 0.5, 0.9],
    "min_p": [0.02, 0.3, 1.0],
    "typical_p": [0.05, 0.4, 0.9],
    "repetition_penalty": [0.7, 1.3],
    "presence_penalty": [-0.8, 1.5],
    "frequency_penalty": [-0.4, 0.6],
    "logit_bias": [{3: 2.5, 90: -7.0, 11: -100.0}, {5: 1.5, 9: 4.0}],
    "min_tokens": [3, 50],
}
STOPS = (4, 9, 31)  # 9 is likely where it is biased


def combinations(count: int) -> list[dict[str, Any]]:
    """Each with about half of all options, mild values, so that something is left to draw from."""
    source = random.Random(0)
    mild = {**VALUES, "top_k": [12, 40], "top_p": [0.7, 0.95], "min_p": [0.005, 0.02], "typical_p": [0.6, 0.95]}
    return [{k: source.choice(v) for k, v in mild.items() if source.random() < 0.5} for _ in range(count)]


CASES = [{name: value} for name, values in VALUES.items() for value in values] + combinations(24)
CASES.append({name: values[-1] for name, values in VALUES.items()})
CASES.append({"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "min_tokens": 20})


def params(wanted: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=100, stop_token_ids=STOPS, **{"temperature": 1.0, **wanted})


def drawn_from(p: SamplingParams, texts: Sequence[tuple[list[int], list[int]]], raw: torch.Tensor) -> torch.Tensor:
    """The logits f32 [texts, V] that the sampling kernel gets to see."""
    rows = []
    for slot, (prompt, output) in enumerate(texts):
        request = Request(slot, list(prompt), p, 100, stop_tokens=frozenset(p.stop_token_ids), slot=slot)
        request.tokens += output
        rows.append(Row(request, len(request.tokens) - 1, 1, True, len(output)))
    options, changed = options_of(rows, History()), raw.clone()
    if options is not None:
        OptionSampler(Limits(8, 256, 96), raw.device).sample(options, changed, lambda x: x.argmax(1).int())
    return changed


def plain(logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], p: SamplingParams) -> torch.Tensor:
    """Probabilities f64 [V] by what SamplingParams says, with nothing in mind but being right."""
    scores = logits.double().clone()
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *output}:
        scores[token] *= p.repetition_penalty if scores[token] < 0 else 1 / p.repetition_penalty
    for token, count in Counter(output).items():
        scores[token] -= p.presence_penalty + p.frequency_penalty * count
    if len(output) < p.min_tokens:
        scores[list(p.stop_token_ids)] = -torch.inf
    probability = (scores / p.temperature).softmax(0)
    likeliest = probability.argsort(descending=True)
    if p.top_k:
        probability[likeliest[p.top_k :]] = 0
    probability /= probability.sum()
    if p.top_p < 1:
        probability = fewest(probability, likeliest, p.top_p)
    probability[probability < p.min_p * probability.max()] = 0
    probability /= probability.sum()
    if p.typical_p < 1:
        information = torch.where(probability > 0, -probability.log(), torch.inf)
        entropy = (probability * information).nansum()
        probability = fewest(probability, (information - entropy).abs().argsort(), p.typical_p)
    return probability


def fewest(probability: torch.Tensor, order: torch.Tensor, share: float) -> torch.Tensor:
    """The first in `order` that reach `share` together, to the sum of 1."""
    before = probability[order].cumsum(0) - probability[order]
    kept = probability.clone()
    kept[order[before >= share]] = 0
    return kept / kept.sum()


@pytest.fixture(scope="module")
def model() -> Any:
    """With milder logits than it was made with: there is something to draw."""
    model = tiny_engine.twin()
    model.lm_head.weight.data *= 0.3
    return model


def of_transformers(model: Any, tokens: list[int], output: int, p: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, what `generate` makes of them before it draws) f32 [1, V] each; `output` tokens are there already."""
    bias = {(t,): float(b) for t, b in p.logit_bias.items()}
    found = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64), do_sample=True,
        max_new_tokens=100 if output < p.min_tokens else 1, min_new_tokens=max(0, p.min_tokens - output),
        temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p or None, typical_p=p.typical_p,
        repetition_penalty=p.repetition_penalty, eos_token_id=list(p.stop_token_ids), pad_token_id=0,
        sequence_bias=bias or None, return_dict_in_generate=True, output_scores=True, output_logits=True,
        stopping_criteria=[lambda *_: torch.ones(1, dtype=torch.bool)],
    )  # fmt: skip
    return found.logits[0], found.scores[0]


@pytest.mark.parametrize("wanted", CASES, ids=str)
def test_the_distribution_is_that_of_transformers(model: Any, wanted: dict[str, Any]) -> None:
    wanted = {k: v for k, v in wanted.items() if k not in ("presence_penalty", "frequency_penalty")}  # has none
    p = params(wanted)
    for prompt, output in TEXTS:
        raw, scores = of_transformers(model, [*prompt, *output], len(output), p)
        ours = (drawn_from(p, [(prompt, output)], raw) / p.temperature).softmax(1)
        torch.testing.assert_close(ours, scores.softmax(1), rtol=1e-4, atol=1e-6)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wanted", CASES, ids=str)
def test_the_distribution_is_that_of_plain_torch_and_draws_follow_it(wanted: dict[str, Any]) -> None:
    """Half of the draws with a seed each, half as successive tokens of one seed."""
    p, raw, draws = params(wanted), logits(len(TEXTS)), 4000
    changed = drawn_from(p, TEXTS, raw)
    for i, (prompt, output) in enumerate(TEXTS):
        expected = plain(raw[i], prompt, output, p)
        ours = (changed[i].double() / p.temperature).softmax(0)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    many, one, steps = 7919 * torch.arange(draws), torch.full((draws,), 5), torch.arange(draws, dtype=torch.int32)
    hot = torch.full((draws,), p.temperature)
    for seeds, counters in ((many, torch.full_like(steps, len(TEXTS[0][1]))), (one, steps)):
        tokens = sample(changed[:1].expand(draws, -1), hot, seeds, counters)
        assert likely_enough(tokens.tolist(), plain(raw[0], *TEXTS[0], p))


def likely_enough(tokens: Sequence[int], probability: torch.Tensor) -> bool:
    """A chi-square test at 1e-5, with the tokens that are to come fewer than five times as one."""
    seen, expected = torch.bincount(torch.tensor(tokens), minlength=V).double(), len(tokens) * probability
    if seen[expected == 0].any():
        return False
    rare = expected < 5
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    chi_square, freedom = ((seen - expected) ** 2 / expected).sum(), len(expected) - 1
    return freedom == 0 or float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), chi_square / 2)) > 1e-5


def test_a_wrong_distribution_is_noticed() -> None:
    probability = logits(1)[0].double().softmax(0)
    tokens = torch.multinomial(probability, 4000, True, generator=torch.Generator().manual_seed(0)).tolist()
    assert likely_enough(tokens, probability)
    most = int(probability.argmax())
    for wrong in ({"temperature": 1.1}, {"top_k": 30}, {"min_p": 0.02}, {"logit_bias": {most: 0.4}}):
        assert not likely_enough(tokens, plain(logits(1)[0], [], [], params(wrong))), wrong


# --- through the whole runtime ---


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine.write(tmp_path_factory.mktemp("tiny"), limits=Limits(32, 256, 96))
    hf_llama.add_tokenizer(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_samples_of_a_request_follow_the_distribution_token_after_token(engine_dir: Path) -> None:
    """n samples of one seed, all options at once: their first tokens, and the second ones after the commonest first."""
    p = SamplingParams(
        max_tokens=2, temperature=6.0, seed=11, n=800, top_k=40, top_p=0.97, min_p=0.005, typical_p=0.97,
        repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 4.0, 90: -7.0},
        stop_token_ids=STOPS, min_tokens=2,
    )  # fmt: skip
    prompt, model = [5, 6, 7, 3], tiny_engine.twin()
    outputs = [c.token_ids for c in LLM(engine_dir, "cpu", lag=1).generate([prompt], p)]

    def expected(output: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return plain(model(torch.tensor([prompt + output])).logits[0, -1], prompt, output, p)

    assert len(outputs) == 800 and likely_enough([o[0] for o in outputs], expected([]))
    for first, count in Counter(o[0] for o in outputs).most_common(3):
        assert count > 50 and likely_enough([o[1] for o in outputs if o[0] == first], expected([first]))


GREEDY: list[dict[str, Any]] = [
    {}, {"repetition_penalty": 1.8}, {"logit_bias": {7: 9.0, 20: -30.0}}, {"stop_token_ids": (4, 60, 17, 80)},
    {"stop_token_ids": tuple(range(0, 97, 2)), "min_tokens": 9}, {"stop": ("D$", "lpI", "g/", "absent")},
    {"repetition_penalty": 1.3, "logit_bias": {7: 2.0}, "stop_token_ids": (60, 5), "stop": ("Q", "X", "4")},
]  # fmt: skip


@pytest.mark.parametrize("wanted", GREEDY, ids=str)
def test_greedy_texts_with_options_are_those_of_transformers(engine_dir: Path, wanted: dict[str, Any]) -> None:
    prompts = [[(13 * i + 5 * j * j + j) % V for j in range(3 + 9 * i)] for i in range(6)]
    p, model = SamplingParams(max_tokens=40, **wanted), tiny_engine.twin()
    tokenizer, reasons = PreTrainedTokenizerFast(tokenizer_file=str(engine_dir / "tokenizer.json")), set()
    for prompt, found in zip(prompts, LLM(engine_dir, "cpu").generate(prompts, p), strict=True):
        (tokens,) = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=40, min_new_tokens=p.min_tokens, repetition_penalty=p.repetition_penalty, pad_token_id=0,
            sequence_bias={(t,): float(b) for t, b in p.logit_bias.items()} or None,
            eos_token_id=list(p.stop_token_ids) or None, stop_strings=list(p.stop) or None, tokenizer=tokenizer,
        ).tolist()  # fmt: skip
        output = tokens[len(prompt) :]
        text = tokenizer.decode(output)
        if isinstance(found.stop_reason, str):
            assert text.endswith(found.stop_reason) and found.text == text.removesuffix(found.stop_reason)
        elif found.finish_reason == "stop":
            assert [*found.token_ids, found.stop_reason] == output
        else:
            assert found.token_ids == output and len(output) == 40
        reasons.add(type(found.stop_reason))
    assert (str in reasons) == bool(p.stop) and (int in reasons) == bool(p.stop_token_ids)
