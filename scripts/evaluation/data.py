"""Rows of CSV and objects of JSONL files, each with the place where it stands; what is wrong is named with its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fp8.runtime.sampling_params import RequestError


class Row(NamedTuple):
    """The fields of a row or object, and "file:line" of its beginning."""

    where: str
    fields: list[str]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error


def csv_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV file without a header, which must have those columns; empty lines are skipped."""
    rows, begin = [], 1
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if fields:
                rows.append(_checked(Row(where, fields), columns))
    except csv.Error as error:
        raise RequestError(f"{path}:{begin} is not CSV ({error}); is a quote missing?") from error
    if not rows:
        raise RequestError(f"{path} holds no row; it must have lines of {','.join(columns)}, without a header")
    return rows


def _checked(row: Row, columns: Sequence[str]) -> Row:
    count = len(row.fields)
    if count < len(columns):
        raise RequestError(
            f"{row.where} has {count} of the {len(columns)} columns {','.join(columns)}; "
            f"{', '.join(columns[count:])} is missing"
        )
    if count > len(columns):
        raise RequestError(
            f"{row.where} has {count} columns, not {','.join(columns)}; a field with commas belongs in double quotes"
        )
    return row


def json_rows(path: Path, keys: Sequence[str], flags: Sequence[str]) -> list[Row]:
    """The texts under `keys` of every object of a JSONL file; empty lines are skipped. `flags` set the keys."""
    rows = [
        Row(where, [_text(item, key, flag, where) for key, flag in zip(keys, flags, strict=True)])
        for where, item in json_lines(path)
    ]
    if not rows:
        raise RequestError(
            f"{path} holds no object; it must have a JSON object with {' and '.join(keys)} on every line"
        )
    return rows


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """(where, what) of every line that is not empty."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}:{number} is not JSON: {error}") from error


def _text(item: object, key: str, flag: str, where: str) -> str:
    if not isinstance(item, dict):
        raise RequestError(f"{where} is no JSON object; it must have the key {key!r}")
    if key not in item:
        raise RequestError(
            f"{where} has no key {key!r} (it has {', '.join(map(repr, item)) or 'none'}); name it with {flag}"
        )
    if not isinstance(item[key], str) or not item[key].strip():
        raise RequestError(f"{where}: {key!r} is {item[key]!r}; it must be a text that is not empty")
    return str(item[key])
