"""Tensor and pipeline parallelism: all ranks together compute what one does."""

from __future__ import annotations

import pytest
import rank_group
import tiny_checkpoint as tiny
import torch

from fp8.builder.build import Request
from fp8.builder.verify import sqnr

STEPS = [[(list(range(3, 40)), 0), ([7, 300, 11], 0)], [([5], 37), ([9], 3)]]


def request(tp: int = 1, pp: int = 1, **more) -> Request:
    return Request(max_batch_size=4, max_seq_len=128, max_num_tokens=64, target="cpu", tp_size=tp, pp_size=pp, **more)


def logits(source, wanted: Request, fused: bool = False, dtype: str = "float32") -> list[torch.Tensor]:
    places = wanted.places
    if fused:
        graphs = [rank_group.fused(source, wanted, place) for place in places]
    else:
        graphs = [rank_group.emitted(source, wanted, place, dtype) for place in places]
    return rank_group.run(graphs, wanted.tp_size, STEPS)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp8_rowwise"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_compute_what_one_does(tmp_path, tp, format, kv):
    source = tiny.source(tmp_path, tiny.qformat(format, kv))
    one, many = logits(source, request()), logits(source, request(tp))
    for a, b in zip(one, many, strict=True):
        assert sqnr(b, a) >= (100 if (format, kv) == ("bf16", "auto") else 45)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "fp8_rowwise"])
def test_stages_compute_the_same_bits(tmp_path, format, kv):
    """Also fused, in bfloat16: the cut changes no rounding."""
    source = tiny.source(tmp_path, tiny.qformat(format, kv), num_hidden_layers=3)
    for fused in (False, True):
        one = logits(source, request(), fused)
        for layers in ((), (1, 2)):
            many = logits(source, request(pp=2, pp_layers=layers), fused)
            assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_stages_and_ranks_together(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("fp8", "fp8"))
    for fused in (False, True):
        two, four = logits(source, request(2), fused), logits(source, request(2, 2), fused)
        assert all(torch.equal(a, b) for a, b in zip(two, four, strict=True))
