"""Calibration text: a .txt, .jsonl or .parquet file -> token sequences."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CHARACTERS_PER_TOKEN = 4  # of a piece cut from running text; what a piece has beyond the maximal length is dropped


class CalibrationError(ValueError):
    """A calibration that cannot be done: names the file, the row or the tensor."""


def read_samples(
    path: Path, encode: Callable[[str], list[int]], vocab_size: int, size: int, max_seq_length: int, seed: int
) -> list[list[int]]:
    """Up to `size` token sequences of at most `max_seq_length`, chosen by `seed`.

    A row of JSON lines or parquet (column `text`) is one sample; running text is cut into pieces.
    """
    samples: list[list[int]] = []
    for text in _choose(_texts(path, max_seq_length), size, random.Random(seed)):
        tokens = encode(text)[:max_seq_length]
        outside = [t for t in tokens if not 0 <= t < vocab_size]
        if outside:
            raise CalibrationError(
                f"{path}: the tokenizer gives token {outside[0]}, the model's vocab_size is {vocab_size}; "
                "the tokenizer is not this model's"
            )
        if tokens:
            samples.append(tokens)
    if not samples:
        raise CalibrationError(f"{path} has no text to calibrate with")
    return samples


def _choose(texts: Iterable[str], size: int, choice: random.Random) -> list[str]:
    """`size` of the non-empty texts, each with the same chance, holding no more (reservoir sampling)."""
    chosen: list[str] = []
    for count, text in enumerate(filter(None, texts), 1):
        if len(chosen) < size:
            chosen.append(text)
        elif (place := choice.randrange(count)) < size:
            chosen[place] = text
    return chosen


def _texts(path: Path, max_seq_length: int) -> Iterator[str]:
    readers = {".txt": _running_text, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.is_dir():
        raise CalibrationError(f"{path} is a directory; give one file of it, {', '.join(readers)}")
    if path.suffix not in readers:
        absent = "" if path.exists() else "; there is no such file, and datasets of that name are not fetched"
        raise CalibrationError(f"{path}: the suffix must be one of {', '.join(readers)}{absent}")
    try:
        yield from readers[path.suffix](path, max_seq_length)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _running_text(path: Path, max_seq_length: int) -> Iterator[str]:
    piece = max_seq_length * CHARACTERS_PER_TOKEN
    with path.open(encoding="utf-8") as file:
        while text := file.read(piece):
            yield text


def _json_lines(path: Path, max_seq_length: int) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _text_of(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CalibrationError(f"{path}:{number}: expected a JSON object with a string `text`") from error


def _parquet(path: Path, max_seq_length: int) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise CalibrationError(f"{path} has no column `text`; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=["text"]):
            yield from (_text_of(value) for value in batch.column(0).to_pylist() if value is not None)
    except (pyarrow.ArrowInvalid, TypeError) as error:
        raise CalibrationError(f"{path} is not a parquet file with a string column `text`: {error}") from error


def _text_of(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is {type(value).__name__}")
    return value


def load_encoder(directory: Path) -> Callable[[str], list[int]]:
    """The tokenizer of a checkpoint directory, special tokens added as the model expects them."""
    if (directory / "tokenizer.json").is_file():
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the package raises plain Exception
            raise _unreadable(directory / "tokenizer.json", error) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return lambda text: tokenizer.encode(text).ids
    if (directory / "tokenizer.model").is_file():
        import transformers

        try:
            slow = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # whatever is wrong with the file, or missing to read it
            raise _unreadable(directory / "tokenizer.model", error) from error
        return lambda text: slow(text)["input_ids"]
    raise CalibrationError(f"{directory} has neither tokenizer.json nor tokenizer.model; calibration text needs one")


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}; copy the model's again")
