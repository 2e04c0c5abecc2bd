"""``unrolled doctor``: report the compiler, processor, cache and engine of this machine."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unrolled._version import __version__
from unrolled.cells.base import Cell
from unrolled.cells.wrappers import WrapperSpec, wrap
from unrolled.engines import dispatch, reference
from unrolled.engines.gpu import backend as gpu
from unrolled.engines.native.backend import COMPILED
from unrolled.engines.native.toolchain import build, cache, compiler, cpu, eviction, prebuilt
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.engines.selection import current_engine
from unrolled.engines.threads import core_limit
from unrolled.layers.recurrent import Recurrent

_MODES = ("inference", "training")
_VARIABLES = (
    cache.VARIABLE,
    eviction.VARIABLE,
    prebuilt.VARIABLE,
    build.ARCH,
    "UNROLLED_LOG",
    "UNROLLED_VERIFY",
    "CXX",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def collect_report(layers: Mapping[str, Recurrent], device: str = "cpu") -> dict[str, Any]:
    """Collect the whole report as data.

    Args:
        layers: Layers to find the engine of, by name.
        device: The device that the layers run on. It needn't exist on this machine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report contains what they say
        return {
            "versions": _versions(),
            "processor": {
                "name": cpu.name(),
                "system": cpu.system(),
                "instructions": cpu.usable_features(),
            },
            "compiler": _compiler(),
            "kernel": _test_kernel(),
            "threads": _threads(),
            "cache": _cache(),
            "shipped": _prebuilt_kernels(),
            "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "engine": current_engine(),
            "device": device,
            "gpu": _gpu(),
            "layers": layer_engines(layers, device=torch.device(device)),
        }


def layer_engines(
    layers: Mapping[str, Recurrent], training: bool = True, device: torch.device | None = None
) -> list[dict[str, Any]]:
    """Find the engine that ``engine("auto")`` selects for each layer and direction, and the reason.

    Args:
        layers: The layers by name.
        training: Whether to find the engine for training, too.
        device: The device that they run on. By default, that of their parameters. It needn't exist.
    """
    entries: list[dict[str, Any]] = []
    for name, layer in layers.items():
        layer_index = itertools.count()

        def run(
            cells: list[Cell],
            x: Tensor,
            states: list[Any],
            sizes: list[int] | None,
            name: str = name,
            layer: Recurrent = layer,
            layer_index: Iterator[int] = layer_index,
            wrapper_specs: Sequence[WrapperSpec] = ((), ()),
            extra_inputs: Tensor | None = None,
        ) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
            """Record the engine of one layer's cells instead of running them; return zeros."""
            index, results = next(layer_index), []
            for cell, spec, direction in zip(cells, wrapper_specs, ("forward", "backward"), strict=False):
                state = reference.zeros(cell, x)
                entry: dict[str, Any] = {
                    "layer": name,
                    "index": index,
                    "direction": direction,
                    "cell": f"{type(cell).__name__}({cell.input}, {cell.hidden})",
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "stacked": layer.num_layers > 1 or layer.bidirectional,
                }
                for mode in _MODES[: 1 + training]:
                    engine, why = dispatch.which(wrap(cell, spec), x, state, mode == "training", device)
                    entry[mode] = {"engine": engine, "why": why}
                entries.append(entry)
                results.append((x.new_zeros(*x.shape[:-1], state[0].shape[-1]), state))
            return results

        dtype = next((parameter.dtype for parameter in layer.parameters()), None)
        with torch.no_grad():
            layer.unroll(torch.zeros(1, 1, layer.input_size, dtype=dtype), None, run)
    return entries


def print_report(console: Console, data: dict[str, Any]) -> None:
    """Print the data of :func:`collect_report`."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=len("Processor   "))
    table.add_column(overflow="fold")
    for title, lines in _format_sections(data).items():
        table.add_row(title, "\n".join(lines))
    console.print(table)
    if data["layers"]:
        on_gpu = ", for calls that torch.nn doesn't support" if data["device"] != "cpu" else ""
        console.print(Text(f'\nEngine of each layer with engine("auto"){on_gpu}', style="bold"))
        for entry in data["layers"]:
            console.print(Padding(Text(_format_layer(entry)), (0, 0, 0, 2)))


def format_count(kernels: int) -> str:
    """Format a number of kernels."""
    return "1 kernel" if kernels == 1 else f"{kernels} kernels"


def format_size(count: int) -> str:
    """Format a number of bytes in KiB or MiB."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _versions() -> dict[str, str]:
    return {
        "unrolled": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _compiler() -> dict[str, Any]:
    try:
        first, arch = next(compiler.compilers()), build.arch()
    except compiler.NoCompilerError as error:
        return {"problem": str(error)}
    flags = [*first.flags, first.arch_flag(arch)]
    return {"command": shlex.join(first.command), "version": first.title, "flags": flags, "problem": None}


def _test_kernel() -> dict[str, Any]:
    """Compile the smallest kernel, or load it from the cache, and run it."""
    start = time.perf_counter()
    try:
        lanes = build.load(build.PROBE).lanes()
        seconds = time.perf_counter() - start
        return {"arch": build.arch(), "float32_lanes": lanes, "seconds": seconds, "problem": None}
    except NoCompilerError as error:
        return {"problem": str(error)}


def _threads() -> dict[str, Any]:
    openmp: Any = torch.backends.openmp  # untyped
    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "openmp": openmp.is_available(),
        "cores": core_limit() or os.cpu_count(),
    }


def _gpu() -> dict[str, Any]:
    """Describe the CUDA devices, and why kernels can't run on the first one, if so."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "devices": [
            {
                "name": one.name,
                "capability": f"{one.major}.{one.minor}",
                "multiprocessors": one.multi_processor_count,
            }
            for one in properties
        ],
        "problem": gpu.BACKEND.unavailable(torch.device("cuda", 0)),
    }


def _cache() -> dict[str, Any]:
    folder = cache.user_folder()
    if folder is None:
        reason = "no cache folder because there is no home directory"
        return {"folder": None, "libraries": 0, "bytes": 0, "writable": False, "problem": reason}
    problem = cache.why_unsafe(folder)
    libraries, size = cache.size(folder) if problem is None else (0, 0)
    content = {"folder": str(folder), "libraries": libraries, "bytes": size}
    return {**content, "writable": problem is None and _is_writable(folder), "problem": problem}


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError:
        return False
    return True


def _prebuilt_kernels() -> dict[str, Any] | None:
    folder = prebuilt.find_folder(None)
    if folder is None:
        return None
    return {
        "folder": str(folder.path),
        "arch": folder.arch,
        "libraries": sum(note["arch"] == folder.arch for note in folder.metadata.values()),
        "problem": folder.problem or None,
    }


def _format_sections(data: dict[str, Any]) -> dict[str, list[str]]:
    """Format the report on the machine as lines by section title."""
    versions, processor, threads = data["versions"], data["processor"], data["threads"]
    kernel = data["kernel"]
    cores = "1 core" if threads["cores"] == 1 else f"{threads['cores']} cores"
    sections = {
        "Unrolled": [
            versions["unrolled"],
            f"Python {versions['python']}, torch {versions['torch']}, NumPy {versions['numpy']}",
        ],
        "Compiler": _format_compiler(data["compiler"]),
        "Processor": [f"{processor['name']}, {processor['system']}, {cores}"],
    }
    if not kernel["problem"]:
        lanes = kernel["float32_lanes"]
        sections["Processor"].append(
            f"instruction set: {kernel['arch']} (vectors of {lanes} float32 or {lanes // 2} float64)"
        )
    openmp = "with" if threads["openmp"] else "without"
    sections["Threads"] = [f"torch uses {threads['torch']}, {openmp} OpenMP"]
    sections["Cache"] = _format_cache(data["cache"])
    if data["shipped"]:
        shipped = data["shipped"]
        sections["Prebuilt"] = [
            shipped["problem"]
            or f"{shipped['folder']} ({format_count(shipped['libraries'])} for {shipped['arch']})"
        ]
    sections["Engine"] = _format_engine(data["engine"], kernel)
    if data["gpu"]["devices"] or data["device"] != "cpu":
        sections["GPU"] = _format_gpu(data["gpu"])
    if data["variables"]:
        sections["Environment"] = [f"{name}={value}" for name, value in data["variables"].items()]
    return sections


def _format_compiler(data: dict[str, Any]) -> list[str]:
    if data["problem"]:
        return [data["problem"]]
    return [data["version"], f"{data['command']} {shlex.join(data['flags'])}"]


def _format_cache(data: dict[str, Any]) -> list[str]:
    if data["problem"]:
        return [data["problem"]]
    access = "private and writable" if data["writable"] else "private, but not writable"
    content = f"{format_count(data['libraries'])}, {format_size(data['bytes'])}"
    return [f"{data['folder']} ({content}; {access})"]


def _format_engine(engine: str, kernel: dict[str, Any]) -> list[str]:
    setting = f"{engine} (default)" if engine == "auto" else engine
    if kernel["problem"]:
        return [setting, f"native: not available because {kernel['problem']}"]
    return [setting, f"native: the test kernel loaded and ran in {kernel['seconds']:.2f} s"]


def _format_gpu(data: dict[str, Any]) -> list[str]:
    lines = [
        f"{one['name']}, compute capability {one['capability']}, {one['multiprocessors']} multiprocessors"
        for one in data["devices"]
    ]
    return [*lines, f"kernels not available: {data['problem']}" if data["problem"] else "kernels: Triton"]


def _format_layer(entry: dict[str, Any]) -> str:
    """Format the engines of one layer and direction."""
    position = f", layer {entry['index']} {entry['direction']}" if entry["stacked"] else ""
    modes = {mode: entry[mode] for mode in _MODES if mode in entry}
    engines = {
        mode: choice["engine"] + ("" if choice["why"] == COMPILED else f" ({choice['why']})")
        for mode, choice in modes.items()
    }
    same = len(set(engines.values())) == 1
    summary = next(iter(engines.values())) if same else ", ".join(f"{m} {e}" for m, e in engines.items())
    return f"{entry['layer']}{position}: {entry['cell']}, {entry['dtype']}: {summary}"
