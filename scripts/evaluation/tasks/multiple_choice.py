"""questions with four choices, in the layout and with the prompt of MMLU (Hendrycks et al. 2021): the choice whose
letter is the likeliest next token"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fp8.runtime.request import RequestError
from fp8.scripts.evaluation.data import Row, csv_rows
from fp8.scripts.evaluation.models import Engine, Model, Progress, encode
from fp8.scripts.evaluation.statistics import paired_answers, wilson
from fp8.scripts.evaluation.task import fitting

ALIASES = ("mmlu",)
COMMON = frozenset({"data", "max_items", "skip_long", "min_accuracy"})
EXAMPLE = "--task mmlu --data MMLU_DIR --num_shots 5 --reference HF_DIR --max_regression 0.01"
LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")
SHOTS = 5  # of the original


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--num_shots", type=int, help="solved questions in the prompt (default: 5, or 0 if there are none)")
    p.add_argument("--few_shot_file", type=Path, help="solved questions for --data FILE.csv, in the same layout")
    p.add_argument("--subjects", nargs="+", help="only these subjects of the directory")


class Item(NamedTuple):
    where: str
    subject: str
    prompt: list[int]
    answer: int  # which of the choices is right


class Outcome(NamedTuple):
    chosen: int
    logprobs: list[float]  # of the letters


class Choices(NamedTuple):
    """How the letters are told apart: `tokens`, one per letter, are compared after the prompt and `prefix`, the tokens
    that begin every answer."""

    prefix: list[int]
    tokens: list[int]


class Task:
    unit = "questions"

    def __init__(self, args: argparse.Namespace, engine: Engine) -> None:
        if args.num_shots is not None and args.num_shots < 0:
            raise RequestError(f"--num_shots is {args.num_shots}; it must be at least 0")
        self.choices = choice_tokens(engine)
        self._tokenizer = engine.tokenizer
        self.shots: dict[str, int] = {}
        found: list[Item] = []
        for subject, rows, solved in _subjects(args):
            self.shots[subject] = len(solved)
            found += self._items(subject, rows[: args.max_items], solved, engine)
        sizes = [(item.where, len(item.prompt), 1) for item in found]
        self.items = fitting(found, sizes, engine, args.skip_long)
        self.skipped = len(found) - len(self.items)

    def _items(self, subject: str, rows: Sequence[Row], solved: Sequence[Row], engine: Engine) -> list[Item]:
        head = heading(subject) + "".join(example(row.fields, answer=True) for row in solved)
        prompts = [encode(engine.tokenizer, head + example(r.fields), engine.vocab_size, r.where) for r in rows]
        return [
            Item(row.where, subject, prompt + self.choices.prefix, LETTERS.index(row.fields[-1]))
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def run(self, model: Model, items: Sequence[Item], progress: Progress) -> list[Outcome]:
        logprobs = model.choose([item.prompt for item in items], self.choices.tokens, progress)
        return [Outcome(values.index(max(values)), values) for values in logprobs]

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        by_subject: dict[str, list[bool]] = defaultdict(list)
        for item, right in zip(self.items, self._right(outcomes), strict=True):
            by_subject[item.subject].append(right)
        subjects = {name: accuracy(right) | {"num_shots": self.shots[name]} for name, right in by_subject.items()}
        return {
            **accuracy(self._right(outcomes)),
            "macro_accuracy": sum(s["accuracy"] for s in subjects.values()) / len(subjects),
            "chance": 1 / len(LETTERS), "tokens": sum(len(item.prompt) for item in self.items),
            "skipped": self.skipped, "subjects": subjects,
            "choice_tokens": {
                letter: {"id": token, "text": self._tokenizer.decode([*self.choices.prefix, token])}
                for letter, token in zip(LETTERS, self.choices.tokens, strict=True)
            },
        }  # fmt: skip

    def against(self, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, Any]:
        pairs = list(zip(self._right(ours), self._right(theirs), strict=True))
        figures = self.figures(theirs)
        return {
            **{key: figures[key] for key in ("accuracy", "confidence_interval", "correct", "macro_accuracy")},
            **paired_answers(pairs),
            "same_choice": sum(a.chosen == b.chosen for a, b in zip(ours, theirs, strict=True)) / len(pairs),
        }  # fmt: skip

    @staticmethod
    def report(result: dict[str, Any]) -> list[str]:
        lines = []
        if len(result["subjects"]) > 1:
            lines += [
                f"{s['accuracy']:8.2%}  {s['correct']:>5}/{s['items']:<5} {n}" for n, s in result["subjects"].items()
            ]
        low, high = result["confidence_interval"]
        lines.append(
            f"accuracy {result['accuracy']:.2%} (95%: {low:.2%} to {high:.2%}), {result['correct']} of "
            f"{result['items']} questions, mean of subjects {result['macro_accuracy']:.2%}, on {result['device']}"
        )
        tokens = ", ".join(f"{letter} {t['text']!r} = {t['id']}" for letter, t in result["choice_tokens"].items())
        lines.append(f"compared by the tokens {tokens}")
        if reference := result["reference"]:
            lines.append(
                f"reference {reference['accuracy']:.2%}: {result['reference']['difference']:+.2%}; right alone: engine "
                f"{reference['only_engine_right']}, reference {reference['only_reference_right']}; same choice "
                f"{reference['same_choice']:.2%}"
            )
        return lines

    def _right(self, outcomes: Sequence[Outcome]) -> list[bool]:
        return [item.answer == outcome.chosen for item, outcome in zip(self.items, outcomes, strict=True)]


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """The share of right answers with Wilson's 95% interval."""
    correct = sum(right)
    interval = wilson(correct, len(right))
    return {
        "accuracy": correct / len(right), "confidence_interval": interval, "correct": correct, "items": len(right),
    }  # fmt: skip


def heading(subject: str) -> str:
    """MMLU's first lines; its two blanks before the subject are the original's."""
    return f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"


def example(fields: Sequence[str], answer: bool = False) -> str:
    """A question with its choices, and its answer as part of the prompt or to be given."""
    question, *choices, right = fields
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)), "Answer:"]
    return "\n".join(lines) + (f" {right}\n\n" if answer else "")


def choice_tokens(engine: Engine) -> Choices:
    """The first token in which " A", " B", ... differ after "Answer:". Raises RequestError where two never do."""
    asked = engine.tokenizer.encode("\nAnswer:")
    answers = [engine.tokenizer.encode(f"\nAnswer: {letter}") for letter in LETTERS]
    shared = itertools.takewhile(lambda tokens: len({*tokens}) == 1, zip(*answers, strict=False))
    common = [tokens[0] for tokens in shared]
    rest = [answer[len(common) : len(common) + 1] for answer in answers]
    if common[: len(asked)] != asked or len({tuple(r) for r in rest}) < len(LETTERS) or [] in rest:
        raise RequestError(
            f"the tokenizer turns ' A', ' B', ' C', ' D' after 'Answer:' into {[a[-3:] for a in answers]} (ends): no "
            f"token tells all of them apart, so their letters cannot be compared"
        )
    return Choices(common[len(asked) :], [r[0] for r in rest])


def _subjects(args: argparse.Namespace) -> list[tuple[str, list[Row], list[Row]]]:
    """(subject, its questions, the solved ones for its prompt) of a file, or of MMLU's directory."""
    if args.data.is_dir():
        if args.few_shot_file:
            raise RequestError("--few_shot_file goes with --data FILE.csv; a directory has its own in dev/")
        return [(name, rows, _solved(args, dev)) for name, rows, dev in _directory(args)]
    if args.subjects:
        raise RequestError(f"--subjects chooses among the files of a directory, and --data {args.data} is a file")
    return [(_subject(args.data), _questions(args.data), _solved(args, args.few_shot_file))]


def _directory(args: argparse.Namespace) -> list[tuple[str, list[Row], Path]]:
    folder = args.data / "test" if (args.data / "test").is_dir() else args.data
    files = {_subject(path): path for path in sorted(folder.glob("*_test.csv"))}
    if not files:
        raise RequestError(f"--data {args.data} has no test/<subject>_test.csv; give MMLU's directory or one CSV file")
    if unknown := sorted(set(args.subjects or ()) - set(files)):
        raise RequestError(f"--subjects {unknown[0]} is not in {folder}; there are {', '.join(files)}")
    return [
        (name, _questions(path), folder.parent / "dev" / f"{name}_dev.csv")
        for name, path in files.items()
        if name in (args.subjects or files)
    ]


def _solved(args: argparse.Namespace, path: Path | None) -> list[Row]:
    """The first --num_shots questions of the file."""
    wanted: int | None = args.num_shots
    if wanted == 0 or (wanted is None and (path is None or not path.is_file())):
        return []
    if path is None:
        raise RequestError(f"--num_shots {wanted} takes solved questions from --few_shot_file; give it")
    rows = _questions(path)
    if wanted is not None and len(rows) < wanted:
        raise RequestError(f"{path} has {len(rows)} questions; --num_shots is {wanted}")
    return rows[: SHOTS if wanted is None else wanted]


def _questions(path: Path) -> list[Row]:
    rows = csv_rows(path, COLUMNS)
    for row in rows:
        if row.fields[-1] not in LETTERS or len(row.fields[-1]) != 1:
            raise RequestError(f"{row.where}: the answer is {row.fields[-1]!r}; it must be one of {', '.join(LETTERS)}")
    return rows


def _subject(path: Path) -> str:
    name = path.stem
    for split in ("_test", "_val", "_dev"):
        name = name.removesuffix(split)
    return name
