"""a number hidden in a long text: is it given back? (made on the spot, after Mohtashami and Jaggi 2023)"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from fp8.runtime.request import RequestError
from fp8.scripts.evaluation.models import Engine, Model, Progress, encode
from fp8.scripts.evaluation.statistics import paired_answers, wilson

ALIASES = ("needle",)
COMMON = frozenset({"min_accuracy"})
EXAMPLE = "--task passkey --lengths 1024 4096 --depths 0 0.5 1 --repeats 10"
HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
KEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--lengths", type=int, nargs="+", help="tokens, including the answer (default: what the engine can hold)"
    )
    p.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the number is hidden: 0 is the beginning, 1 the end",
    )
    p.add_argument("--repeats", type=int, default=5, help="numbers per length and depth (default: 5)")
    p.add_argument("--seed", type=int, default=0, help="of the numbers (default: 0)")


class Item(NamedTuple):
    length: int
    depth: float
    key: str
    prompt: list[int]


class Outcome(NamedTuple):
    text: str
    right: bool


class Task:
    unit = "prompts"

    def __init__(self, args: argparse.Namespace, engine: Engine) -> None:
        self._tokenizer, self.seed = engine.tokenizer, args.seed
        lengths = args.lengths or [engine.longest]
        if args.repeats < 1:
            raise RequestError(f"--repeats is {args.repeats}; it must be at least 1")
        for depth in args.depths:
            if not 0 <= depth <= 1:
                raise RequestError(f"--depths holds {depth}; it must lie between 0 and 1")
        for length in lengths:
            if length > engine.longest:
                raise RequestError(
                    f"--lengths holds {length}, {length - engine.longest} tokens more than the engine holds of a "
                    f"sequence ({engine.longest}); give at most that, or build with a larger --max_seq_len"
                )
        source = random.Random(args.seed)
        keys = [str(source.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in range(args.repeats)]
        self._answer = max(len(engine.tokenizer.encode(f" {key}.")) for key in keys)
        cells = [(length, depth, key) for length in lengths for depth in args.depths for key in keys]
        self.items = [Item(*cell, self._prompt(engine, *cell)) for cell in cells]

    def run(self, model: Model, items: Sequence[Item], progress: Progress) -> list[Outcome]:
        outputs = model.generate([item.prompt for item in items], self._answer, progress)
        texts = [self._tokenizer.decode(tokens) for tokens in outputs]
        return [Outcome(text, _number(text) == item.key) for text, item in zip(texts, items, strict=True)]

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        cells: dict[tuple[int, float], list[bool]] = defaultdict(list)
        for item, outcome in zip(self.items, outcomes, strict=True):
            cells[item.length, item.depth].append(outcome.right)
        correct = sum(outcome.right for outcome in outcomes)
        return {
            "accuracy": correct / len(outcomes), "confidence_interval": wilson(correct, len(outcomes)),
            "correct": correct, "items": len(outcomes), "chance": 1 / (9 * 10 ** (DIGITS - 1)),
            "tokens": sum(len(item.prompt) for item in self.items), "seed": self.seed,
            "cells": [
                {"length": length, "depth": depth, "accuracy": sum(right) / len(right), "items": len(right)}
                for (length, depth), right in cells.items()
            ],
        }  # fmt: skip

    def against(self, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, Any]:
        pairs = [(a.right, b.right) for a, b in zip(ours, theirs, strict=True)]
        figures = self.figures(theirs)
        return {
            **{key: figures[key] for key in ("accuracy", "confidence_interval", "correct", "cells")},
            **paired_answers(pairs),
            "same_text": sum(a.text == b.text for a, b in zip(ours, theirs, strict=True)) / len(pairs),
        }  # fmt: skip

    @staticmethod
    def report(result: dict[str, Any]) -> list[str]:
        lines = [f"{c['accuracy']:8.2%}  length {c['length']:>7}, depth {c['depth']:.2f}" for c in result["cells"]]
        low, high = result["confidence_interval"]
        lines.append(
            f"accuracy {result['accuracy']:.2%} (95%: {low:.2%} to {high:.2%}), {result['correct']} of "
            f"{result['items']} numbers found, on {result['device']}"
        )
        if reference := result["reference"]:
            lines.append(
                f"reference {reference['accuracy']:.2%}: {reference['difference']:+.2%}; same answer "
                f"{reference['same_text']:.2%}"
            )
        return lines

    def _prompt(self, engine: Engine, length: int, depth: float, key: str) -> list[int]:
        """A prompt of as much filler as fits, a whole number of times, with the share `depth` of it before the key."""

        def tokens(fillers: int) -> list[int]:
            before = round(depth * fillers)
            text = HEAD + FILLER * before + KEY.format(key=key) + FILLER * (fillers - before) + QUESTION
            return encode(engine.tokenizer, text, engine.vocab_size, "the passkey prompt")

        room, few = length - self._answer, 0
        many = 2 * room // len(engine.tokenizer.encode(FILLER)) + 1  # no tokenizer halves a text by joining lines
        if len(tokens(0)) > room:
            raise RequestError(
                f"--lengths holds {length}; without any filler a prompt and its answer already have "
                f"{len(tokens(0)) + self._answer} tokens"
            )
        while few < many:  # the largest number of fillers that fits
            middle = (few + many + 1) // 2
            few, many = (middle, many) if len(tokens(middle)) <= room else (few, middle - 1)
        return tokens(few)


def _number(text: str) -> str:
    """The digits that an answer begins with."""
    text = text.strip()
    return text[: next((i for i, c in enumerate(text) if not c.isdigit()), len(text))]
