"""A pipeline's messages and inputs on GPUs, without a GPU: who may send when, which way, and what a step fetches."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fp8.builder.engine import Limits
from fp8.plugins.fetch.plugin import Fetch
from fp8.plugins.hand_on import launch as hand_on
from fp8.runtime.links import GpuLinks, Returned
from fp8.runtime.policy import STEP_COSTS, Chunks
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.step_inputs import Packer, StepInputs

# A stage's GPU runs its operations in order: ("send" | "receive", message). Messages of one name arrive in order.
Program = list[tuple[str, str]]


def programs(stages: int, steps: list[tuple[bool, int]]) -> list[Program]:
    """Of every stage, for steps that sample or not and take in the tokens of so many steps before."""
    found: list[Program] = [[] for _ in range(stages)]
    links = SimpleNamespace(take_sampled=lambda _: found[0].append(("receive", "sampled")))
    returned = Returned(links, None, stages)  # type: ignore[arg-type]
    for samples, behind in steps:
        returned.begin(samples, behind)
        for stage, program in enumerate(found):
            small = "hidden" if samples else "bulk"
            if stage:
                program.append(("receive", f"{small} {stage - 1}"))
            if stage < stages - 1:
                program.append(("send", f"{small} {stage}"))
            elif samples:
                program.append(("send", "sampled"))
    returned.finish()
    return found


def most_under_way(found: list[Program], source: random.Random | None) -> int:
    """Messages through peer memory of one name that are sent and not received, at most. Whose turn it is is drawn; or
    the first stage gets on as far as it can."""
    places, under_way, most = [0] * len(found), Counter[str](), 0
    while any(place < len(program) for place, program in zip(places, found, strict=True)):
        able = [
            stage
            for stage, (place, program) in enumerate(zip(places, found, strict=True))
            if place < len(program) and (program[place][0] == "send" or under_way[program[place][1]])
        ]
        assert able, "nobody gets on"
        stage = source.choice(able) if source else able[0]
        what, name = found[stage][places[stage]]
        under_way[name] += 1 if what == "send" else -1
        places[stage] += 1
        if not name.startswith("bulk"):
            most = max(most, under_way[name])
    return most


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_place_for_a_message_is_filled_before_it_is_empty(stages: int) -> None:
    source, found = random.Random(stages), []
    for _ in range(200):
        steps = [(source.random() < 0.7, source.choice([0, *range(stages + 3)])) for _ in range(30)]
        found += [most_under_way(programs(stages, steps), order) for order in (None, source)]
    assert max(found) == stages, "as many as there are places, and no fewer would do"


class Way:
    def __init__(self) -> None:
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.log.append(name)


def test_small_messages_of_steps_that_sample_go_through_peer_memory() -> None:
    links = GpuLinks.__new__(GpuLinks)
    nccl, hidden, sampled = Way(), Way(), Way()
    links._ring, links._before, links._after = nccl, 0, 0  # type: ignore[assignment]
    links.hidden = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    few, many = (links.hidden[:n] for n in (512, 513))
    assert few.nbytes == hand_on.LARGEST
    for channels, expected in ((SimpleNamespace(hidden=hidden, sampled=sampled), 1), (None, 0)):
        links._channels = channels  # type: ignore[assignment]
        for way in (nccl, hidden, sampled):
            way.log.clear()
        for rows, samples in ((few, True), (few, False), (many, True)):
            links.send(rows, samples)
            received = links.receive(len(rows), samples)
            assert received is not None and received.data_ptr() == rows.data_ptr()
        links.return_sampled(torch.zeros(65, dtype=torch.int32))
        links.take_sampled(torch.zeros(65, dtype=torch.int32))
        assert hidden.log == sampled.log == ["send", "receive"] * expected
        assert nccl.log == ["send", "receive"] * (4 - 2 * expected)


def test_a_step_fetches_what_it_reads() -> None:
    """Of the host's buffers in turn; what lies behind stays as it is."""
    limits, source = Limits(4, 192, 100), random.Random(1)
    inputs, packer, copies = StepInputs(limits, torch.device("cpu"), 1), Packer(limits), 3
    _, fields, buffer, turn = inputs.to_fetch
    staging = torch.zeros(copies, len(buffer), dtype=torch.uint8)
    for step in range(7):
        buffer.random_(256)
        requests = [Request(i, [9] * source.randint(1, 90), SamplingParams(), 99) for i in range(1 + step % 4)]
        for request in requests:
            request.slot, request.blocks = request.id, [source.randrange(99) for _ in range(3)]
        counts = [1] * (step % 3) + [source.randint(2, 20) for _ in requests]
        rows = [Row(r, 0, min(n, len(r.tokens)), True, 0) for r, n in zip(requests, counts, strict=False)]
        rows.sort(key=lambda row: row.count > 1)
        shape = packer.pack(rows, inputs.host[0])
        packed = {name: values.copy() for name, values in packer.live(shape, inputs.host[0]).items()}
        staging[step % copies] = buffer
        buffer.fill_(77)
        Fetch().reference(staging, fields, buffer, turn, step=shape)
        assert turn.tolist() == [(step + 1) % copies, 0]
        for name, values in packer.live(shape, inputs.host[0]).items():
            assert np.array_equal(values, packed[name]), name
        assert (inputs.sampled == 0x4D4D4D4D).all() and (buffer == 77).sum() > len(buffer) // 2


def seconds(tokens: int, chunk: int, stages: int) -> float:
    """In which a token takes one, in a pipeline that is empty before and behind."""
    return (-(-tokens // chunk) + stages - 1) * (chunk + STEP_COSTS)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("tokens", [1, 700, 1024, 8192, 65536, 10**6])
def test_prompts_come_in_chunks_that_keep_the_stages_busy(stages: int, tokens: int) -> None:
    chunks = Chunks(stages)
    chunk = chunks.most(0, tokens, 8192)
    best = min(seconds(tokens, c, stages) for c in range(512, 8193, 512))
    assert seconds(tokens, chunk, stages) <= 1.06 * best


def test_chunks_stay_as_they_are_until_all_prompts_are_computed() -> None:
    chunks, left = Chunks(2), 65536
    while left:
        taken = chunks.most(0, left, 8192)
        assert taken == 2048
        left -= taken
    assert chunks.most(0, 0, 8192) == 512 and chunks.most(0, 1024, 8192) == 512
    assert chunks.most(0, 20000, 8192) == 1536, "more arrive"
    assert chunks.most(0, 100, 8192) == 1536


@pytest.mark.parametrize(
    ("singles", "limit", "expected"), [(500, 8192, 524), (383, 8192, 129), (0, 100, 100), (90, 100, 10)]
)
def test_beside_single_tokens_there_is_room_for_prompts(singles: int, limit: int, expected: int) -> None:
    assert Chunks(2).most(singles, 50, limit) == expected
