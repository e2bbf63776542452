"""Text of tokens that come one after the other: what is handed out never changes and never splits a character."""

from __future__ import annotations

from collections.abc import Sequence

from fp8.runtime.tokenizer import Tokenizer

CONTEXT = 4  # tokens kept before the new ones: some decoders treat the beginning of a text in another way
WINDOW = 16  # tokens after which the ones before are dropped: a step costs the same however long the text is
PATIENCE = 64  # tokens that may end in half a character; more is no text but noise
INCOMPLETE = "�"  # what decoders write for bytes that are no character (yet)


class TextStream:
    """Pieces of `tokenizer.decode(all tokens)`. A character whose bytes come in several tokens is held back until it
    is whole; bytes that never become one are handed out as the decoder writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that have been handed out

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._window += tokens
        text = self._tokenizer.decode(self._window)
        certain = len(text if len(self._window) > PATIENCE else text.rstrip(INCOMPLETE))
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if len(self._window) > WINDOW and certain == len(text):
            self._slide(text)
        return piece

    def finish(self) -> str:
        """The rest."""
        return self._tokenizer.decode(self._window)[self._given :]

    def _slide(self, text: str) -> None:
        """Drops the window's older tokens where what is left is the same text as before."""
        kept = self._window[-CONTEXT:]
        tail = self._tokenizer.decode(kept)
        if tail and INCOMPLETE not in tail and text.endswith(tail):
            self._window, self._given = kept, len(tail)


def may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that may turn out to be the beginning of one of `stop`."""
    longest = max((len(s) for s in stop), default=0) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
