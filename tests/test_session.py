"""A session on the CPU: packing never changes what a sequence computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_engine
import torch

from fp8.builder.engine import EngineError, Limits
from fp8.runtime.compiled import context_bucket, row_bucket
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.runtime.step_inputs import Packer, layout

DTYPES = ["float32", tiny_engine.E4M3]


@pytest.fixture(scope="module", params=DTYPES)
def engine_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write(tmp_path_factory.mktemp("tiny"), request.param)


def sequence(length: int, blocks: list[int], slot: int) -> Request:
    g = torch.Generator().manual_seed(length)
    tokens = torch.randint(tiny_engine.VOCAB, (length,), generator=g).tolist()
    return Request(slot, tokens, SamplingParams(), 1, blocks=blocks, slot=slot)


def feed(session: Session, *rows: tuple[Request, int, int]) -> torch.Tensor:
    return session.token_logits([Row(r, start, count, True, 0) for r, start, count in rows]).clone()


def test_chunked_prefill_equals_whole_prefill(engine_dir: Path) -> None:
    request = sequence(90, [3, 1], 0)
    whole = feed(Session(engine_dir, "cpu", max_kv_blocks=4), (request, 0, 90))
    session = Session(engine_dir, "cpu", max_kv_blocks=4)
    parts = [feed(session, (request, start, end - start)) for start, end in ((0, 37), (37, 38), (38, 70), (70, 90))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-3)


def test_a_mixed_packed_batch_equals_each_sequence_alone(engine_dir: Path) -> None:
    decode, chunk, fresh = sequence(70, [5, 0], 2), sequence(40, [2], 0), sequence(21, [4], 1)
    session = Session(engine_dir, "cpu", max_kv_blocks=6)
    feed(session, (decode, 0, 69), (chunk, 0, 25))
    mixed = feed(session, (decode, 69, 1), (chunk, 25, 15), (fresh, 0, 21))
    alone = [feed(Session(engine_dir, "cpu", max_kv_blocks=6), (r, 0, len(r.tokens))) for r in (decode, chunk, fresh)]
    torch.testing.assert_close(mixed, torch.cat([alone[0][69:], alone[1][25:], alone[2]]), rtol=1e-3, atol=1e-3)


def test_padding_a_decode_step_changes_nothing() -> None:
    limits = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96)
    host = {name: np.full(shape, 77, dtype) for name, (dtype, shape) in layout(limits).items()}
    packer = Packer(limits)
    rows = [Row(sequence(66, [3, 1], 4), 65, 1, True, 5), Row(sequence(9, [2], 0), 8, 1, True, 0)]
    shape = packer.pack(rows, host)
    before = {name: array[:2].copy() for name, array in host.items()}
    packer.pad(shape, 4, host)
    assert all((host[name][:2] == before[name]).all() for name in host)
    assert host["slot_mapping"][:4].tolist() == [1 * 64 + 1, 2 * 64 + 8, -1, -1]
    assert host["sequence_lengths"][:4].tolist() == [66, 9, 0, 0]
    assert host["query_start"][:5].tolist() == [0, 1, 2, 3, 4]
    assert host["slots"][:4].tolist() == [4, 0, 8, 8]


def test_a_token_in_flight_is_taken_from_the_table_of_sampled_tokens() -> None:
    limits = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96)
    host = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(limits).items()}
    packer, request = Packer(limits), sequence(10, [0], 3)
    request.computed, request.in_flight = 10, 1
    packer.pack([Row(request, 10, 1, True, 1), Row(sequence(5, [1], 1), 0, 5, True, 0)], host)
    first = packer.first_token_id
    assert host["sources"][:6].tolist() == [3, *range(first + 1, first + 6)]


def test_a_slot_takes_the_sampling_values_of_whoever_holds_it() -> None:
    limits = Limits(max_batch_size=2, max_seq_len=128, max_num_tokens=16)
    host = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout(limits).items()}
    packer = Packer(limits)
    for temperature, seed, block in ((0.5, 2**40, 1), (0.0, -3, 0), (1.5, 7, 1)):
        request = Request(seed, [1, 2, 3], SamplingParams(temperature=temperature), 4, seed, slot=1, blocks=[block])
        packer.pack([Row(request, 0, 3, True, 0)], host)
        assert (host["temperature"][0], host["seed"][0], host["block_tables"][0, 0]) == (temperature, seed, block)


def test_buckets_cover_every_size() -> None:
    for rows in range(1, 301):
        assert rows <= row_bucket(rows, 300) <= max(8, rows + 31)
    assert [row_bucket(n, 64) for n in (1, 2, 3, 5, 9, 17, 33, 60)] == [1, 2, 4, 8, 16, 24, 40, 64]
    assert [context_bucket(n, 3000) for n in (1, 512, 513, 2048, 2049)] == [512, 512, 2048, 2048, 3000]


def test_an_engine_without_kernels_is_refused_on_a_gpu(engine_dir: Path) -> None:
    message = "no CUDA GPU" if not torch.cuda.is_available() else "built for target cpu"
    with pytest.raises(EngineError, match=message):
        Session(engine_dir, "cuda")


def test_an_unknown_device_is_refused(engine_dir: Path) -> None:
    with pytest.raises(EngineError, match="'tpu7' is unknown"):
        Session(engine_dir, "tpu7")


def test_exchanged_weights_are_refused(tmp_path: Path) -> None:
    directory = tiny_engine.write(tmp_path)
    path = directory / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineError, match="damaged or exchanged"):
        Session(directory, "cpu")


def test_a_missing_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is not an engine directory"):
        Session(tmp_path)
