"""The processes that mpirun, srun or torchrun started beside this one: how many, which one this is.

Without a launcher there is one process, and mpi4py is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# What launchers tell a process: which one it is, of how many, and which one on its machine. Slurm's are those of a job
# step, as srun sets them: a batch script alone has SLURM_NTASKS too.
LAUNCHERS = (
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("mpi", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


class RankError(RuntimeError):
    """Ranks that cannot work together: says which, what was found at each, and the remedy."""


@dataclass(frozen=True)
class Launch:
    """Process `rank` of `world`, the `local_rank`-th on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: str = "mpi"


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """What the environment says. Raises RankError where it contradicts itself."""
    variables = os.environ if environment is None else environment
    for launcher, *names in LAUNCHERS:
        rank, world, local = (variables.get(name) for name in names)
        if rank is None or world is None or (launcher == "torchrun" and "MASTER_ADDR" not in variables):
            continue
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise RankError(
                f"{names[0]} is {rank!r} and {names[1]} {world!r}; expected a rank below the number of ranks"
            )
        return Launch(int(rank), int(world), int(local or 0), launcher)
    return Launch()
