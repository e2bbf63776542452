"""NVRTC: a Kernel record becomes a cubin, cached by content. Needs no GPU."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fp8.plugins.base import Kernel

ARCH = "sm_90a"
HERE = Path(__file__).parent
# ptxas's notes that a wgmma pipeline was serialized: such a kernel is several times slower, so it is refused.
SERIALIZED = re.compile(r"C75(10|12|13|14|20)|wgmma.{0,80}serializ", re.IGNORECASE)


class CompileError(RuntimeError):
    """NVRTC or ptxas refused a kernel; the message holds its log."""


@dataclass(frozen=True)
class Cubin:
    key: str
    kernel: Kernel
    code: bytes
    log: str

    @property
    def registers(self) -> int:
        found = re.findall(r"Used (\d+) registers", self.log)
        return max(map(int, found), default=0)

    @property
    def spill_bytes(self) -> int:
        return sum(map(int, re.findall(r"(\d+) bytes spill", self.log)))

    @property
    def serialized(self) -> bool:
        return bool(SERIALIZED.search(self.log))


def cache_dir() -> Path:
    """`$FP8_CACHE_DIR`, else `~/.cache/fp8-engine`."""
    return Path(os.environ.get("FP8_CACHE_DIR") or Path.home() / ".cache" / "fp8-engine")


def source(kernel: Kernel) -> str:
    """The translation unit: defines, then the .cu file with our own includes pasted in: the text is the key."""
    defines = "".join(f"#define {k} {v}\n" for k, v in kernel.constants)
    return defines + _text(HERE / kernel.plugin / kernel.source)


@functools.cache
def _text(path: Path) -> str:
    """Read once: a kernel is asked for its key in hundreds of specialisations."""
    return _expand(path, set())


def _expand(path: Path, seen: set[Path]) -> str:
    if path in seen:
        return ""
    seen.add(path)
    out = []
    for line in path.read_text().splitlines():
        found = re.match(r'\s*#include "(.+)"', line)
        if found:
            near = path.parent / found[1]
            out.append(_expand(near if near.exists() else HERE / "include" / found[1], seen))
        elif line.strip() != "#pragma once":
            out.append(line)
    return "\n".join(out) + "\n"


@functools.cache
def nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def key(kernel: Kernel) -> str:
    """Content hash of what decides the cubin."""
    text = "\0".join([source(kernel), kernel.entry, ARCH, nvrtc_version(), *OPTIONS])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


OPTIONS = ("--std=c++17", f"--gpu-architecture={ARCH}", "--device-as-default-execution-space", "--ptxas-options=-v",
           "--ptxas-options=--warn-on-spills")  # fmt: skip


def compile_kernel(kernel: Kernel, cache: bool = True) -> Cubin:
    """Compiles, or reads from the cache. Raises CompileError with NVRTC's log."""
    name = key(kernel)
    path = cache_dir() / "cubins" / f"{name}.cubin"
    log_path = path.with_suffix(".log")
    if cache and path.exists() and log_path.exists():
        code = path.read_bytes()
        log = log_path.read_text()
        if log.startswith(hashlib.sha256(code).hexdigest()):  # else damaged: compile anew
            return Cubin(name, kernel, code, log)
    code, log = _nvrtc(kernel)
    log = hashlib.sha256(code).hexdigest() + "\n" + log
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, code)
        _write(log_path, log.encode())
    return Cubin(name, kernel, code, log)


def compile_all(kernels: Iterable[Kernel], done: Callable[[Cubin], None] | None = None) -> dict[str, Cubin]:
    """Compiles distinct kernels on all cores (NVRTC releases the GIL); keyed by content hash."""

    def one(kernel: Kernel) -> Cubin:
        cubin = compile_kernel(kernel)
        if done:
            done(cubin)
        return cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {cubin.key: cubin for cubin in pool.map(one, dict.fromkeys(kernels))}


def _nvrtc(kernel: Kernel) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    def call(result: tuple) -> tuple:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{kernel.plugin}/{kernel.source}: NVRTC: {result[0]}")
        return result[1:]

    text = source(kernel).encode()
    (program,) = call(nvrtc.nvrtcCreateProgram(text, f"{kernel.plugin}_{kernel.source}".encode(), 0, [], []))
    try:
        options = [o.encode() for o in OPTIONS]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        (size,) = call(nvrtc.nvrtcGetProgramLogSize(program))
        buffer = b" " * size
        call(nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.rstrip(b"\0 ").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{kernel.plugin}/{kernel.source} {dict(kernel.constants)}: {log}")
        (size,) = call(nvrtc.nvrtcGetCUBINSize(program))
        code = b" " * size
        call(nvrtc.nvrtcGetCUBIN(program, code))
        return code, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
