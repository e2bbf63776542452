"""Beam search: a check as in fp8.scripts.service_checks.load."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.runtime.llm import LLM, Completion
from fp8.runtime.request import SamplingParams
from fp8.runtime.scoring import score_continuations
from fp8.scripts.evaluation.models import Reference
from fp8.scripts.service_checks.engine import NOISE, Engine, alone, greedy, whole_pool

if TYPE_CHECKING:
    import torch

NOISY_SEARCHES = 16  # before outputs count as others than transformers' without cause
Found = tuple[list[int], float]  # an output with its stop token, and its score at length_penalty 1


def beams(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Beam searches beside greedy requests on a pool that they overflow: the outputs against those of transformers in
    float32, their scores against what the engine on the CPU gives them, the greedy texts against those alone."""
    source = random.Random(6)
    (stop, _), *_ = Counter(engine.tokens).most_common(1)
    prompts = [engine.prompt(source, 70) for _ in range(16)]
    params = [searching(stop if i % 4 == 1 else None) if i % 2 else greedy(140 + i) for i in range(16)]
    llm = engine.open(blocks=10, reuse=True)
    rest = iter(llm.generate(prompts, params))
    completions = [[next(rest) for _ in range(p.n)] for p in params]
    texts = engine.texts()
    for completion, (other,) in zip(alone(engine.open(), prompts[::2], params[::2]), completions[::2], strict=True):
        texts.add(completion, other.token_ids)
    found = [[as_found(c) for c in group] for group in completions[1::2]]
    parted, unexplained = against_transformers(engine, prompts[1::2], params[1::2], found)
    error = error_of_scores(LLM(engine.directory, "cpu", 256), prompts[1::2], found)
    free, preemptions = whole_pool(llm), llm.worker.statistics.preemptions
    figures = {
        "beside": texts.figures, "searches": len(found), "equal": len(found) - parted,
        "parted_without_cause": unexplained, "largest_error_of_a_score": error, "allowed": NOISE[engine.name],
        "preemptions": preemptions, "all_blocks_free": free,
    }  # fmt: skip
    sound = error < NOISE[engine.name] and not unexplained and not texts.without_cause
    return sound and free and preemptions > 0, figures


def searching(stop: int | None) -> SamplingParams:
    stops = () if stop is None else (stop,)
    return SamplingParams(max_tokens=48, beam_width=4, n=2, ignore_eos=True, stop_token_ids=stops)


def as_found(completion: Completion) -> Found:
    stop = completion.stop_reason
    tokens = [*completion.token_ids, stop] if isinstance(stop, int) else completion.token_ids
    assert completion.cumulative_logprob is not None
    return tokens, completion.cumulative_logprob / len(tokens)


def error_of_scores(llm: LLM, prompts: Sequence[list[int]], found: Sequence[list[Found]]) -> float:
    """The largest, against the scores that another engine gives the same outputs."""
    outputs = [(prompt, *output) for prompt, group in zip(prompts, found, strict=True) for output in group]
    scored = score_continuations(llm, [(prompt, tokens) for prompt, tokens, _ in outputs])
    return max(abs(score - s.logprob / len(tokens)) for (_, tokens, score), s in zip(outputs, scored, strict=True))


def against_transformers(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], found: Sequence[list[Found]]
) -> tuple[int, int]:
    """How many searches end with other outputs than transformers', and how many of these have a score that searches
    with noise on the log-probabilities do not come to: a beam that is nearly left out decides on all that follows."""
    import torch

    model = Reference(engine.model_dir, engine.device).model
    parted = unexplained = 0
    for p in dict.fromkeys(params):
        group = [i for i, q in enumerate(params) if q == p]
        expected = transformers_search(model, [prompts[i] for i in group], p, 0.0)
        others = [i for i, e in zip(group, expected, strict=True) if [t for t, _ in e] != [t for t, _ in found[i]]]
        parted += len(others)
        noise = NOISE[engine.name]
        torch.manual_seed(len(others))
        noisy = transformers_search(model, [prompts[i] for i in others for _ in range(NOISY_SEARCHES)], p, noise)
        for at, i in enumerate(others):
            scores = [s for e in noisy[at * NOISY_SEARCHES : (at + 1) * NOISY_SEARCHES] for _, s in e]
            unexplained += not all(min(scores) - noise < score < max(scores) + noise for _, score in found[i])
    return parted, unexplained


def transformers_search(model: Any, prompts: list[list[int]], p: SamplingParams, noise: float) -> list[list[Found]]:
    """transformers' outputs for each prompt, best first, with uniform noise of at most `noise`."""
    import torch

    if not prompts:
        return []

    def perturb(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + noise * (2 * torch.rand_like(scores) - 1)

    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        result = model.generate(
            tokens, attention_mask=mask, do_sample=False, num_beams=p.beam_width, num_return_sequences=p.n,
            max_new_tokens=p.max_tokens, eos_token_id=list(p.stop_token_ids) or None, pad_token_id=0,
            logits_processor=[perturb], return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    outputs = []
    for sequence, score in zip(result.sequences.tolist(), result.sequences_scores.tolist(), strict=True):
        output = sequence[longest:]
        end = next((i + 1 for i, token in enumerate(output) if token in p.stop_token_ids), len(output))
        outputs.append((output[:end], score))
    return [outputs[i : i + p.n] for i in range(0, len(outputs), p.n)]
