"""fp8-eval: how good an engine is at a task, alone or against the Hugging Face model in float32.

The tasks are in scripts/evaluation/tasks/; here are the flags that they share, the gates and the report. Started by an
MPI launcher, every process takes a part of the items, and the first one prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fp8.builder.engine import write_atomically
from fp8.runtime.llm import LLM
from fp8.runtime.peers import Peers
from fp8.runtime.request import RequestError
from fp8.scripts.argument_types import fraction, new_file, positive
from fp8.scripts.evaluation.models import Engine, Model, Reference
from fp8.scripts.evaluation.statistics import chance_limit
from fp8.scripts.evaluation.task import Task, modules, task_name
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.ranks import among_peers, is_divided, on_all_ranks
from fp8.scripts.run import ERRORS, add_session_arguments
from fp8.scripts.teaching import Teaching

SHARED = ("data", "max_items", "skip_long", "max_ppl_increase", "min_accuracy")  # flags that a task's COMMON may name


def parser() -> argparse.ArgumentParser:
    tasks = modules()
    p = CommandParser(
        "fp8-eval", description="Evaluates an engine at a task.", epilog=_epilog(),
        formatter_class=Teaching,
    )  # fmt: skip
    p.add_argument("--engine_dir", required=True, help="as fp8-build writes it")
    names = ", ".join("/".join((name, *module.ALIASES)) for name, module in tasks.items())
    p.add_argument("--task", type=task_name, default="perplexity", help=f"{names}; default: perplexity")
    p.add_argument("--data", type=Path, help="the task's text, file or directory")
    p.add_argument("--max_items", type=positive, metavar="N", help="use only the first N items (of each subject)")
    p.add_argument(
        "--skip_long", action="store_true", help="leave out items that are too long for the engine, and say how many"
    )
    p.add_argument("--reference", type=Path, help="Hugging Face model directory, run in float32 on the same prompts")
    p.add_argument("--output", type=new_file, help="write the result as JSON")
    gates = p.add_argument_group(
        "gates", "A missed gate ends in status 2; the result is printed and written all the same."
    )
    gates.add_argument(
        "--max_ppl_increase", type=float, metavar="X",
        help="fail if perplexity exceeds the reference's by more than X; 0.01 is 1%%",
    )  # fmt: skip
    gates.add_argument(
        "--min_accuracy", type=fraction, metavar="X", help="fail if accuracy (rouge: F1 of rouge1) is below X, 0 to 1"
    )
    gates.add_argument(
        "--max_regression", type=fraction, metavar="P",
        help="fail if the engine is worse than the reference with p < P (sign test of answers, or paired bootstrap)",
    )  # fmt: skip
    add_session_arguments(p)
    for name, module in tasks.items():
        module.add_arguments(p.add_argument_group(f"--task {name}", " ".join((module.__doc__ or "").split())))
    return p


def _epilog() -> str:
    lines = [f"  fp8-eval --engine_dir engine {module.EXAMPLE}" for module in modules().values()]
    return "\n".join(
        [
            "examples:",
            *lines,
            "  mpirun -n 8 fp8-eval --engine_dir engine ...",
            "",
            "docs/evaluation.md says more.",
        ]
    )


def check_flags(args: argparse.Namespace) -> None:
    """Raises RequestError for a flag that the task does not know, or a gate without what it compares with."""
    takes = modules()[args.task].COMMON
    foreign = set(SHARED) - takes
    for name, module in modules().items():
        other = argparse.ArgumentParser(add_help=False)
        module.add_arguments(other)
        defaults = vars(other.parse_args([]))
        foreign |= {flag for flag, value in defaults.items() if name != args.task and getattr(args, flag) != value}
    given = sorted(flag for flag in foreign if getattr(args, flag) not in (None, False))
    if given:
        raise RequestError(f"--{given[0]} is not a flag of --task {args.task}; fp8-eval --help lists each task's")
    if "data" in takes and args.data is None:
        raise RequestError(f"--task {args.task} needs --data; fp8-eval --help has an example")
    for gate in ("max_ppl_increase", "max_regression"):
        if getattr(args, gate) is not None and args.reference is None:
            raise RequestError(f"--{gate} compares with --reference HF_DIR; give it")


def evaluate(args: argparse.Namespace, peers: Peers) -> dict[str, Any] | None:
    """The result as it is written, on rank 0; None elsewhere."""
    check_flags(args)
    device = own_device(args.device, peers)
    memory = args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction
    world = args.world if peers.world == 1 else None  # peers have an engine each
    engine = Engine(LLM(args.engine_dir, device, *memory, world=world))
    task: Task = modules()[args.task].Task(args, engine)
    session = engine.llm.session
    begin = time.perf_counter()
    ours = outcomes(task, engine, peers, "engine")
    seconds = time.perf_counter() - begin
    theirs = None
    if args.reference:
        reference = Reference(args.reference, str(session.device), session.model.eos_token_ids)
        theirs = outcomes(task, reference, peers, "reference")
    if ours is None:
        return None
    figures = task.figures(ours)
    result = {
        "task": args.task, **figures, "engine_dir": str(args.engine_dir), "format": session.model.format,
        "kv_cache_dtype": session.model.kv_cache_dtype, "device": str(session.device), "processes": peers.world,
        "seconds": seconds, "tokens_per_second": figures["tokens"] / seconds, "reference": None,
    }  # fmt: skip
    if theirs is not None:
        result["reference"] = {"model": str(args.reference), **task.against(ours, theirs)}
    return result | {"warnings": warnings(args, result)}


def outcomes(task: Task, model: Model, peers: Peers, title: str) -> list[Any] | None:
    """The outcomes of all items, in order, on rank 0; every rank runs its share."""
    share = peers.share(task.items)
    with progress(f"{title}, {task.unit}", len(share), peers.rank == 0) as advance:
        return peers.gather(task.run(model, share, advance) if share else [])


@contextmanager
def progress(title: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def own_device(name: str, peers: Peers) -> str:
    """The device of this process: of several on a machine each takes a GPU of its own, unless the user names one."""
    if peers.world == 1 or name not in ("auto", "cuda"):
        return name
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{peers.launch.local_rank % count}" if count else name


def warnings(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """What makes a gate worth less than it seems."""
    if args.min_accuracy is None:
        return []
    limit = result.get("chance_interval", [None, None])[1] if result.get("chance_interval") else None
    if limit is None and "chance" in result and "chance_interval" not in result:
        limit = chance_limit(result["items"], result["chance"])
    if limit is None or args.min_accuracy > limit:
        return []
    return [
        f"--min_accuracy {args.min_accuracy:g} is no gate: with {result['items']} items, guessing alone reaches up to "
        f"{limit:.4f}; give a larger value or more items, or compare with --reference"
    ]


def missed_gates(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    missed, reference = [], result["reference"] or {}
    limit = args.max_ppl_increase
    if limit is not None and not reference["increase"] <= limit:
        missed.append(f"perplexity rose by {reference['increase']:.3%}, more than {limit:.3%}")
    if args.min_accuracy is not None and not result["accuracy"] >= args.min_accuracy:
        missed.append(
            f"{result.get('accuracy_is', 'accuracy')} is {result['accuracy']:.4f}, less than {args.min_accuracy:g}"
        )
    if args.max_regression is not None:
        p = reference["p_value"]
        if p is None:
            missed.append("a single item says nothing about a regression; take more")
        elif p < args.max_regression:
            missed.append(f"the engine is worse than the reference: p = {p:.2g}, less than {args.max_regression:g}")
    return missed


def finish(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """Writes, prints and judges the result; returns the status."""
    if args.output:
        write_atomically(args.output, [json.dumps(result, indent=2).encode() + b"\n"])
    task = modules()[args.task].Task
    print("\n".join(task.report(result)))
    if result["reference"] and result["reference"]["p_value"] is not None:
        print(
            f"p = {result['reference']['p_value']:.3g}: how likely such a loss is by chance if the engine is not worse"
        )
    for warning in result["warnings"]:
        print(f"fp8-eval: warning: {warning}", file=sys.stderr)
    missed = missed_gates(args, result)
    for line in missed:
        print(f"fp8-eval: {line}", file=sys.stderr)
    return 2 if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if is_divided(args.engine_dir):
        return on_all_ranks("fp8-eval", args, lambda args: command(args, Peers()))
    return among_peers("fp8-eval", args, command)


def command(args: argparse.Namespace, peers: Peers) -> int:
    try:
        result = evaluate(args, peers)
        return 0 if result is None else finish(args, result)
    except ERRORS as error:
        if peers.world > 1:
            peers.fail(str(error))
        print(f"fp8-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if peers.world > 1:
            peers.fail("interrupted")
        print("fp8-eval: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
