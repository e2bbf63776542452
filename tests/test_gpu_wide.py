"""What tells right steps of several ranks from wrong ones, where there is no GPU."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8.builder.engine import Limits
from fp8.runtime.request import RequestError
from fp8.scripts import gpu_wide
from fp8.scripts.benchmarks import figures, rank_targets
from fp8.scripts.gpu_wide import LENGTHS, Model, Steps, verdict, worst_db

EXPECTED = torch.randn(40, 8, 100, generator=torch.Generator().manual_seed(1))


def near(db: float = 15.0) -> torch.Tensor:
    noise = torch.randn(EXPECTED.shape, generator=torch.Generator().manual_seed(2))
    noise *= EXPECTED.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return EXPECTED + noise * 10 ** (-db / 20)


def met(logits: torch.Tensor, unsteady: int = 0, ranks_differ: bool = False) -> bool:
    return bool(verdict(Steps(logits, unsteady), Steps(EXPECTED, 0), ranks_differ)["met"])


def test_steps_are_near_in_every_row_and_the_same_each_time() -> None:
    assert met(EXPECTED) and met(near())
    assert worst_db(near(), EXPECTED) == pytest.approx(15, abs=0.01) and worst_db(EXPECTED, EXPECTED) == math.inf
    assert not met(near(11.0)) and not met(near(), unsteady=1) and not met(near(), ranks_differ=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_value_that_is_not_finite_is_found(value: float) -> None:
    logits = near()
    logits[7, 3, 50] = value
    row = verdict(Steps(logits, 0), Steps(EXPECTED, 0), False)
    assert not row["met"] and row["not_finite"] == 1 and row["worst_db"] == -math.inf
    row = verdict(Steps(near(), 0), Steps(logits, 0), False)
    assert not row["met"], "nor is anything near to it"


@pytest.mark.parametrize("row", [EXPECTED[7, 4], torch.zeros(100), EXPECTED[7, 3].flip(0)])
def test_a_single_wrong_row_is_found(row: torch.Tensor) -> None:
    """Another sequence's, none, the columns in another order: however right the others are."""
    logits = EXPECTED.clone()
    logits[7, 3] = row
    found = verdict(Steps(logits, 0), Steps(EXPECTED, 0), False)
    assert found["worst_db"] < 3 and found["same_bits"] == 39 and not found["met"]


def session(**changes: Any) -> Any:
    limits = {"max_batch_size": 64, "max_seq_len": 2048, "max_num_tokens": 8192, **changes}
    return SimpleNamespace(limits=Limits(**limits), num_blocks=200, model=SimpleNamespace(vocab_size=320))


def test_steps_follow_the_prompts_and_no_two_sequences_share_a_block() -> None:
    kinds = Model(session(), 5, 2).kinds()
    ((prompts, (step,)), *decodes) = kinds.items()
    assert prompts == f"{sum(LENGTHS)} of prompts" and sorted(r.count for r in step) == sorted(LENGTHS)
    singles = [row.count == 1 for row in step]
    assert singles == sorted(singles, reverse=True), "single tokens come first"
    assert [name for name, _ in decodes] == ["decode 1", "decode 8", "decode 16"]
    for _, steps in decodes:
        for i, rows in enumerate(steps):
            assert [(r.start, r.count) for r in rows] == [(n + i, 1) for n in LENGTHS[: len(rows)]]
    blocks = [b for r in step for b in r.request.blocks]
    assert len(set(blocks)) == len(blocks) <= gpu_wide.blocks_needed(5)


@pytest.mark.parametrize("change", [{"max_batch_size": 8}, {"max_seq_len": 1001}, {"max_num_tokens": 2048}])
def test_an_engine_that_is_too_small_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="expected at least 1005, 16, 3597 and"):
        Model(session(**change), 5, 2)


def test_the_record_has_a_row_for_every_way() -> None:
    def row(way: str, **facts: Any) -> dict[str, Any]:
        right = {"steps": 40, "not_finite": 0, "unsteady": 0, "ranks_differ": False, "worst_db": 15.0, "tp_size": 2}
        return {"engine": "few-llama-2-70b", "way": way, **right, **facts}

    rows = [row("nccl", worst_db=300.0), row("launches"), row("one launch", worst_db=13.0), row("one launch")]
    rows += [row("launches", not_finite=3, unsteady=2), row("launches", ranks_differ=True)]
    found = figures.figures({"wide": {"command": "gpu_wide few-llama-2-70b", "rows": rows}})
    key = "llama-2-70b of few layers, tp 2"
    assert found[f"{key}: steps"] == 240 and found[f"{key}: steps with other bits, or not finite"] == 45
    assert found[f"{key}, one launch: logits, SQNR to NCCL's"] == 13.0
    wanted = {t.name for t in rank_targets.targets(2) if "few layers" in t.name and "70b" in t.name}
    assert wanted <= set(found)


def test_steps_that_were_repeated_are_counted_over_all_files_of_an_engine() -> None:
    row = {"batch_size": 1, "input_len": 1, "output_len": 1, "tokens_per_second": 1.0, "first_token_ms": 1.0}
    row |= {"time_per_output_token_ms": 1.0, "fraction_of_bound": None}
    values = {"repeated_steps": 44, "unsteady_steps": 0, "not_finite_steps": 1}
    document = {"command": "fp8-bench latency", "mode": "latency", "results": [row | values, row | values]}
    roofline = {"command": "fp8-bench roofline", "mode": "roofline", "results": [values, {"kernel": "x"}]}
    found = figures.figures({"llama-7b": document, "llama-7b-roofline": roofline})
    assert found["llama-7b fp8 + fp8 kv: equal steps"] == 132
    assert found["llama-7b fp8 + fp8 kv: equal steps with other bits, or not finite"] == 3
