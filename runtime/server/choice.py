"""One choice of an answer: its text, and its tokens' log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp8.runtime.llm import Delta, Prompt
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.request import Request
from fp8.runtime.text_stream import TextStream
from fp8.runtime.tokenizer import Tokenizer


class Choice:
    """Turns the deltas of one request, all together or one after the other, into text and log-probabilities.

    `prompt` is what is to be echoed before the output, None for nothing.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, chat: bool, prompt: Prompt | None) -> None:
        self._request, self._tokenizer, self._chat, self._prompt = request, tokenizer, chat, prompt
        self._stream = None if tokenizer is None else TextStream(tokenizer)  # says where in the text a token begins

    def take(self, delta: Delta) -> tuple[str, dict[str, Any] | None]:
        """(text, the field `logprobs`) of a delta; those of the prompt come with the first one."""
        tokens, text = delta.token_ids, delta.text or ""
        entries: Sequence[TokenLogprobs | None] | None = delta.logprobs
        if self._prompt is not None:
            text = self._echo(self._prompt) + text
            if entries is not None:
                tokens = [*self._request.prompt, *tokens]
                entries = [*(self._request.prompt_logprobs or []), *entries]
            self._prompt = None
        return text, None if entries is None else self._logprobs(tokens, entries)

    def _echo(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt) if self._tokenizer else ""

    def _logprobs(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_entry(entry) for entry in entries if entry], "refusal": None}
        offsets = [self._offset(token) for token in tokens]
        return {
            "tokens": [self._piece(token) for token in tokens],
            "token_logprobs": [entry and entry.logprob for entry in entries],
            "top_logprobs": [entry and self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest and the token itself; of two that read the same, the likelier."""
        ranked = sorted([*entry.top, (entry.token, entry.logprob)], key=lambda pair: pair[1])
        by_text = {self._piece(token): value for token, value in ranked}
        return dict(reversed(by_text.items()))

    def _chat_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._described(token, value) for token, value in entry.top]
        return {**self._described(entry.token, entry.logprob), "top_logprobs": top}

    def _described(self, token: int, value: float) -> dict[str, Any]:
        piece = self._piece(token)
        # A part of a character has bytes that a decoder does not tell.
        return {"token": piece, "logprob": value, "bytes": None if "\ufffd" in piece else list(piece.encode())}

    def _piece(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.piece(token)

    def _offset(self, token: int) -> int:
        """Where in the text, echo included, a token begins."""
        if self._stream is None:
            return 0
        begin = len(self._stream.text)
        self._stream.add([token])
        return begin


def joined(deltas: Sequence[Delta]) -> Delta:
    """All of a request's deltas as one."""
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    return Delta(
        [token for delta in deltas for token in delta.token_ids],
        "".join(delta.text or "" for delta in deltas),
        deltas[-1].finish_reason,
        None if deltas[-1].logprobs is None else entries,
    )
