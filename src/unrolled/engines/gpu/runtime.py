"""Triton: whether it is installed, and how the source of a kernel becomes a kernel."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

MIN_TRITON = (3, 3)
MIN_CAPABILITY = (8, 0)


class TritonRuntime:
    """Compiles kernels with Triton, and launches them on NVIDIA and AMD GPUs."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why kernels can't run on a device, or None if they can."""
        return _unavailable(device.type, device.index)

    def load(self, source: str) -> Any:
        """Return the kernel with a source. Triton compiles it in its first call, and keeps it on disk."""
        return _load(source)

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which kernels run on a device, in its current stream."""
        return torch.cuda.device(device)

    def is_capturing(self) -> bool:
        """Return whether a CUDA graph is being captured in the current stream."""
        return torch.cuda.is_current_stream_capturing()

    def multiprocessors(self, device: torch.device) -> int:
        """Return the number of multiprocessors of a device."""
        return torch.cuda.get_device_properties(device).multi_processor_count

    def is_too_large(self, error: Exception) -> bool:
        """Return whether a launch failed because a kernel needs more resources than the device has."""
        if isinstance(error, import_module("triton.runtime.errors").OutOfResources):
            return True
        return isinstance(error, RuntimeError) and "too many blocks in cooperative launch" in str(error)

    def compilation_error(self, error: Exception) -> str | None:
        """Return why a kernel can't be compiled, given an error of a launch. None if it is another error."""
        errors = import_module("triton.runtime.errors")
        kinds = (errors.TritonError, import_module("triton.compiler.errors").CompilationError)
        if not isinstance(error, kinds):
            return None
        return f"Triton can't compile its kernel: {type(error).__name__}: {str(error).strip()[:500]}"


@functools.cache
def _unavailable(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"compiled loops run on the CPU and on CUDA devices, not on {kind}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed: install torch's build for CUDA, which includes it, or triton"
    if _release(installed) < MIN_TRITON:
        least = ".".join(map(str, MIN_TRITON))
        return f"Triton {installed} is too old: install version {least} or later"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            name, found = torch.cuda.get_device_name(index), ".".join(map(str, capability))
            return f"{name} has compute capability {found}: kernels need 8.0 or higher"
    try:
        import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"Triton can't be imported: {error}"
    return None


def _release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


@functools.lru_cache(maxsize=1000)
def _load(source: str) -> Callable[..., Any]:
    # Triton reads the source of a function again, through linecache.
    name = f"<unrolled kernel {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "unrolled_kernel"}
    exec(compile(source, name, "exec"), namespace)
    kernel: Callable[..., Any] = namespace["kernel"]
    return kernel
