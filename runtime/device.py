"""Where an engine runs, and how much of the memory there its KV pool may take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fp8.builder.engine import EngineError, Plan
from fp8.runtime.reference import kv_block_bytes

if TYPE_CHECKING:
    import torch

LEAST_CORES = 4  # for a rank with a GPU


def choose_device(name: str, target: str, place: int | None = None) -> torch.device:
    """ "auto": the GPU if there is one and the engine holds kernels, else the CPU. `place`: which of several processes
    of this host takes it, each a GPU of its own. Raises EngineError for none such."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and target != "cpu" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device {name!r} was asked for, and torch sees no CUDA GPU; use --device cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if place is None else _own_gpu(place))
    return device


def _own_gpu(place: int) -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 1:  # a launcher that shows every process its own GPU alone; sharing one shows in the preflight
        return 0
    if place >= count:
        raise EngineError(f"this is process {place} of its host (from 0), which has {count} GPUs; start one per GPU")
    return place


def few_cores(allowed: int, present: int) -> str | None:
    """What is wrong with a GPU rank that may run on so few of the host's cores: Open MPI binds each of two to one."""
    if allowed >= LEAST_CORES or present <= allowed:
        return None
    return (
        f"this rank may run on {allowed} of {present} cores, and its launches, messages and NCCL's threads share "
        f"{'it' if allowed == 1 else 'them'}; start the job with mpirun --bind-to none"
    )


def blocks_in_host_memory(plan: Plan, processes: int = 1, asked: int | None = None) -> int:
    """KV blocks in host memory: as many as all sequences need, or as fit into half of the free memory, shared among so
    many processes. If `asked` is given, that many (untouched ones cost nothing), provided that the machine could hold
    them at all."""
    block, machine = kv_block_bytes(plan), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if asked is not None:
        if asked * block > machine:
            raise EngineError(
                f"max_kv_blocks is {asked}, {asked * block / 2**30:.1f} GiB, and this machine has "
                f"{machine / 2**30:.1f} GiB of memory; give at most {machine // block}"
            )
        return asked
    limits = plan.limits
    per_sequence = limits.sequence_blocks
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    blocks = min(per_sequence * limits.max_batch_size, free // 2 // processes // block)
    if blocks < per_sequence:
        raise EngineError(
            f"the KV pool would have {blocks} blocks in {free / 2**30:.1f} GiB of free memory, and one sequence of "
            f"max_seq_len {limits.max_seq_len} needs {per_sequence}; build with a smaller --max_seq_len, "
            f"or give max_kv_blocks"
        )
    return blocks
