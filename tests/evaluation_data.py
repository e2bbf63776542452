"""Questions and documents made of the bundled held-out text: which line comes next, and the docstring of a function."""

from __future__ import annotations

import ast
import csv
import json
import random
from pathlib import Path
from typing import Any

from fp8.scripts import build

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = EXAMPLES / "tiny-python-llama"
ENGINE = ["--target", "cpu", "--max_batch_size", "8", "--max_seq_len", "1024", "--max_num_tokens", "512"]


def build_engine(directory: Path) -> Path:
    arguments = ["--checkpoint_dir", str(MODEL), "--output_dir", str(directory), "--log_level", "error"]
    assert build.main([*arguments, *ENGINE]) == 0
    return directory


def heldout() -> str:
    return (EXAMPLES / "heldout.txt").read_text(encoding="utf-8")


def next_lines(count: int, before: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """`context`: some lines; `choices`: the next one and three from elsewhere; `answer`: which of them it is."""
    source, lines = random.Random(seed), heldout().split("\n")
    full = [i for i in range(before, len(lines)) if len(lines[i].strip()) > 8]
    found = []
    for i in source.sample(full, count):
        choices = [lines[i], *(lines[j] for j in source.sample([j for j in full if lines[j] != lines[i]], 3))]
        order = source.sample(range(4), 4)
        context = "\n".join(lines[i - before : i]) + "\n"
        found.append({"context": context, "choices": [choices[k] for k in order], "answer": order.index(0)})
    return found


def write_csv(path: Path, count: int, before: int = 3, seed: int = 0) -> Path:
    """The same in MMLU's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        for item in next_lines(count, before, seed):
            csv.writer(file).writerow([item["context"], *item["choices"], "ABCD"[item["answer"]]])
    return path


def write_summaries(path: Path, count: int) -> Path:
    """Functions with a docstring: the head and body as the document, the docstring's first line as the summary."""
    rows = []
    for node in ast.walk(ast.parse(heldout())):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
            node.body = node.body[1:]
            code = ast.unparse(node)
            if len(code) < 600 and len(text.split("\n")[0]) > 15:
                rows.append({"code": code, "doc": text.split("\n")[0]})
    assert len(rows) >= count
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return path
