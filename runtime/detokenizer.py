"""Text of an output as its tokens come, and the stop strings in it. Pure Python over a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from fp8.runtime.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a tokenizer shows for the bytes of a character that is not whole yet


class Detokenizer:
    """`text` grows with every token and ends before a stop string once one is found.

    Only the last tokens are decoded anew. How a token reads can depend on the one before (a space that some tokenizers
    drop from a text's first word), so a window of settled tokens is decoded with and without the new ones, and what
    is longer by is their text. A character that spans tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        self._window = 0  # the first token that is decoded again
        self._settled = 0  # tokens whose text is in `text`
        self._searchable = 0  # where in `text` a stop string may begin

    def append(self, token: int, may_stop: bool = True) -> str | None:
        """Takes in a token; returns the stop string that the text now has, and cuts the text there.

        What came while `may_stop` was false is not searched."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._window : self._settled])
        whole = self._tokenizer.decode(self._tokens[self._window :])
        if whole.endswith(UNFINISHED):
            return None
        old = len(self.text)
        self.text += whole[len(before) :]
        self._window, self._settled = self._settled, len(self._tokens)
        if not may_stop:
            self._searchable = len(self.text)
            return None
        return self._cut(max(self._searchable, old - self._longest + 1))

    def _cut(self, start: int) -> str | None:
        """The stop string that begins first; of those that begin together, the longest."""
        places = [(at, -len(s), s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if not places:
            return None
        at, _, found = min(places)
        self.text = self.text[:at]
        return found
