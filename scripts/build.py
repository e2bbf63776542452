"""fp8-build: checkpoint -> engine directory."""

from __future__ import annotations

import argparse
import functools
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fp8.builder import budget, build
from fp8.builder.checkpoint import Checkpoint, CheckpointError
from fp8.builder.engine import Plan
from fp8.builder.export import ExportError, export
from fp8.builder.formats.base import FormatError
from fp8.builder.measure import TuneError
from fp8.builder.parallel import ranks
from fp8.builder.parallel.ranks import Built
from fp8.builder.parallel.split import SplitError
from fp8.builder.plan import LegalityError
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.taps import TapError
from fp8.builder.target import TARGETS
from fp8.builder.verify import VerificationError
from fp8.builder.workplace import BuildError, check_output
from fp8.models import config as models
from fp8.models.config import ConfigError
from fp8.plugins.base import PluginError
from fp8.plugins.gemm.types import ACCUMULATIONS
from fp8.scripts.argument_types import new_file, positive
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.printing import printing
from fp8.scripts.progress import stages
from fp8.scripts.teaching import Teaching

ERRORS = (
    BuildError, CheckpointError, ConfigError, ExportError, FormatError, LegalityError, PluginError, SplitError,
    TapError, TuneError, VerificationError,
)  # fmt: skip
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FP8_ALL_REDUCE = 4096  # KiB: of two H200s' sums, 2 MB take longer so and 8 MB do not
EXAMPLES = """\
examples:
  fp8-build --checkpoint_dir ckpt --dry_run                        what memory it will take; is every layer legal?
  fp8-build --checkpoint_dir ckpt --output_dir engine --max_batch_size 64 --max_seq_len 2048
  fp8-build --checkpoint_dir ckpt --output_dir engine --verify     did a pass change the result?
  fp8-build --checkpoint_dir ckpt --explain model.layers.0.mlp.up_proj
  fp8-build --checkpoint_dir ckpt --output_dir engine --tp_size 4 --workers 4

Then: fp8-run --engine_dir engine --input_text TEXT, fp8-serve, fp8-eval, fp8-inspect
"""
LOG_LEVELS = ("error", "warning", "info", "verbose")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser("fp8-build", description=__doc__, epilog=EXAMPLES, formatter_class=Teaching)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="as fp8-quantize or Hugging Face writes it")
    parser.add_argument("--output_dir", type=Path, help="engine directory; an existing engine is replaced")
    parser.add_argument(
        "--strongly_typed", action=argparse.BooleanOptionalAction, default=True,
        help="every op runs in the types of the graph (default). --no-strongly_typed permits a higher precision where "
        "that is faster; no tactic makes use of it yet, so the engine is the same",
    )  # fmt: skip
    parser.add_argument("--max_batch_size", type=int, default=64, help="sequences that run at the same time")
    parser.add_argument("--max_seq_len", type=int, help="tokens per sequence, prompt included (default: the model's)")
    parser.add_argument("--max_num_tokens", type=int, default=8192, help="tokens per step")
    parser.add_argument("--tp_size", type=int, default=1, help="ranks that share every layer (tensor parallelism)")
    parser.add_argument("--pp_size", type=int, default=1, help="stages of layers, one after the other (pipeline)")
    parser.add_argument(
        "--pp_layers", type=layer_counts, default=(), metavar="N,N,...",
        help="layers of each stage, such as 20,20,24,16 (default: as evenly as possible)",
    )  # fmt: skip
    parser.add_argument("--workers", type=positive, default=1, help="ranks to build at a time, each in a process")
    parser.add_argument("--rank", type=int, help="the rank that --explain looks at (default: 0)")
    parser.add_argument(
        "--target", default="sm_90a", help=f"one of {', '.join(TARGETS)}; every engine runs on a CPU too"
    )
    parser.add_argument(
        "--dtype", choices=("float32",), help="type of the activations (default: the checkpoint's). float32 needs "
        "--target cpu: nothing is then rounded but to FP8, which gives a reference to compare with",
    )  # fmt: skip
    parser.add_argument(
        "--fp8_accumulation", choices=ACCUMULATIONS, default="fast", help="how FP8 linears sum: as the tensor cores "
        "do, with some 14 bits (fast, default), or in float32 after every 128 of K (precise)",
    )  # fmt: skip
    parser.add_argument(
        "--fp8_all_reduce", type=int, nargs="?", const=FP8_ALL_REDUCE, default=0, metavar="KIB",
        help="with --tp_size: send sums over ranks of KIB or more as E4M3, with a scale per 128 channels. Faster, but "
        f"changes numbers (without a size: {FP8_ALL_REDUCE}; default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check every layer and print the memory budget, but compile and write nothing; status 1 if it does not "
        "fit --gpu_memory",
    )
    parser.add_argument("--verify", action="store_true", help="check on random steps that no pass changes the result")
    parser.add_argument(
        "--tune", action="store_true", help="time the tactics on this machine's GPU, and keep the winners"
    )
    parser.add_argument(
        "--explain", metavar="NODE", help="say why each pattern did or did not match at this node; builds nothing"
    )
    parser.add_argument("--dump_passes", type=Path, metavar="DIR", help="write the graph after every pass as text")
    parser.add_argument(
        "--enable_debug_output", action="store_true",
        help="make tensors available to fp8-run --debug_mode: those that the model registers and those of "
        "--debug_tensors",
    )  # fmt: skip
    parser.add_argument(
        "--debug_tensors", nargs="+", default=[], metavar="GLOB", help="which, such as 'model.layers.*.mlp.*'"
    )
    parser.add_argument(
        "--export_onnx", type=new_file, metavar="FILE", help="write the quantize/dequantize graph as ONNX"
    )
    parser.add_argument(
        "--export_dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="type of the exported activations (onnxruntime's CPU wants float32, the default)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu_memory", default="139G", help="memory of the card that the budget is for (default: 139G, an H200's)"
    )
    parser.add_argument("--log_level", default="info", choices=LOG_LEVELS, help="how much to print")
    options = parser.parse_args(arguments)
    if options.output_dir is None and not (options.dry_run or options.explain or options.export_onnx):
        parser.error("--output_dir is needed, except with --dry_run, --explain or --export_onnx")
    if options.debug_tensors and not options.enable_debug_output:
        parser.error("--debug_tensors needs --enable_debug_output")
    if options.rank is not None and not options.explain:
        parser.error("--rank is the rank that --explain looks at; give --explain, or leave it out: all ranks are built")
    return options


def layer_counts(text: str) -> tuple[int, ...]:
    """`20,20,24,16`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers per stage such as 20,20,24,16") from error


def memory_size(text: str) -> int:
    """Bytes of `80G`, `141GiB`, `1024`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text)
    if not found:
        raise BuildError(f"gpu_memory {text!r} is no size; expected one like 80G")
    return int(float(found[1]) * UNITS[found[2]])


def run(options: argparse.Namespace, console: Console) -> None:
    """Builds as asked. Raises one of ERRORS."""
    request = Request(
        options.max_batch_size, options.max_seq_len, options.max_num_tokens, options.target, options.verify,
        options.tune, options.dump_passes, options.explain,
        tuple(options.debug_tensors) if options.enable_debug_output else None, options.tp_size, options.pp_size,
        options.pp_layers, options.fp8_accumulation, options.fp8_all_reduce, options.dtype,
    )  # fmt: skip
    card = memory_size(options.gpu_memory)
    source = open_source(options.checkpoint_dir)
    if options.output_dir:
        check_output(options.output_dir)
    if options.explain:
        print("\n".join(build.explain(source, request, request.place(options.rank or 0))))
        return
    if options.export_onnx:
        export(source, options.export_onnx, options.export_dtype, source.limits(request).max_seq_len)
        told = f"{options.export_onnx}: the graph as ONNX, activations in {options.export_dtype}"
        console.print(told, markup=False, soft_wrap=True)
    if options.output_dir or options.dry_run:
        _build(options, source, request, card, console)


def open_source(directory: Path) -> Source:
    checkpoint = Checkpoint(directory)
    return Source(models.load(checkpoint.config), checkpoint)


def _build(options: argparse.Namespace, source: Source, request: Request, card: int, console: Console) -> None:
    level = LOG_LEVELS.index(options.log_level)
    with stages(console, disable=level < LOG_LEVELS.index("info")) as (show, above):
        talkative = level >= LOG_LEVELS.index("verbose") or options.verify or options.tune
        reporter = Reporter(
            show,
            (lambda text: above.print(text, markup=False)) if talkative and level >= 2 else lambda text: None,
            (lambda text: above.print(f"warning: {text}", markup=False)) if level >= 1 else lambda text: None,
        )
        built = _engines(options, source, request, reporter)
    if level >= LOG_LEVELS.index("info"):
        _summary(built, card, console)
    if options.dry_run:
        if request.target != "cpu":
            budget.check_fits(ranks.largest([b.plan for b in built]), card)
    elif level >= LOG_LEVELS.index("info"):
        of = f" of {len(built)} ranks" if len(built) > 1 else ""
        told = f"{options.output_dir}: {source.format.name} engine{of} for {request.target}"
        console.print(told, markup=False, soft_wrap=True)


def _engines(options: argparse.Namespace, source: Source, request: Request, reporter: Reporter) -> list[Built]:
    """Builds the engines of all ranks."""
    if len(request.places) == 1:
        compiled = build.compile(source, request, reporter, options.dry_run)
        if not options.dry_run:
            build.write(compiled, source, options.output_dir, reporter)
        return [Built(compiled.plan, compiled.taps.lines() if compiled.taps.taken else [])]
    if options.dry_run:
        return ranks.dry_run(source, request, reporter)
    again = functools.partial(open_source, options.checkpoint_dir)
    return ranks.build_ranks(again, request, options.output_dir, reporter, options.workers, ERRORS)


def _summary(built: list[Built], card: int, console: Console) -> None:
    plan = ranks.largest([b.plan for b in built])
    pairs = plan.fusion_report
    left = [p for p in pairs if not p["folded"]]
    console.print(f"{len(plan.steps)} steps, {len(pairs)} quantize/dequantize pairs, {len(left)} left unfolded")
    remarks = next(b.remarks for b in built if b.plan is plan)
    for line in remarks:
        console.print(line, markup=False, soft_wrap=True)
    if len(built) > 1:
        console.print(_shares([b.plan for b in built]))
    where = f"memory of rank {plan.compatibility.rank}, the largest" if len(built) > 1 else "memory"
    table = Table(where, "size", title=None)
    for row in budget.lines(plan, card):
        table.add_row(*row)
    console.print(table)


def _shares(plans: Sequence[Plan]) -> Table:
    """What of the model every rank has."""
    shares = [(p.compatibility.rank, p.share) for p in plans if p.share]
    axes = list(dict.fromkeys(axis for _, share in shares for axis in share.axes))
    table = Table("rank", "layers", *axes)
    for rank, share in shares:
        parts = (share.layers, *(share.axes.get(axis) for axis in axes))
        table.add_row(str(rank), *(f"{p[0]}-{p[1] - 1}" if p else "-" for p in parts))
    return table


@printing("fp8-build")
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves nothing half-written, as Ctrl-C
    try:
        run(options, Console(stderr=True))
    except ERRORS as error:
        print(f"fp8-build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-build: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
