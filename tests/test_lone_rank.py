"""A rank's kernel by itself: what it is held against, and what lies there of the others."""

import torch

from fp8.plugins.all_reduce.region import LAYERS_SUMS, layers_area
from fp8.plugins.base import StepShape, load
from fp8.plugins.decode_layers.plugin import DecodeLayers
from fp8.plugins.decode_layers_ranks.cases import CASES
from fp8.plugins.hand_on.cases import CASES as HANDED
from fp8.scripts.benchmarks.case_buffers import CaseBuffers
from fp8.scripts.benchmarks.checks import Chosen
from fp8.scripts.benchmarks.lone_rank import LoneRank, runs_alone


def test_the_kernels_that_run_alone_are_checked_with_all_others() -> None:
    names = {name for name, _ in Chosen().cases()}
    assert {"hand_on", "decode_layers_ranks", "decode_layers", "fetch"} <= names
    assert not {"all_reduce", "all_gather", "all_reduce_norm_quant", "gemm_send"} & names  # they need others
    assert not runs_alone(load("decode_layers_ranks")(2, 1, 128, 1.0, layers=3, world=2))


def test_with_silent_others_a_rank_computes_what_one_alone_would() -> None:
    """Its share, rounded, is the whole sum."""
    case = CASES[0]
    found = CaseBuffers(case, 3, "cpu").expected
    alone = {name: value for name, value in case.plugin.attributes().items() if name != "world"}
    given = case.make(torch.Generator().manual_seed(3), "cpu")
    expected = DecodeLayers(**alone).reference(*given, step=case.step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


def test_one_rank_gets_its_own() -> None:
    buffers = CaseBuffers(HANDED[0], 3, "cpu")
    assert torch.equal(buffers.expected[0], buffers.given[0])


def test_every_word_that_a_launch_awaits_is_there_before_it() -> None:
    """sums.cuh: the share of rank r to the sum behind o (0) or down (1) of the layer with a tag lies in place
    2 * sum + tag % 2, r rows further; `launches` counts the layers of all launches before."""
    case = CASES[1]
    comm, hidden = LoneRank(case.plugin, "cpu"), 256
    tensors = case.make(torch.Generator().manual_seed(3), "cpu")
    awaited = []

    class Bound(type(case.plugin)):  # type: ignore[misc]
        def bind(self, *arguments, comm):
            words = comm.memory[0][layers_area(2) :].view(torch.int32)

            def launch(step: StepShape) -> None:
                for tag in range(int(words[0]) + 1, int(words[0]) + 1 + self.layers):
                    for behind in (0, 1):
                        share = LAYERS_SUMS // 4 + ((behind * 2 + tag % 2) * 2 + 1) * hidden
                        awaited.append((words[share : share + hidden] == tag << 16).all())
                words[0] += self.layers

            return launch

    comm.plugin = Bound(**case.plugin.attributes())
    launch = comm.bind(None, [], tensors, None)
    for _ in range(3):
        launch(case.step)
    assert len(awaited) == 3 * 2 * 2 and all(awaited)
