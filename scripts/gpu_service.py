"""The runtime on the GPU: what it must keep true under load, on engines of the bundled example.

    python -m fp8.scripts.gpu_service --work_dir DIR --output service.json

Quantizes and builds the example in BF16 and in FP8 with FP8 KV, without and with debug tensors, and checks of each that
requests arriving at random on a pool too small for them give the text that each has alone and lose no block; that a
seed fixes a text whatever the batch, with every sampling option in it, and no option waits for the device; that beam
search finds what transformers finds; that shared prefixes, debug tensors, streaming and cancelling change nothing; and
that `fp8-inspect compare` holds the engine against its Hugging Face model.

Kernels sum in another order for another number of rows, so texts may part where two tokens are all but equal: a greedy
text where the log-probabilities of the best two, alone, differ by less than 0.05; a sampled one where noise of 0.05 on
the logits leads to the other token; a beam search where searches with such noise end as far away. With FP8 it is 0.4
and 0.2: a code that is rounded to its other side changes much at once, though seldom. Every such place is reported.
Exits with 1 if anything else is found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.runtime.llm import LLM
from fp8.scripts.argument_types import new_file
from fp8.scripts.provenance import add_argument, save_results
from fp8.scripts.quickstart import EXAMPLES, StepFailed, Variant, command
from fp8.scripts.service_checks.beams import beams
from fp8.scripts.service_checks.engine import Engine
from fp8.scripts.service_checks.load import prefixes, random_arrivals, streaming
from fp8.scripts.service_checks.outputs import against_hugging_face, debug_outputs
from fp8.scripts.service_checks.sampling import options_without_a_wait, sampling

CHECKS: list[Callable[[Engine], tuple[bool, dict[str, Any]]]] = [
    random_arrivals, sampling, options_without_a_wait, beams, prefixes, streaming, debug_outputs, against_hugging_face
]  # fmt: skip
MODEL = EXAMPLES / "tiny-python-llama"
VARIANTS = [Variant("bf16", "bf16"), Variant("fp8", "fp8", "fp8")]
# Taps of buffers that are stored anyway, and taps inside the fused MLP, which then runs in two steps.
TAPS = {"stored": ("*/attention_residual", "*.k_proj/output"), "inside": ("model.layers.*.mlp.*",)}


def built(args: argparse.Namespace) -> Iterator[Engine]:
    """The example's engines. All quantizing, then all building side by side: each is a process of its own."""
    target, work = "cpu" if args.device == "cpu" else "sm_90a", args.work_dir
    taps: dict[str, list[str]] = {"engine": []}
    taps |= {kind: ["--enable_debug_output", "--debug_tensors", *globs] for kind, globs in TAPS.items()}

    def quantize(variant: Variant) -> None:
        command(
            variant, "quantize", "--model_dir", MODEL, "--qformat", variant.qformat, "--kv_cache_dtype",
            variant.kv_cache_dtype, "--calib_dataset", EXAMPLES / "calibration.txt", "--calib_size", 32,
            "--device", args.device, "--output_dir", work / variant.name / "checkpoint", "--overwrite",
        )  # fmt: skip

    def build(job: tuple[Variant, str]) -> None:
        variant, kind = job
        command(
            variant, "build", "--checkpoint_dir", work / variant.name / "checkpoint", "--output_dir",
            work / variant.name / kind, "--target", target, "--max_batch_size", 32, "--max_seq_len", 512,
            "--max_num_tokens", 256, "--log_level", "warning", *taps[kind],
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(quantize, VARIANTS))
        list(pool.map(build, [(v, kind) for v in VARIANTS for kind in taps]))
    for variant in VARIANTS:
        tapped = {kind: work / variant.name / kind for kind in TAPS}
        directory = work / variant.name / "engine"
        tokenizer = LLM(directory, args.device, 8).tokenizer
        assert tokenizer is not None
        tokens = tokenizer.encode((EXAMPLES / "heldout.txt").read_text(encoding="utf-8")[:60000])
        dumps = work / variant.name / "dumps"
        yield Engine(variant.name, directory, args.device, args.requests, tokens, MODEL, tapped, dumps)


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for engine in built(args):
        for check in CHECKS:
            begin = time.perf_counter()
            try:
                passed, figures = check(engine)
            except Exception as error:  # the other checks are to be seen all the same
                passed, figures = False, {"error": f"{type(error).__name__}: {error}"}
            seconds = round(time.perf_counter() - begin, 2)
            yield {"name": f"{engine.name}: {check.__name__}", "passed": passed, "figures": figures, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser("gpu_service", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--work_dir", type=Path, required=True, help="checkpoints, engines and dumps go here")
    p.add_argument("--output", type=new_file, help="write the results as JSON")
    p.add_argument("--device", default="cuda", help="cuda (default), or cpu: slowly, to try the checks themselves")
    p.add_argument("--requests", type=int, default=200, help="that arrive at random (default: 200)")
    add_argument(p)
    args = p.parse_args(argv)
    console, found = Console(width=160), []
    try:
        for result in results(args):
            found.append(result)
            mark = "passed" if result["passed"] else "FAILED"
            console.print(f"{result['name']}: {mark} in {result['seconds']} s: {result['figures']}", markup=False)
    except StepFailed as error:
        print(f"gpu_service: {error}", file=sys.stderr)
        return 1
    table = Table("check", "passed", "seconds")
    for r in found:
        table.add_row(r["name"], "yes" if r["passed"] else "NO", f"{r['seconds']:.1f}")
    console.print(table)
    if args.output:
        save_results(args.output, "gpu_service", argv, args.commit, {"checks": found})
    return 0 if found and all(r["passed"] for r in found) else 1


if __name__ == "__main__":
    sys.exit(main())
