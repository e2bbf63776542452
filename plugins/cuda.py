"""The driver layer: modules, functions, tensor maps, launches through cuda-bindings; memory and streams are torch's."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver

if TYPE_CHECKING:
    import torch

Result = driver.CUresult
_TYPES = driver.CUtensorMapDataType
_MAP_TYPES = {
    "float8_e4m3fn": _TYPES.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    "uint8": _TYPES.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    "bfloat16": _TYPES.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    "float16": _TYPES.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    "float32": _TYPES.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
}
_SWIZZLES = {
    n: getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{'NONE' if n == 0 else f'{n}B'}")
    for n in (0, 32, 64, 128)
}


class CudaError(RuntimeError):
    """A driver call failed."""


def ok(result: tuple) -> Any:
    status, *values = result
    if status != Result.CUDA_SUCCESS:
        name = driver.cuGetErrorName(status)[1]
        raise CudaError(name.decode() if isinstance(name, bytes) else str(status))
    return values[0] if len(values) == 1 else values


class Module:
    """A cubin loaded into torch's current context."""

    def __init__(self, cubin: bytes) -> None:
        import torch

        torch.cuda.current_stream()
        torch.zeros(1, device="cuda")  # makes torch's primary context current
        self._cubin = cubin
        self._module = ok(driver.cuModuleLoadData(cubin))

    def function(self, entry: str) -> Function:
        return Function(self, ok(driver.cuModuleGetFunction(self._module, entry.encode())))


class Function:
    """A kernel entry point."""

    def __init__(self, module: Module, handle: Any) -> None:
        self.module = module  # keeps the module loaded
        self.handle = handle
        self._shared = 0

    def allow_shared(self, size: int) -> None:
        """Raises the dynamic shared memory limit to `size` bytes (more than 48 KB needs this)."""
        if size > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            ok(driver.cuFuncSetAttribute(self.handle, attribute, size))
            self._shared = size


def tensor_map(
    pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int = 128
) -> Any:
    """A TMA descriptor, innermost dimension first: `shape` and `box` in elements, `strides` in bytes for dims 1 and up.

    A box may hang over the edge: loads fill zeros, stores are clipped. Nothing is promoted in the L2 cache: with
    L2_PROMOTION_L2_256B boxes stream from an H200's memory at 4.1 to 4.3 TB/s, without it at 4.5 to 4.57, as fast as
    contiguous bytes (docs/performance/reads.json).
    """
    c64, c32 = driver.cuuint64_t, driver.cuuint32_t
    return ok(
        driver.cuTensorMapEncodeTiled(
            _MAP_TYPES[dtype],
            len(shape),
            pointer,
            [c64(n) for n in shape],
            [c64(n) for n in strides],
            [c32(n) for n in box],
            [c32(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLES[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def matrix_map(t: torch.Tensor, box_inner: int, box_outer: int, swizzle: int = 128) -> Any:
    """The map of a row-major matrix."""
    outer, inner = t.shape
    name = str(t.dtype).removeprefix("torch.")
    return tensor_map(
        t.data_ptr(), name, [inner, outer], [t.stride(0) * t.element_size()], [box_inner, box_outer], swizzle
    )


@functools.cache
def stream_reader() -> Callable[[int], int]:
    """What gives the handle of torch's current stream on a device. `torch.cuda.current_stream` makes an object of it,
    which took 4.3 of a launch's 8.9 us; torch's own compiler asks as is done here, in 0.1 us."""
    import torch

    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda device: torch.cuda.current_stream(device).cuda_stream)


class Launch:
    """One packed launch. Arguments are tensors (passed as pointers), tensor maps, ctypes scalars or arrays (structs).

    `launch(grid, shared)` enqueues on torch's current stream, with no more shared memory than it was made with. Scalar
    arguments may be changed in between through `.value` (the driver copies them at each launch). `pdl` lets the kernel
    start before its predecessor ends: the kernel must run `griddepcontrol.wait` before it reads what others wrote or
    writes anything itself.
    """

    def __init__(
        self,
        function: Function,
        block: int | tuple[int, int, int],
        args: Sequence[Any],
        shared: int = 0,
        grid: int | tuple[int, int, int] = 1,
        cluster: int = 1,
        pdl: bool = True,
    ) -> None:
        import torch

        function.allow_shared(shared)
        self._function = function
        self._device, self._stream = torch.cuda.current_device(), stream_reader()
        self._keep = list(args)
        self._scalars = [self._scalar(a) for a in args]
        pointers = [a.getPtr() if s is None else ctypes.addressof(s) for a, s in zip(args, self._scalars, strict=True)]
        self._args = (ctypes.c_void_p * len(pointers))(*pointers)
        self._address = ctypes.addressof(self._args)
        self._config = config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = _dim3(block)
        config.gridDimX, config.gridDimY, config.gridDimZ = _dim3(grid)
        config.sharedMemBytes = shared
        attributes = []
        if pdl:
            a = driver.CUlaunchAttribute()
            a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            a.value.programmaticStreamSerializationAllowed = 1
            attributes.append(a)
        if cluster > 1:
            a = driver.CUlaunchAttribute()
            a.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = cluster, 1, 1
            attributes.append(a)
        config.attrs, config.numAttrs = attributes, len(attributes)

    @staticmethod
    def _scalar(arg: Any) -> Any:
        if hasattr(arg, "data_ptr"):
            return ctypes.c_void_p(arg.data_ptr())
        if arg is None:
            return ctypes.c_void_p(0)
        return arg if isinstance(arg, (ctypes._SimpleCData, ctypes.Array)) else None

    def __call__(self, grid: int | tuple[int, int, int] | None = None, shared: int | None = None) -> None:
        if grid is not None:
            self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = _dim3(grid)
        if shared is not None:
            self._config.sharedMemBytes = shared
        self._config.hStream = self._stream(self._device)
        ok(driver.cuLaunchKernelEx(self._config, self._function.handle, self._address, 0))


def _dim3(n: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (n, 1, 1) if isinstance(n, int) else n
