"""Prompts of a file: txt, jsonl or csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8.runtime.sampling_params import RequestError
from fp8.scripts.evaluation.data import json_lines, read_text

Messages = list[dict[str, Any]]
KEYS = ("text", "prompt", "messages")


def read_prompts(path: Path) -> list[str | Messages]:
    """The prompts of a .txt file (one a line), a .jsonl file (objects with `text`, `prompt` or `messages`) or a .csv
    file (a column `text` or `prompt`), in order; empty lines are skipped. Raises RequestError naming file and line."""
    readers = {".txt": _lines, ".jsonl": _objects, ".csv": _rows}
    if path.suffix not in readers:
        raise RequestError(f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(readers)}")
    prompts = list(readers[path.suffix](path))
    if not prompts:
        raise RequestError(f"{path} holds no prompt")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    yield from (line for line in read_text(path).splitlines() if line.strip())


def _objects(path: Path) -> Iterator[str | Messages]:
    for where, item in json_lines(path):
        key = next((k for k in KEYS if isinstance(item, dict) and k in item), None)
        if not isinstance(item, dict) or key is None:
            raise RequestError(f"{where} has none of the keys {', '.join(KEYS)}")
        wanted = list if key == "messages" else str
        if not isinstance(item[key], wanted) or (wanted is list and not all(isinstance(m, dict) for m in item[key])):
            raise RequestError(f"{where}: {key} must be a {'list of objects' if wanted is list else 'text'}")
        yield item[key]


def _rows(path: Path) -> Iterator[str]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        key = next((k for k in ("text", "prompt") if k in names), None)
        if key is None:
            raise RequestError(f"{path} has the columns {', '.join(names) or '(none)'}; one must be text or prompt")
        for row in reader:
            if not isinstance(row[key], str):
                raise RequestError(f"{path}:{reader.line_num} has no column {key}; is a quote missing?")
            if row[key].strip():
                yield row[key]
    except csv.Error as error:
        raise RequestError(f"{path}:{reader.line_num} is not CSV ({error}); is a quote missing?") from error
