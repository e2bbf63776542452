"""What a task asks of a model, and the two that answer: an engine, and its Hugging Face model in float32.

Both get the same tokens, made once with the engine's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scoring import GROUP, logit_losses, score_continuations, token_losses
from fp8.runtime.tokenizer import Tokenizer
from fp8.scripts.hugging_face import HuggingFaceError, load_model

if TYPE_CHECKING:
    import torch

Tokens = Sequence[int]
Progress = Callable[[int], None]  # told how many more are done


class Model(Protocol):
    def losses(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """(-ln p float64 [n - 1], likeliest tokens int64 [n - 1]) of all tokens but the first."""

    def choose(self, prompts: Sequence[Tokens], choices: Sequence[int], progress: Progress) -> list[list[float]]:
        """ln p of each of the tokens `choices` after each prompt."""

    def generate(self, prompts: Sequence[Tokens], max_tokens: int, progress: Progress) -> list[list[int]]:
        """The greedy output of each prompt, up to an end-of-sequence token."""


class Engine:
    """An engine with its tokenizer; prompts run side by side and share prefixes."""

    def __init__(self, llm: LLM) -> None:
        if llm.tokenizer is None:
            raise RequestError(f"{llm.engine_dir} holds no tokenizer, and the tasks are texts; copy the model's there")
        self.llm, self.tokenizer = llm, llm.tokenizer
        self.vocab_size = llm.session.model.vocab_size
        self.longest = min(llm.session.limits.max_seq_len, llm.session.max_kv_tokens)  # tokens of a sequence

    def losses(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        return token_losses(self.llm.session, tokens)

    def choose(self, prompts: Sequence[Tokens], choices: Sequence[int], progress: Progress) -> list[list[float]]:
        pairs = [(prompt, [choice]) for prompt in prompts for choice in choices]
        scores = score_continuations(self.llm, pairs, lambda done: progress(done // len(choices)))
        values = iter(score.logprob for score in scores)
        return [[next(values) for _ in choices] for _ in prompts]

    def generate(self, prompts: Sequence[Tokens], max_tokens: int, progress: Progress) -> list[list[int]]:
        def ended(request: Request) -> None:
            if request.finish_reason:
                progress(1)

        params, out = SamplingParams(max_tokens=max_tokens), []
        for i in range(0, len(prompts), GROUP):
            out += [c.token_ids for c in self.llm.generate(prompts[i : i + GROUP], params, ended)]
        return out


class Reference:
    """A Hugging Face directory through transformers, one prompt after the other."""

    def __init__(self, directory: Path, device: str, eos_token_ids: Sequence[int] = ()) -> None:
        import torch
        from transformers import GenerationConfig

        if not (directory / "config.json").is_file():
            raise RequestError(f"--reference {directory} has no config.json; give a Hugging Face model directory")
        self.directory, self.device = directory, device
        try:
            self.model = load_model(directory, torch.float32)
        except HuggingFaceError as error:
            raise RequestError(f"--reference {error}") from error
        self.model.to(torch.device(device))
        eos = list(eos_token_ids)
        # Greedy, whatever the checkpoint recommends.
        self.model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0
        )

    def check(self, tokens: Tokens) -> None:
        """Raises RequestError for a token that the model does not have."""
        size = self.model.config.get_text_config().vocab_size
        if max(tokens) >= size:
            raise RequestError(
                f"--reference {self.directory}: its vocabulary ends at {size - 1}, and the engine's tokenizer gives "
                f"token {max(tokens)}; give the model that the engine was built from"
            )

    def losses(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        import torch

        self.check(tokens)
        with torch.inference_mode():
            logits = self.model(self._ids(tokens[:-1]), use_cache=False).logits[0]
            return logit_losses(logits, tokens[1:])

    def choose(self, prompts: Sequence[Tokens], choices: Sequence[int], progress: Progress) -> list[list[float]]:
        import torch

        out = []
        for prompt in prompts:
            self.check([*prompt, *choices])
            with torch.inference_mode():
                log_p = self.model(self._ids(prompt), use_cache=False, logits_to_keep=1).logits[0, -1].log_softmax(0)
            out.append(log_p[list(choices)].tolist())
            progress(1)
        return out

    def generate(self, prompts: Sequence[Tokens], max_tokens: int, progress: Progress) -> list[list[int]]:
        import torch

        out = []
        for prompt in prompts:
            self.check(prompt)
            ids = self._ids(prompt)
            with torch.inference_mode():
                whole = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens)
            out.append(whole[0, len(prompt) :].tolist())
            progress(1)
        return out

    def _ids(self, tokens: Tokens) -> torch.Tensor:
        import torch

        return torch.tensor([list(tokens)], device=self.device)


def encode(tokenizer: Tokenizer, text: str, vocab_size: int, where: str) -> list[int]:
    """The text's tokens. Raises RequestError for one outside the vocabulary."""
    tokens = tokenizer.encode(text)
    if tokens and max(tokens) >= vocab_size:
        raise RequestError(
            f"{where}: the tokenizer gives token {max(tokens)}, the model's vocabulary ends at {vocab_size - 1}; the "
            f"tokenizer does not belong to this model"
        )
    return tokens
