"""greedy summaries of documents, by ROUGE against given ones (F1 of rouge-score, with stemming)"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from fp8.runtime.request import RequestError
from fp8.scripts.evaluation.data import json_rows
from fp8.scripts.evaluation.models import Engine, Model, Progress, encode
from fp8.scripts.evaluation.statistics import mean_interval, paired_bootstrap
from fp8.scripts.evaluation.task import fitting

ALIASES = ("summarize",)
COMMON = frozenset({"data", "max_items", "skip_long", "min_accuracy"})
EXAMPLE = "--task rouge --data news.jsonl --document_key article --summary_key highlights --min_accuracy 0.25"
METRICS = ("rouge1", "rouge2", "rougeL")
MAIN = "rouge1"  # what `accuracy` and its gates mean
TEMPLATE = "{document}\n\nTL;DR:"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--document_key", default="document", help="key of the document in the JSON objects of --data")
    p.add_argument("--summary_key", default="summary", help="key of the summary")
    p.add_argument("--prompt_template", default=TEMPLATE, help=f"a text with {{document}} in it; default: {TEMPLATE!r}")
    p.add_argument("--max_output_len", type=int, default=64, help="generate at most so many tokens")


class Item(NamedTuple):
    where: str
    prompt: list[int]
    summary: str


class Task:
    unit = "documents"

    def __init__(self, args: argparse.Namespace, engine: Engine) -> None:
        self._scorer = _scorer()
        self._tokenizer, self._max_tokens = engine.tokenizer, args.max_output_len
        if args.max_output_len < 1:
            raise RequestError(f"--max_output_len is {args.max_output_len}; it must be at least 1")
        if "{document}" not in args.prompt_template:
            raise RequestError(f"--prompt_template {args.prompt_template!r} has no {{document}}; say where it goes")
        keys, flags = (args.document_key, args.summary_key), ("--document_key", "--summary_key")
        found = []
        for where, (document, summary) in json_rows(args.data, keys, flags)[: args.max_items]:
            text = args.prompt_template.replace("{document}", document)
            found.append(Item(where, encode(engine.tokenizer, text, engine.vocab_size, where), summary))
        sizes = [(item.where, len(item.prompt), args.max_output_len) for item in found]
        self.items = fitting(found, sizes, engine, args.skip_long)
        self.skipped = len(found) - len(self.items)

    def run(self, model: Model, items: Sequence[Item], progress: Progress) -> list[str]:
        outputs = model.generate([item.prompt for item in items], self._max_tokens, progress)
        return [self._tokenizer.decode(tokens).strip() for tokens in outputs]

    def figures(self, outcomes: Sequence[str]) -> dict[str, Any]:
        scores = self._scores(outcomes)
        means = {metric: mean_interval([s[metric] for s in scores]) for metric in METRICS}
        return {
            "accuracy": means[MAIN][0], "accuracy_is": MAIN, "confidence_interval": means[MAIN][1],
            **{metric: {"f1": mean, "confidence_interval": interval} for metric, (mean, interval) in means.items()},
            "items": len(self.items), "skipped": self.skipped, "tokens": sum(len(i.prompt) for i in self.items),
            **self._chance_level(outcomes),
        }  # fmt: skip

    def against(self, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
        figures = self.figures(theirs)
        losses = [b[MAIN] - a[MAIN] for a, b in zip(self._scores(ours), self._scores(theirs), strict=True)]
        return {
            **{key: figures[key] for key in ("accuracy", "confidence_interval", *METRICS)},
            "difference": -sum(losses) / len(losses),
            "same_text": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours),
            "p_value": paired_bootstrap(losses),
        }  # fmt: skip

    @staticmethod
    def report(result: dict[str, Any]) -> list[str]:
        def line(figures: dict[str, Any]) -> str:
            return ", ".join(f"{metric} {figures[metric]['f1']:.4f}" for metric in METRICS)

        interval = result["confidence_interval"]
        between = f" ({MAIN} 95%: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        lines = [f"{line(result)}{between}, {result['items']} documents, on {result['device']}"]
        if reference := result["reference"]:
            lines.append(f"reference {line(reference)}; same text {reference['same_text']:.2%}")
        return lines

    def _scores(self, outcomes: Sequence[str], shift: int = 0) -> list[dict[str, float]]:
        """F1 by metric of every output, against the summary of the item `shift` further on."""
        summaries = [self.items[(i + shift) % len(self.items)].summary for i in range(len(self.items))]
        found = [self._scorer.score(s, text) for s, text in zip(summaries, outcomes, strict=True)]
        return [{metric: scores[metric].fmeasure for metric in METRICS} for scores in found]

    def _chance_level(self, outcomes: Sequence[str]) -> dict[str, Any]:
        """What the outputs score against the summaries of other documents: nothing of what they say was understood."""
        if len(self.items) < 2:
            return {}
        mean, interval = mean_interval([s[MAIN] for s in self._scores(outcomes, shift=1)])
        return {"chance": mean, "chance_interval": interval}


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise RequestError(f"--task rouge needs rouge-score ({error}); pip install 'fp8-engine[eval]'") from error
    return RougeScorer(list(METRICS), use_stemmer=True)
