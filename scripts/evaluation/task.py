"""What a task is, and where they are: one module in `tasks` each, with a class `Task`, `add_arguments` for its flags,
`COMMON` (those of evaluate.py's flags that it reads), `ALIASES` and `EXAMPLE`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol, TypeVar

import fp8.scripts.evaluation.tasks as folder
from fp8.runtime.sampling_params import RequestError
from fp8.scripts.evaluation.models import Engine, Model, Progress

Item = TypeVar("Item")


class Task(Protocol):
    """Made of the arguments and the engine; reads and checks all data. Raises RequestError for what cannot be used."""

    items: Sequence[Any]
    unit: str  # what an item is, for progress

    def run(self, model: Model, items: Sequence[Any], progress: Progress) -> list[Any]:
        """One outcome per item: small, and the same whatever the other items are."""

    def figures(self, outcomes: Sequence[Any]) -> dict[str, Any]:
        """`perplexity` or `accuracy`, `confidence_interval`, `tokens` and facts, of the outcomes of all items."""

    def against(self, ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
        """The reference's figures, the difference, and `p_value` that the engine is not worse (None: not known)."""

    @staticmethod
    def report(result: dict[str, Any]) -> list[str]:
        """Lines for a person, of figures, with the reference's under `reference`."""


def modules() -> dict[str, ModuleType]:
    """All tasks by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(folder.__path__))
    return {name: importlib.import_module(f"{folder.__name__}.{name}") for name in names}


def task_name(text: str) -> str:
    """The name of a task that may be given by an alias, for argparse."""
    found = modules()
    known = {alias: name for name, module in found.items() for alias in (name, *module.ALIASES)}
    if text not in known:
        near = difflib.get_close_matches(text, known, 1, 0.3) or ["perplexity"]
        raise argparse.ArgumentTypeError(f"task {text!r} is unknown; did you mean {near[0]}? known: {', '.join(known)}")
    return known[text]


def fitting(items: Sequence[Item], sizes: Sequence[tuple[str, int, int]], engine: Engine, skip: bool) -> list[Item]:
    """Items whose sequences the engine holds; `sizes`: (where it stands, tokens of the prompt, of the answer).

    Raises RequestError for the first that is too long, or for all of them left out by `skip`.
    """
    kept = []
    for item, (where, prompt, answer) in zip(items, sizes, strict=True):
        over = prompt + answer - engine.longest
        if over <= 0:
            kept.append(item)
        elif not skip:
            raise RequestError(
                f"{where}: {prompt} tokens of prompt and {answer} of answer are {over} more than the engine holds of a "
                f"sequence ({engine.longest}); shorten it, build with a larger --max_seq_len, or leave such items out "
                f"with --skip_long"
            )
    if not kept:
        raise RequestError(
            f"every one of the {len(items)} items is longer than the {engine.longest} tokens it may have"
        )
    return kept
