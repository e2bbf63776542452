"""Text of tokens that come one after the other, and the stop strings in it. Pure Python over a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from fp8.runtime.tokenizer import Tokenizer

CONTEXT = 4  # tokens kept before the new ones: some decoders treat the beginning of a text in another way
WINDOW = 16  # tokens after which the ones before are dropped: a step costs the same however long the text is
PATIENCE = 64  # tokens that may end in half a character; more is no text but noise
INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStream:
    """`tokenizer.decode(all tokens)` as it grows: `text`, which ends before a stop string once one is `found`.

    A character whose bytes come in several tokens is held back until it is whole; bytes that never become one come as
    the decoder writes them. Stop strings count from where the text of the first `min_tokens` tokens ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.text = ""
        self.found: str | None = None
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._early = min_tokens  # tokens to come whose text is not searched
        self._searchable = 0  # where in `text` a stop string may begin
        self._window: list[int] = []
        self._taken = 0  # characters of the window's text that are in `text`
        self._given = 0  # characters of `text` that have been handed out

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain now and was not before: nothing that may turn out to belong to a stop string."""
        for token in tokens:
            if self.found is None:
                self._append(token)
        held = 0 if self.found else may_begin(self.text, self._stop)
        return self._hand_out(len(self.text) - held)

    def finish(self) -> str:
        """The rest."""
        if self.found is None:
            self.text += self._tokenizer.decode(self._window)[self._taken :]
        return self._hand_out(len(self.text))

    def _append(self, token: int) -> None:
        self._window.append(token)
        text, old = self._tokenizer.decode(self._window), len(self.text)
        certain = len(text if len(self._window) > PATIENCE else text.rstrip(INCOMPLETE))
        self.text += text[self._taken : certain]
        self._taken = max(self._taken, certain)
        if len(self._window) > WINDOW and certain == len(text):
            self._slide(text)
        if self._early:
            self._early, self._searchable = self._early - 1, len(self.text)
        elif self._stop:
            self._cut(max(self._searchable, old - max(map(len, self._stop)) + 1))

    def _slide(self, text: str) -> None:
        """Drops the window's older tokens where what is left is the same text as before."""
        kept = self._window[-CONTEXT:]
        tail = self._tokenizer.decode(kept)
        if tail and INCOMPLETE not in tail and text.endswith(tail):
            self._window, self._taken = kept, len(tail)

    def _cut(self, start: int) -> None:
        """Ends the text before the stop string that begins first; of those that begin together, the longest."""
        places = [(at, -len(s), s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if places:
            at, _, self.found = min(places)
            self.text = self.text[:at]

    def _hand_out(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece


def may_begin(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that may turn out to be the beginning of one of `stop`."""
    longest = max((len(s) for s in stop), default=0) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
