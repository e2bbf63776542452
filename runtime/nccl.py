"""NCCL between the GPUs of a job's ranks: the few calls that steps need, on torch's current stream, so that CUDA graphs
capture them. The library is the one that torch loads; its id goes from rank to rank with the host's messages."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.runtime.comm import World
from fp8.runtime.launcher import RankError

if TYPE_CHECKING:
    import torch

    from fp8.plugins.all_reduce.region import Regions

ID_BYTES = 128
# nccl.h, ncclDataType_t and ncclRedOp_t (unchanged since 2.10)
DATA_TYPES = {"uint8": 1, "int32": 2, "int64": 4, "float16": 6, "float32": 7, "bfloat16": 9}
OPERATIONS = {"sum": 0, "max": 2}


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


class Nccl:
    """The library. Every call raises RankError where NCCL reports an error."""

    def __init__(self) -> None:
        import torch  # noqa: F401 (loads the library)

        os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast: it is not to be had in every environment
        try:
            self._library = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise RankError(
                f"NCCL cannot be loaded ({error}); several GPUs need a torch that is built for CUDA"
            ) from error
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RankError(f"{name}: {self._library.ncclGetErrorString(status).decode()}")


class NcclGroup:
    """Ranks whose GPUs exchange tensors, in order; a Communicator of fp8.plugins.base. Every member makes the same
    calls in the same order; all of them return at once, the work is enqueued. Made by all `members` together."""

    def __init__(self, world: World, members: Sequence[int]) -> None:
        members = list(members)
        self.rank, self.world = members.index(world.rank), len(members)
        self.regions: Regions | None = None  # peer memory, where somebody shares it among these ranks
        self.ring: Regions | None = None  # and of messages from each to the next
        self._nccl = Nccl()
        unique = UniqueId()
        if self.rank == 0:
            self._nccl("ncclGetUniqueId", ctypes.byref(unique))
            for member in members[1:]:
                world.talk(bytes(unique), member)
        else:
            ctypes.memmove(ctypes.byref(unique), world.hear(members[0]), ID_BYTES)
        self._comm = ctypes.c_void_p()
        self._nccl("ncclCommInitRank", ctypes.byref(self._comm), self.world, unique, self.rank)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, all of one shape, in rank order, on every rank."""
        import torch

        tensor = tensor.contiguous()
        out = torch.empty((self.world, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        if tensor.numel():
            self._nccl("ncclAllGather", _address(tensor), _address(out), *_count(tensor), self._comm, _stream())
        return list(out)

    def nccl_all_gather(self, x: torch.Tensor, y: torch.Tensor, parts: Sequence[int]) -> None:
        """y [rows, sum(parts)] = every rank's x [rows, parts[rank]] side by side."""
        import torch

        if len(set(parts)) == 1:
            y.view(len(x), self.world, parts[0]).copy_(torch.stack(self.all_gather(x), 1))
            return
        found = [torch.empty((len(x), part), dtype=x.dtype, device=x.device) for part in parts]
        self._nccl("ncclGroupStart")
        for root, piece in enumerate(found):
            source = x.contiguous() if root == self.rank else piece
            self._nccl("ncclBroadcast", _address(source), _address(piece), *_count(piece), root, self._comm, _stream())
        self._nccl("ncclGroupEnd")
        torch.cat(found, 1, out=y)

    def nccl_all_reduce(self, x: torch.Tensor, y: torch.Tensor, operation: str) -> None:
        """y = the sum or the maximum of every rank's x; both contiguous, all of one shape."""
        self._nccl("ncclAllReduce", _address(x), _address(y), *_count(x), OPERATIONS[operation], self._comm, _stream())

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Sends to the group's rank `to`, which receives a tensor of that shape and dtype."""
        self._nccl("ncclSend", _address(tensor), *_count(tensor), to, self._comm, _stream())

    def receive(self, into: torch.Tensor, source: int) -> None:
        self._nccl("ncclRecv", _address(into), *_count(into), source, self._comm, _stream())

    def exchange(self, tensor: torch.Tensor, to: int, into: torch.Tensor, source: int) -> None:
        """Sends and receives at once: a ring of ranks that all do so does not wait for itself."""
        self._nccl("ncclGroupStart")
        self.send(tensor, to)
        self.receive(into, source)
        self._nccl("ncclGroupEnd")


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _count(tensor: torch.Tensor) -> tuple[ctypes.c_size_t, int]:
    """How many elements of which type, as NCCL counts them."""
    return ctypes.c_size_t(tensor.numel()), DATA_TYPES[str(tensor.dtype).removeprefix("torch.")]


def _stream() -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
