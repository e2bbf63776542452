"""Text to tokens and back, with the tokenizer files beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fp8.builder.engine import EngineError


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]:
        """Tokens with the special ones that the model expects around a text (a leading BOS, say)."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of an engine directory, None if it has none. Raises EngineError if the file cannot be read."""
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return FastTokenizer(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file() or (directory / "tokenizer_config.json").is_file():
        return SlowTokenizer(directory)
    return None


class FastTokenizer:
    """tokenizer.json through the tokenizers package alone: open in milliseconds."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise EngineError(f"{path} cannot be read: {error}; copy the model's tokenizer.json again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class SlowTokenizer:
    """Other formats (SentencePiece) through transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
