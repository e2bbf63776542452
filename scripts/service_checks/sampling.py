"""Sampling: checks as in fp8.scripts.service_checks.load."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Limits
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM, Completion, sample_seed
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.sampling_options import Drawn, History, OptionSampler, options_of
from fp8.runtime.scheduler import Row
from fp8.scripts.service_checks.engine import NOISE, Engine, first_difference, whole_pool

if TYPE_CHECKING:
    import torch

DRAWS = 256  # noisy draws before a sampled text counts as parted without cause
EVERY_OPTION = SamplingParams(
    temperature=0.8, max_tokens=100, stop_token_ids=(4, 9), min_tokens=50, top_k=60, top_p=0.95, min_p=0.01,
    typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.5, 90: -7},
    logprobs=3, logprob_token_ids=(7,),
)  # fmt: skip
BEAMS = SamplingParams(max_tokens=100, stop_token_ids=(4,), min_tokens=50, beam_width=3, repetition_penalty=1.2)
OPTIONS: list[dict[str, Any]] = [
    {}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.7}, {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"logit_bias": {5: 2.0, 7: -100.0}}, {"logprobs": 3},
    {"stop": ("return", "\n\n")}, {"min_tokens": 8, "stop_token_ids": (12,), "ignore_eos": False},
    {"prompt_logprobs": 1},
    {
        "top_k": 100, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.1, "logprobs": 1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {9: 1.0}, "stop": ("import",), "min_tokens": 4,
    },
]  # fmt: skip


def sampling(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """16 prompts of two samples each, all options among them: twice together, and each alone."""
    source, llm = random.Random(2), engine.open()
    prompts = [engine.prompt(source, 60) for _ in range(16)]
    params = [
        SamplingParams(**{"max_tokens": 16 + i, "temperature": 0.9, "seed": i, "n": 2, "ignore_eos": True,
                          **OPTIONS[i % len(OPTIONS)]}) for i in range(16)
    ]  # fmt: skip
    together, again = (llm.generate(prompts, params) for _ in range(2))
    parted = unexplained = 0
    for i, found in enumerate(together):
        single = replace(params[i // 2], n=1, seed=sample_seed(i // 2, found.index))
        (expected,) = llm.generate([prompts[i // 2]], single)
        if expected.token_ids != found.token_ids:
            parted += 1
            unexplained += not by_noise(llm, expected, found, single, NOISE[engine.name])
    repeated = [c.token_ids for c in together] == [c.token_ids for c in again]
    free = whole_pool(llm)
    figures = {"texts": len(together), "equal": len(together) - parted, "parted_without_cause": unexplained,
               "the_same_batch_twice_equal": repeated, "all_blocks_free": free}  # fmt: skip
    return repeated and free and not unexplained, figures


def rows_with_every_option(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Row]:
    """A step's rows, one per (prompt, output so far): all but two with every option of sampling, those two beams."""
    rows = []
    for slot, (prompt, output) in enumerate(texts):
        params = BEAMS if slot >= len(texts) - 2 else EVERY_OPTION
        request = Request(slot, list(prompt), params, 100, stop_tokens=frozenset(params.stop_token_ids), slot=slot)
        request.tokens += output
        rows.append(Row(request, len(request.tokens) - 1, 1, True, len(output)))
    return rows


def sample_without_a_wait(rows: Sequence[Row], limits: Limits, logits: torch.Tensor) -> Drawn:
    """What the rows draw from logits f32 [rows, V], greedily. Raises RuntimeError if the host waits for the GPU; in the
    second of two steps, as the first one makes the table of tokens and loads libraries."""
    import torch

    sampler = OptionSampler(limits, logits.device)
    for mode in ("default", "error"):
        options = options_of(rows, History())
        assert options is not None and options.beam_rows and options.penalized and options.truncated
        if logits.is_cuda:
            torch.cuda.set_sync_debug_mode(mode)
        try:
            drawn = sampler.sample(options, logits.clone(), lambda x: x.argmax(1).int())
        finally:
            if logits.is_cuda:
                torch.cuda.set_sync_debug_mode("default")
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return drawn


def options_without_a_wait(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """A step with every option at once: no wait for the device, and the CPU's tokens, log-probabilities and beams."""
    import torch

    llm, source = engine.open(), random.Random(7)
    rows = rows_with_every_option([(engine.prompt(source, 100), engine.prompt(source, 30)) for _ in range(16)])
    shape = len(rows), llm.session.model.vocab_size
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(7))
    found, expected = (
        sample_without_a_wait(rows, llm.session.limits, logits.to(device)) for device in (engine.device, "cpu")
    )
    assert found.logprobs and found.candidates and expected.logprobs and expected.candidates
    equal = int((found.tokens.cpu() == expected.tokens).sum())
    pairs = [(found.logprobs, expected.logprobs), (found.candidates, expected.candidates)]
    error = max(float((a.values - b.values).abs().max()) for a, b in pairs)
    figures = {"rows": len(rows), "equal": equal, "largest_logprob_error": error, "device": engine.device}
    return equal == len(rows) and error < 1e-4, figures


def by_noise(llm: LLM, a: Completion, b: Completion, params: SamplingParams, most: float) -> bool:
    """Whether noise of at most `most` on the logits where two texts part makes a draw give b's token, and a's."""
    import torch

    from fp8.plugins.sampling.reference import sample

    at = first_difference(a.token_ids, b.token_ids)
    at = min(len(a.token_ids), len(b.token_ids)) if at is None else at  # one ended: by a token that is not shown
    plain = replace(params, prompt_logprobs=None, logprobs=None)
    request = llm.request([*a.prompt_token_ids, *a.token_ids[:at]], plain)
    request.slot, request.blocks = 0, list(range(blocks_for(request.length, llm.session.limits.block_size)))
    logits, (wanted_a, wanted_b) = next_logits(llm, request), (next(iter(c.token_ids[at:]), None) for c in (a, b))
    request.prompt = a.prompt_token_ids  # of which penalties make a difference
    row = Row(request, request.length - 1, 1, True, at)
    fields = (torch.tensor([params.temperature]), torch.tensor([request.seed]), torch.tensor([at], dtype=torch.int32))
    generator, drawn = torch.Generator().manual_seed(at), set()
    for _ in range(DRAWS):
        noisy = logits + most * (2 * torch.rand(logits.shape, generator=generator) - 1)
        if options := options_of([row], History()):
            OptionSampler(llm.session.limits, noisy.device).sample(options, noisy, lambda x: x.argmax(1).int())
        drawn.add(int(sample(noisy, *fields)))
    ends = drawn - {wanted_a, wanted_b}
    return all(w in drawn if w is not None else bool(ends) for w in (wanted_a, wanted_b))


def next_logits(llm: LLM, request: Request) -> Any:
    """Logits f32 [1, V] after the tokens of a request, computed alone, on the CPU."""
    rows = llm.session.max_logits_rows
    for start in range(0, request.length, rows):
        row = Row(request, start, min(rows, request.length - start), False, 0)
        logits = llm.session.token_logits([row])[-1:].float().cpu().clone()
    return logits
