"""Decode steps that take over the inputs of the step before, where it left them: they are those that packing gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_engine

from fp8.builder.engine import Limits
from fp8.plugins.base import StepShape
from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.runtime.step_inputs import Packer, layout

RANDOM = random.Random(4)
PROMPTS = [[RANDOM.randrange(tiny_engine.VOCAB) for _ in range(RANDOM.randint(1, 150))] for _ in range(6)]
BY_ROW = ("position_ids", "slot_mapping", "sequence_lengths", "temperature", "counter", "seed", "slots")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step of any session was packed. Of one that was not, its inputs are held against packed ones."""
    found: list[bool] = []
    enqueue, start, enqueued = Session.enqueue, Session.start, list[list[Row]]()

    def noted(self: Session, rows: list[Row], *arguments: object) -> object:
        enqueued.append(rows)
        return enqueue(self, rows, *arguments)

    def checked(self: Session, *arguments: object) -> object:
        rows = enqueued[-1]
        found.append(bool(arguments[-1]))
        if not found[-1]:
            host = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(self.limits).items()}
            packer = Packer(self.limits)
            shape = packer.pack(rows, host)
            assert shape == arguments[0]
            for name in BY_ROW:
                assert (self.inputs.device[name][: len(rows)].numpy() == host[name][: len(rows)]).all(), name
            columns = -(-shape.max_context // self.limits.block_size)
            tables = self.inputs.device["block_tables"][: len(rows)].numpy()
            for row, theirs, ours in zip(rows, tables, host["block_tables"], strict=False):
                used = row.start // self.limits.block_size + 1
                assert used <= columns and (theirs[:used] == ours[:used]).all()
            table = self.inputs.tokens[host["sources"][: len(rows)]]
            known = [row.start < len(row.request.tokens) for row in rows]
            packed = np.where(known, host["token_ids"][: len(rows)], table)
            assert (self.inputs.input_ids[: len(rows)].numpy() == packed).all()
        return start(self, *arguments)

    monkeypatch.setattr(Session, "enqueue", noted)
    monkeypatch.setattr(Session, "start", checked)
    return found


def outputs(llm: LLM, params: list[SamplingParams]) -> list:
    return [(c.token_ids, c.logprobs, c.prompt_logprobs) for c in llm.generate(PROMPTS, params)]


def varied(i: int) -> SamplingParams:
    """Greedy and drawn, options that end the graph at the logits, beams, prompts scored in between."""
    drawn = {"temperature": 0.9, "seed": i}
    kinds: list[dict] = [{}, drawn, {**drawn, "top_p": 0.8, "repetition_penalty": 1.1}]
    rare: dict[int, dict] = {0: {"beam_width": 2}, 3: {"logprobs": 1, "prompt_logprobs": 1}}
    return SamplingParams(max_tokens=5 + 9 * i, ignore_eos=True, **rare.get(i, kinds[i % 3]))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("blocks", [None, 5])
@pytest.mark.parametrize("params", [lambda i: SamplingParams(max_tokens=40, ignore_eos=True), varied])
def test_inputs_taken_over_are_those_that_packing_gives(
    engine_dir: Path, steps: list[bool], monkeypatch: pytest.MonkeyPatch, lag: int, blocks: int | None,
    params: Callable[[int], SamplingParams],
) -> None:  # fmt: skip
    every = [params(i) for i in range(len(PROMPTS))]
    found = outputs(LLM(engine_dir, "cpu", max_kv_blocks=blocks, lag=lag), every)
    taken_over = steps.count(False)
    assert taken_over > 10 and True in steps
    monkeypatch.setattr(Packer, "follows", lambda self, rows: None)
    assert outputs(LLM(engine_dir, "cpu", max_kv_blocks=blocks, lag=lag), every) == found
    assert steps.count(False) == taken_over, "none without it"


@pytest.mark.parametrize("lag", [0, 1])
def test_one_sequence_uploads_where_it_begins_a_page(engine_dir: Path, steps: list[bool], lag: int) -> None:
    LLM(engine_dir, "cpu", lag=lag).generate([[1, 2, 3]], SamplingParams(max_tokens=140, ignore_eos=True))
    # The prompt, its first token, and tokens 64 and 128: the others' inputs are there already.
    assert [i for i, packed in enumerate(steps) if packed] == [0, 1, 62, 126]


def test_a_prompt_scored_in_between_does_not_change_what_follows(engine_dir: Path) -> None:
    """`token_logits` takes the place of the inputs on the device."""
    session = Session(engine_dir, "cpu", max_kv_blocks=4)
    request = Request(0, [1, 2, 3], SamplingParams(), 9, blocks=[0], slot=0)
    other = Request(1, [4, 5], SamplingParams(), 9, blocks=[1], slot=1)
    plain: list[list[int]] = []
    for between in (False, True):
        plain.append(session.read(session.enqueue([Row(request, 0, 3, True, 0)])))  # type: ignore[arg-type]
        for at in range(3, 8):
            plain[-1] += session.read(session.enqueue([Row(request, at, 1, True, at - 2)]))  # type: ignore[arg-type]
            if between:
                session.token_logits([Row(other, 0, 1, False, 0)])
    assert plain[0] == plain[1] and len(plain[0]) == 6


def decoding(count: int) -> tuple[Packer, dict[str, np.ndarray], list[Request]]:
    limits = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96)
    host = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(limits).items()}
    requests = [Request(i, [1] * 10, SamplingParams(), 90, blocks=[i], slot=i) for i in range(count)]
    return Packer(limits), host, requests


def rows_at(requests: list[Request], start: int) -> list[Row]:
    return [Row(r, start, 1, True, start - 9) for r in requests]


@pytest.mark.parametrize(
    "change",
    [
        lambda requests: rows_at(requests, 12),
        lambda requests: rows_at(requests[::-1], 11),
        lambda requests: rows_at(requests[:2], 11),
        lambda requests: [*rows_at(requests[:2], 11), Row(requests[2], 11, 1, False, 2)],
        lambda requests: [*rows_at(requests[:2], 11), Row(requests[2], 11, 2, True, 2)],
        lambda requests: [setattr(requests[1], "blocks", [5]), *rows_at(requests, 11)][1:],
        lambda requests: [setattr(requests[1], "slot", 7), *rows_at(requests, 11)][1:],
    ],
    ids=["later", "other order", "fewer", "no token wanted", "two tokens", "other blocks", "other slot"],
)
def test_other_rows_do_not_follow(change: Callable[[list[Request]], list[Row]]) -> None:
    packer, host, requests = decoding(3)
    rows = rows_at(requests, 10)
    packer.ran(rows, packer.pack(rows, host))
    assert packer.follows(rows_at(requests, 11)) == StepShape(3, 3, 3, 0, 12, 3)
    assert packer.follows(rows_at(requests, 11)) is None, "it says so once"
    packer.ran(rows, packer.pack(rows, host))
    assert packer.follows(change(requests)) is None


def test_a_page_s_first_token_does_not_follow() -> None:
    packer, host, requests = decoding(2)
    for at, follows in ((61, True), (62, True), (63, False)):
        rows = rows_at(requests, at)
        packer.ran(rows, packer.pack(rows, host))
        assert (packer.follows(rows_at(requests, at + 1)) is not None) == follows
