"""The processes that an MPI launcher started beside this one: how many, which one this is, and their common results.

Without a launcher there is one process, and mpi4py is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fp8.runtime.sampling_params import RequestError

T = TypeVar("T")

# What launchers tell a process: which one it is, of how many, and which one on its machine. Slurm's are those of a job
# step, as srun sets them: a batch script alone has SLURM_NTASKS too.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Launch:
    """Process `rank` of `world`, the `local_rank`-th on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: runs of neighbours, which may share a prefix, in the order of the ranks."""
        return items[len(items) * self.rank // self.world : len(items) * (self.rank + 1) // self.world]

    def gather(self, part: Sequence[T]) -> list[T] | None:
        """On rank 0 everyone's parts in the order of the ranks, elsewhere None."""
        if self.world == 1:
            return list(part)
        parts = _mpi().COMM_WORLD.gather(list(part), root=0)
        return None if parts is None else [item for each in parts for item in each]

    def abort(self, status: int) -> None:
        """Ends all processes, as one of them cannot go on; returns if there is no other."""
        if self.world > 1:
            _mpi().COMM_WORLD.Abort(status)


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """Which process this is. Raises RequestError if a launcher started several and MPI does not connect them."""
    launch = _told(os.environ if environment is None else environment)
    if launch.world > 1:
        _check(launch)
    return launch


def _told(environment: Mapping[str, str]) -> Launch:
    for rank, world, local in LAUNCHERS:
        if rank in environment and world in environment:
            return Launch(int(environment[rank]), int(environment[world]), int(environment.get(local, "0")))
    return Launch()


def _check(launch: Launch) -> None:
    try:
        communicator = _mpi().COMM_WORLD
    except ImportError as error:
        raise RequestError(
            f"a launcher started {launch.world} processes, and mpi4py cannot be imported ({error}); "
            f"pip install 'fp8-engine[mpi]', or start a single process"
        ) from error
    found = communicator.Get_rank(), communicator.Get_size()
    if found != (launch.rank, launch.world):
        raise RequestError(
            f"the launcher speaks of process {launch.rank} of {launch.world}, and mpi4py's library of {found[0]} of "
            f"{found[1]}; start with the mpirun of the MPI library that mpi4py uses"
        )


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI
