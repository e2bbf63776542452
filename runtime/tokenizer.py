"""Text to tokens and back, with the tokenizer files beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fp8.builder.engine import EngineError
from fp8.runtime.sampling_params import RequestError


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]:
        """Tokens with the special ones that the model expects around a text (a leading BOS, say)."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""

    def piece(self, token: int) -> str:
        """What a token adds to a text that goes before it; a special token's name."""


class ChatTemplate:
    """A model's way to write a conversation, from the tokenizer files beside the engine, through transformers."""

    def __init__(self, directory: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # as above
            raise EngineError(f"{directory}: the tokenizer cannot be opened for its chat template: {error}") from error
        if not self._tokenizer.chat_template:
            raise EngineError(
                f"{directory}: the tokenizer has no chat template; put the model's chat_template.jinja there, "
                f"or give plain prompts"
            )

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Tokens of the conversation up to where the answer begins. Raises RequestError if the template refuses it."""
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises, or runs into
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return list(self._tokenizer(_sound(str(text)), add_special_tokens=False, verbose=False)["input_ids"])


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
        return list(self._tokenizer.encode(_sound(text)).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        return _piece(self._tokenizer, self._tokenizer.encode("a", add_special_tokens=False).ids, token)


class SlowTokenizer:
    """Other formats (SentencePiece) through transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # whatever is wrong with the files, or missing to read them
            raise EngineError(f"{directory}: the tokenizer cannot be read: {error}; copy the model's again") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(_sound(text), verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        return _piece(self._tokenizer, self._tokenizer("a", add_special_tokens=False)["input_ids"], token)


def _sound(text: str) -> str:
    """The text. Raises RequestError if it is none, as what a shell or JSON hands over need not be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text has half a surrogate pair at position {error.start}, which is no character; leave it out"
        ) from error
    return text


def _piece(tokenizer: Any, before: list[int], token: int) -> str:
    """Some decoders treat the beginning of a text in another way, so the token is read after others."""
    text = tokenizer.decode([*before, token], skip_special_tokens=False)
    return str(text.removeprefix(tokenizer.decode(before, skip_special_tokens=False)))
