"""Prompts of a file: txt, jsonl or csv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8.runtime.sampling_params import RequestError

Messages = list[dict[str, Any]]
KEYS = ("text", "prompt", "messages")


def read_prompts(path: Path) -> list[str | Messages]:
    """The prompts of a .txt file (one a line), a .jsonl file (objects with `text`, `prompt` or `messages`) or a .csv
    file (a column `text` or `prompt`), in order; empty lines are skipped. Raises RequestError naming file and line."""
    readers = {".txt": _lines, ".jsonl": _objects, ".csv": _rows}
    if path.suffix not in readers:
        raise RequestError(f"{path} ends in {path.suffix or 'nothing'}; known are {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    prompts = list(readers[path.suffix](text, path))
    if not prompts:
        raise RequestError(f"{path} holds no prompt")
    return prompts


def _lines(text: str, _: Path) -> Iterator[str]:
    yield from (line for line in text.splitlines() if line.strip())


def _objects(text: str, path: Path) -> Iterator[str | Messages]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}:{number} is not JSON: {error}") from error
        key = next((k for k in KEYS if isinstance(item, dict) and k in item), None)
        if key is None:
            raise RequestError(f"{path}:{number} has none of the keys {', '.join(KEYS)}")
        wanted = list if key == "messages" else str
        if not isinstance(item[key], wanted) or (wanted is list and not all(isinstance(m, dict) for m in item[key])):
            raise RequestError(f"{path}:{number}: {key} must be a {'list of objects' if wanted is list else 'text'}")
        yield item[key]


def _rows(text: str, path: Path) -> Iterator[str]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    names = reader.fieldnames or []
    key = next((k for k in ("text", "prompt") if k in names), None)
    if key is None:
        raise RequestError(f"{path} has the columns {', '.join(names) or '(none)'}; one must be text or prompt")
    for row in reader:
        if not isinstance(row[key], str):
            raise RequestError(f"{path}:{reader.line_num} has no column {key}; is a quote missing?")
        if row[key].strip():
            yield row[key]
