"""GPU memory that ranks of one host share over NVLink: a region on every GPU, opened by all others (CUDA IPC)."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8.plugins.all_reduce.region import MOST_WORLD, Regions
from fp8.runtime.comm import HostGroup

if TYPE_CHECKING:
    import torch

BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart


class PeerMemory:
    """This rank's region, zeros at first, and its view of the others'. Made and closed by all of a group together."""

    def __init__(self, group: HostGroup, regions: Regions) -> None:
        self.regions = regions
        self._group = group

    def close(self) -> None:
        """Returns when no rank has the others' memory open any more."""
        import torch

        torch.cuda.synchronize()
        _exchange(self._group, "done")  # with all launches, everywhere
        _close(self.regions.rank, self.regions.addresses)
        _exchange(self._group, "closed")
        _free(self.regions.addresses[self.regions.rank])


def share(group: HostGroup, device: torch.device, size: int) -> PeerMemory | str:
    """The group's peer memory, `size` bytes of each, or why there is none; on all of its ranks the same of the two.
    `device` is current."""
    import torch

    torch.zeros(1, device=device)  # the driver is up, with torch's context
    why = _obstacle([json.loads(text) for text in _exchange(group, json.dumps(_place(device)))], device)
    if why := _first(_exchange(group, why)):
        return why
    own, text = _allocated(size)
    offers = _exchange(group, text)
    if why := _first([t if t.startswith("!") else "" for t in offers]):
        _free(own)
        return why.removeprefix("!")
    addresses, why = _opened(group.rank, own, [bytes.fromhex(t) for t in offers])
    if why := _first(_exchange(group, why)):
        _close(group.rank, addresses)
        _exchange(group, "closed")
        _free(own)
        return why
    return PeerMemory(group, Regions(group.rank, tuple(addresses)))


def _exchange(group: HostGroup, text: str) -> list[str]:
    """The texts of all ranks."""
    import torch

    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    return [bytes(t.tolist()).decode().strip() for t in group.all_gather(data)]


def _first(whys: Sequence[str]) -> str:
    return next(filter(None, whys), "")


def _place(device: torch.device) -> list[str]:
    """The host, and the GPU on its bus."""
    from cuda.bindings import driver

    from fp8.plugins.cuda import ok

    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    bus = ok(driver.cuDeviceGetPCIBusId(32, ok(driver.cuDeviceGet(device.index))))
    return [f"{socket.gethostname()} {boot}", bus.rstrip(b"\0").decode()]


def _obstacle(places: Sequence[Sequence[str]], device: torch.device) -> str:
    """Why this rank cannot reach the others' memory, as far as the driver tells beforehand."""
    from cuda.bindings import driver

    from fp8.plugins.cuda import ok

    if len(places) > MOST_WORLD:
        return f"{len(places)} ranks are more than {MOST_WORLD}"
    if len({host for host, _ in places}) > 1:
        return "the ranks are on several hosts"
    own = ok(driver.cuDeviceGet(device.index))
    links = driver.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED  # over NVLink, not over PCIe
    for _, bus in places:
        status, peer = driver.cuDeviceGetByPCIBusId(bus.encode())
        if status != driver.CUresult.CUDA_SUCCESS or int(peer) == int(own):
            continue  # not visible here, which says nothing of the way to it
        if not ok(driver.cuDeviceGetP2PAttribute(links, own, peer)):
            return f"no NVLink joins the GPUs {places[0][1]} and {bus}"
    return ""


def _allocated(size: int) -> tuple[int, str]:
    """A region of zeros, and its handle in hexadecimal digits; 0 and "!" with the reason if there is none."""
    import torch
    from cuda.bindings import driver

    from fp8.plugins.cuda import CudaError, ok

    own = 0
    try:
        own = int(ok(driver.cuMemAlloc(size)))
        ok(driver.cuMemsetD8(own, 0, size))
        torch.cuda.synchronize()
        return own, bytes(ok(driver.cuIpcGetMemHandle(own)).reserved).hex()
    except CudaError as error:
        return own, f"!memory of {size >> 20} MiB cannot be shared ({error})"


def _opened(rank: int, own: int, handles: Sequence[bytes]) -> tuple[list[int], str]:
    """All regions' addresses here, 0 for those that are not open, and why not."""
    from cuda.bindings import driver

    from fp8.plugins.cuda import CudaError, ok

    addresses, why = [0] * len(handles), ""
    addresses[rank] = own
    for peer, bits in enumerate(handles):
        if peer == rank:
            continue
        handle = driver.CUipcMemHandle()
        handle.reserved = bits
        lazy = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        try:
            addresses[peer] = int(ok(driver.cuIpcOpenMemHandle(handle, lazy)))
        except CudaError as error:
            why = f"the memory of rank {peer}'s GPU cannot be opened ({error})"
    return addresses, why


def _close(rank: int, addresses: Sequence[int]) -> None:
    from cuda.bindings import driver

    from fp8.plugins.cuda import ok

    for peer, address in enumerate(addresses):
        if address and peer != rank:
            ok(driver.cuIpcCloseMemHandle(address))


def _free(own: int) -> None:
    from cuda.bindings import driver

    from fp8.plugins.cuda import ok

    if own:
        ok(driver.cuMemFree(own))
