"""The parts that ranks are made of, without a launcher: who they are, what goes between them, who is to blame."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import time

import numpy as np
import pytest
import torch

from fp8.builder.engine import Limits
from fp8.runtime.comm import tensor_bytes, tensor_of
from fp8.runtime.device import few_cores
from fp8.runtime.launcher import RankError, launched
from fp8.runtime.preflight import by_rank, uneven
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.sockets import Gate, Wire, connect
from fp8.runtime.step_inputs import Packer, layout
from fp8.runtime.watch import Seen, Status, fault

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, "mpi")),
        (OPEN_MPI, (3, 8, 1, "mpi")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, (2, 4, 0, "mpi")),
        (SRUN, (5, 6, 2, "mpi")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1, 0, "mpi")),  # a batch script, not a step of it
        (TORCHRUN, (1, 4, 1, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (0, 1, 0, "mpi")),  # somebody's own variables
        (OPEN_MPI | SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, (3, 8, 1, "mpi")),  # mpirun inside a Slurm job
        (TORCHRUN | SRUN, (1, 4, 1, "torchrun")),
    ],
)
def test_the_launcher_is_recognized(environment, expected):
    assert dataclasses.astuple(launched(environment)) == expected


@pytest.mark.parametrize("rank", ["8", "-1", "x"])
def test_a_launcher_that_contradicts_itself_is_refused(rank):
    with pytest.raises(RankError, match=f"OMPI_COMM_WORLD_RANK is '{rank}' and OMPI_COMM_WORLD_SIZE '8'"):
        launched(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": rank})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 5), (3,), (2, 3, 4)])
def test_a_tensor_survives_its_message(shape, dtype):
    tensor = torch.randint(0, 255, shape).to(torch.float32).to(dtype)
    found = tensor_of(tensor_bytes(tensor), dtype)
    assert found.dtype == dtype and found.shape == tensor.shape
    assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_a_view_is_sent_as_it_reads():
    tensor = torch.arange(12).view(3, 4).T[1:]
    assert torch.equal(tensor_of(tensor_bytes(tensor), tensor.dtype), tensor)


def test_causes_are_told_by_rank():
    assert by_rank(["", "no such file", "", "no such file"]) == "ranks 1, 3: no such file"
    assert by_rank(["a", "b"]) == "rank 0: a; rank 1: b"


def test_wires_carry_messages_of_any_size_in_order_by_tag():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = Wire(socket.create_connection(listener.getsockname()))
        b = Wire(listener.accept()[0])
    sent = [bytes([i % 251]) * size for i, size in enumerate([0, 1, 7, 70_000, 3_000_000, 5])]
    for i, data in enumerate(sent):
        a.put(data, i % 2)
    found: dict[int, list[bytes]] = {0: [], 1: []}
    deadline = time.monotonic() + 20
    while sum(map(len, found.values())) < len(sent) and time.monotonic() < deadline:
        a.push()
        for tag, messages in found.items():
            while (message := b.take(tag)) is not None:
                messages.append(message)
    assert found == {0: sent[::2], 1: sent[1::2]}
    assert not a.unsent and not b.closed
    a.put(b"last")
    a.close()
    assert b.take() == b"last" and b.take() is None and b.closed


def test_a_gate_admits_who_knows_the_token():
    gate = Gate(0)
    invitation = gate.invitation()
    host, name, port, _, *rest = json.loads(invitation)
    stranger = connect(json.dumps([host, name, port, "guessed", *rest]), 1, 1.0)
    noise = socket.create_connection(("127.0.0.1", port))
    noise.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    friend = connect(invitation, 1, 1.0)
    wires = gate.admit({1}, 5.0)
    wires[1].put(b"welcome")
    deadline = time.monotonic() + 5
    while (said := friend.take()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert said == b"welcome" and stranger.take() is None
    noise.close()


def test_a_gate_names_who_does_not_come():
    with pytest.raises(RankError, match=r"rank 0: ranks 1, 2 did not connect within 0\.2 s"):
        Gate(0).admit({1, 2}, 0.2)


def test_an_unreachable_rank_is_named():
    gate = Gate(3)
    invitation = gate.invitation()
    gate.admit(set(), 1.0)  # closes it
    with pytest.raises(RankError, match="rank 1 cannot connect to rank 3"):
        connect(invitation, 1, 1.0)


def seen(**changes) -> Seen:
    """A rank that spoke and got on just now, at time 100, in step 7; `changes` to that."""
    status = {k: v for k, v in changes.items() if k not in ("spoke", "moved")}
    base = Status("step 7", 40, patience=1, pid=17, host="node")
    return Seen(dataclasses.replace(base, **status), changes.get("spoke", 100.0), changes.get("moved", 100.0))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{}, {}], None),
        ([{}, {"spoke": 89.0}], r"rank 1 \(process 17 on node, at step 7\) gave no sign of life for 10 s"),
        # Who waits is not to blame for standing still, nor is who has nothing to do, or still reads weights.
        ([{"waits": (1,), "moved": 50.0}, {}], None),
        ([{"idle": True, "moved": 50.0}, {"idle": True, "moved": 50.0}], None),
        ([{}, {"what": "start-up", "patience": 30, "moved": 50.0}], None),
        ([{"waits": (1,), "moved": 50.0}, {"moved": 50.0}], "rank 1 .* made no progress for 10 s"),
        ([{"waits": (1,), "moved": 50.0}, {"spoke": 50.0, "moved": 50.0}], "rank 1 .* gave no sign of life"),
        (
            [{"waits": (1,), "moved": 50.0}, {"waits": (0,), "moved": 50.0}, {"idle": True}],
            r"ranks wait for each other: rank 0 for \[1\], rank 1 for \[0\]",
        ),
    ],
)
def test_the_rank_that_hangs_is_found(ranks, expected):
    found = fault({i: seen(**changes) for i, changes in enumerate(ranks)}, 100.0, 10.0)
    assert found is None if expected is None else re.match(expected, found or "")


def test_another_rank_restores_what_was_packed():
    limits = Limits(max_batch_size=8, max_seq_len=256, max_num_tokens=96)
    here, there = ({n: np.zeros(s, d) for n, (d, s) in layout(limits).items()} for _ in range(2))
    packer = Packer(limits)

    def sequence(length: int, blocks: list[int], slot: int) -> Request:
        return Request(
            slot, list(range(length)), SamplingParams(temperature=0.5), 1, blocks=blocks, slot=slot, seed=slot
        )

    rows = [Row(sequence(66, [3, 1], 4), 65, 1, True, 5), Row(sequence(70, [2, 7], 0), 3, 60, False, 0)]
    shape = packer.pack(rows, here)
    live = packer.live(shape, here)
    Packer(limits).restore(shape, live, there)
    for name, array in here.items():
        assert np.array_equal(array, there[name]), name
    assert sum(array.nbytes for array in live.values()) < 1500


def test_a_rank_that_is_bound_to_a_core_is_told_the_remedy():
    assert few_cores(4, 64) is few_cores(2, 2) is few_cores(64, 64) is None
    assert re.search("1 of 64 cores, .* share it; start the job with mpirun --bind-to none", few_cores(1, 64) or "")


def test_a_rank_with_little_memory_is_named():
    assert uneven([100, 60, 100]) is None
    found = uneven([100, 30, 100]) or ""
    assert "has 30 blocks, as the ranks have room for ranks 0, 2: 100 blocks; rank 1: 30 blocks" in found
