"""What is aimed at on several H200s of one host, and what others reach there: one entry per row of their record.

Anchors were measured on two H200s with NVLink (18 links): NCCL 2.28, torch's symmetric memory (one-shot, two-shot).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fp8.scripts.benchmarks.targets import FP8, Target, values

NCCL_US = {8: 9.7, 32: 10.2, 128: 10.4, 512: 13.1, 2048: 29.7, 8192: 47.6, 32768: 143.8}  # KiB of bfloat16
SYMMETRIC_US = {8: 6.4, 32: 7.2, 128: 7.3, 512: 8.0, 2048: 13.0}
FIGURES = (("tokens/s", "tokens/s", True), ("first token ms", "ms", False), ("time per token ms", "ms", False))
MESSAGES = (8, 8192)
FUSED_US = {8: 7.0, 512: 10.0}  # with residual, norm and quantization
NCCL_AND_NORM_US = {8: 12.4}
FP8_RATIO = {8192: 1.4, 32768: 1.4}  # the same sum with e4m3 on the wire
STRESS = 10_000
DECIBEL = {"bf16": 35.0, "fp8": 25.0, FP8: 25.0}
PERPLEXITY = 0.003
TP_TIME, PP_RATE = 0.65, 1.6  # of one GPU's
LLAMA_70B_MS = 11.5
WIDE = {"llama-7b": 11008, "llama-2-70b": 28672}  # models of few layers whose steps are compared, the size of their MLP
WAYS, NEAR_NCCL = ("launches", "one launch"), 12.0


def targets(gpus: int) -> list[Target]:
    """Anchors and targets of speed are those of two GPUs; with more, the same rows stand without."""
    models, sums = ([*rows] if gpus == 2 else [*map(_told, rows)] for rows in (_models(gpus), _all_reduce()))
    timed = (
        f"llama-7b {FP8}",
        f"llama-7b {FP8} tp {gpus}",
        f"llama-7b {FP8} pp {gpus}",
        f"llama-2-70b {FP8} tp {gpus}",
    )
    return [*_engines(gpus), *_wide(gpus), *models, *values("ranks: values", timed), *_right(), *sums]


def _told(t: Target) -> Target:
    return Target(t.section, t.name, t.unit, t.figures, None, t.at_least, over=t.over)


def size(kib: int) -> str:
    return f"{kib} KB" if kib < 1024 else f"{kib // 1024} MB"


def _engines(gpus: int) -> Iterator[Target]:
    """An engine of several ranks against one of one."""
    for kind, decibel in DECIBEL.items():
        for place in (f"tp {gpus}", f"pp {gpus}"):
            key = f"example {kind}, {place}"
            name = f"{key}: logits, SQNR to one rank's"
            yield Target("ranks: engines", name, "dB", (name,), decibel)
            name = f"{key}: perplexity, off one rank's"
            yield Target("ranks: engines", name, "", (name,), PERPLEXITY, False)


def _wide(gpus: int) -> Iterator[Target]:
    """Whole steps of wide models, by every way through them."""
    for model, mlp in WIDE.items():
        key = f"{model} of few layers, tp {gpus}"
        for what, most in (("steps", None), ("steps with other bits, or not finite", 0)):
            name = f"{key}: {what}"
            yield Target("ranks: steps", name, "steps", (name,), most, most is None)
        for way in WAYS if mlp // gpus % 128 == 0 else WAYS[:1]:  # one launch takes shares in multiples of 128
            name = f"{key}, {way}: logits, SQNR to NCCL's"
            yield Target("ranks: steps", name, "dB", (name,), NEAR_NCCL)


def _models(gpus: int) -> Iterator[Target]:
    def key(place: str, batch: int, model: str = "llama-7b") -> str:
        return f"{model} {FP8}{place}, 1024 in, 128 out, batch {batch}"

    for batch in (1, 64):
        for place in ("", f" tp {gpus}", f" pp {gpus}"):
            for figure, unit, good in FIGURES:
                name = f"{key(place, batch)}: {figure}"
                yield Target("ranks: models", name, unit, (name,), None, good)
    one, many = (f"{key(place, 1)}: time per token ms" for place in ("", f" tp {gpus}"))
    name = f"llama-7b {FP8}, batch 1: time per token, tp {gpus} over one GPU"
    yield Target("ranks: models", name, "x", (many,), TP_TIME, False, over=(one,))
    one, many = (f"{key(place, 64)}: tokens/s" for place in ("", f" pp {gpus}"))
    name = f"llama-7b {FP8}, batch 64: tokens/s, pp {gpus} over one GPU"
    yield Target("ranks: models", name, "x", (many,), PP_RATE, over=(one,))
    name = f"{key(f' tp {gpus}', 1, 'llama-2-70b')}: time per token ms"
    yield Target("ranks: models", name, "ms", (name,), LLAMA_70B_MS, False)


def _right() -> Iterator[Target]:
    section = "all-reduce"
    for what, target in (("checks", None), ("failures", 0)):
        name = f"all_reduce, every tactic: {what}"
        yield Target(section, name, what, (name,), target, what == "checks")
    name = "all_reduce, in turn: launches at varied sizes"
    yield Target(section, name, "launches", (name,), STRESS)
    name = "all_reduce, in turn: wrong results"
    yield Target(section, name, "results", (name,), 0, False)


def _all_reduce() -> Iterator[Target]:
    section = "all-reduce"
    for kib, nccl in NCCL_US.items():
        peer, whose = min((nccl, "NCCL"), (SYMMETRIC_US.get(kib, nccl), "torch symmetric memory"))
        whose = whose if kib in SYMMETRIC_US else "NCCL"
        name = f"all_reduce {size(kib)}: us"
        yield Target(section, name, "us", (name,), peer, False, peer, whose)
    for kib in MESSAGES:
        yield Target(section, f"send {size(kib)}: us", "us", (f"send {size(kib)}: us",), None, False)
    for kib, us in FUSED_US.items():
        name, apart = f"all_reduce fused {size(kib)}: us", NCCL_AND_NORM_US.get(kib)
        yield Target(section, name, "us", (name,), us, False, apart, "NCCL and a norm" if apart else "")
    yield from _in_fp8(tuple(FP8_RATIO))


def _in_fp8(sizes: Sequence[int]) -> Iterator[Target]:
    for kib in sizes:
        name = f"all_reduce {size(kib)}, e4m3 on the wire: times as fast"
        figures = (f"all_reduce {size(kib)}: us",), (f"all_reduce fp8 {size(kib)}: us",)
        yield Target("all-reduce", name, "x", figures[0], FP8_RATIO[kib], over=figures[1])
        name = f"all_reduce fp8 {size(kib)}: SQNR"
        yield Target("all-reduce", name, "dB", (name,), None)
