"""What this machine gives the native engine, and which engine each layer takes: ``unrolled doctor``."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
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
from unrolled.engines import dispatch, reference
from unrolled.engines.native.toolchain import build, cache, compiler, cpu, prebuilt
from unrolled.engines.native.toolchain.compiler import NoCompilerError
from unrolled.layers.recurrent import Recurrent

_MODES = ("inference", "training")
_VARIABLES = (
    cache.VARIABLE,
    prebuilt.VARIABLE,
    build.ARCH,
    "UNROLLED_LOG",
    "CXX",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def examine(layers: Mapping[str, Recurrent]) -> dict[str, Any]:
    """Everything, as data.

    Args:
        layers: by name; none is run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it
        return {
            "versions": _versions(),
            "processor": {
                "name": cpu.name(),
                "system": cpu.system(),
                "instructions": cpu.known(),
            },
            "compiler": _compiler(),
            "kernel": _kernel(),
            "threads": _threads(),
            "cache": _cache(),
            "shipped": _shipped(),
            "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
            "engine": dispatch.chosen(),
            "layers": engines_of(layers),
        }


def engines_of(layers: Mapping[str, Recurrent], training: bool = True) -> list[dict[str, Any]]:
    """Which engine takes each layer and direction under ``engine("auto")``, and why.

    Args:
        layers: by name.
        training: whether to tell it for training too.
    """
    found: list[dict[str, Any]] = []
    for name, layer in layers.items():
        index = itertools.count()

        def run(
            cells: list[Cell],
            x: Tensor,
            states: list[Any],
            sizes: list[int] | None,
            name: str = name,
            layer: Recurrent = layer,
            index: Iterator[int] = index,
        ) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
            number, results = next(index), []
            for cell, direction in zip(cells, ("forward", "backward"), strict=False):
                state = reference.zeros(cell, x)
                entry: dict[str, Any] = {
                    "layer": name,
                    "index": number,
                    "direction": direction,
                    "cell": f"{type(cell).__name__}({cell.input}, {cell.hidden})",
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "stacked": layer.num_layers > 1 or layer.bidirectional,
                }
                for mode in _MODES[: 1 + training]:
                    engine, why = dispatch.which(cell, x, state, mode == "training")
                    entry[mode] = {"engine": engine, "why": why}
                found.append(entry)
                results.append((x.new_zeros(*x.shape[:-1], state[0].shape[-1]), state))
            return results

        dtype = next((parameter.dtype for parameter in layer.parameters()), None)
        with torch.no_grad():
            layer.unroll(torch.zeros(1, 1, layer.input_size, dtype=dtype), None, run)
    return found


def say(console: Console, data: dict[str, Any]) -> None:
    """Print what :func:`examine` has found."""
    console.print(Text(f"unrolled {data['versions']['unrolled']}", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in _told(data).items():
        table.add_row(f"  {name}", "\n".join(lines))
    console.print(table)
    if data["layers"]:
        console.print(Text('\nLayers, with engine("auto")', style="bold"))
        for entry in data["layers"]:
            console.print(Padding(Text(_told_of(entry)), (0, 0, 0, 2)))


def bytes_in_words(count: int) -> str:
    """A size for a reader."""
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
        found, arch = next(compiler.compilers()), build.arch()
    except compiler.NoCompilerError as error:
        return {"trouble": str(error)}
    flags = [*compiler.FLAGS, found.arch_flag(arch)]
    return {"command": shlex.join(found.command), "version": found.title, "flags": flags, "trouble": None}


def _kernel() -> dict[str, Any]:
    """The smallest kernel, compiled or taken from where it lies, and run."""
    began = time.perf_counter()
    try:
        lanes = build.load(build.PROBE).lanes()
        seconds = time.perf_counter() - began
        return {"arch": build.arch(), "float32_lanes": lanes, "seconds": seconds, "trouble": None}
    except NoCompilerError as error:
        return {"trouble": str(error)}


def _threads() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    openmp: Any = torch.backends.openmp  # without types
    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "openmp": openmp.is_available(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


def _cache() -> dict[str, Any]:
    folder = cache.chosen()
    if folder is None:
        return {"folder": None, "libraries": 0, "bytes": 0, "writable": False, "trouble": "there is no home"}
    trouble = cache.refusal(folder)
    libraries, size = cache.size(folder) if trouble is None else (0, 0)
    found = {"folder": str(folder), "libraries": libraries, "bytes": size}
    return {**found, "writable": trouble is None and _writable(folder), "trouble": trouble}


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError:
        return False
    return True


def _shipped() -> dict[str, Any] | None:
    folder = prebuilt.folder(None)
    if folder is None:
        return None
    here = {
        "folder": str(folder.path),
        "arch": folder.arch,
        "libraries": sum(note["arch"] == folder.arch for note in folder.notes.values()),
    }
    return {**here, "trouble": folder.trouble or None}


def _told(data: dict[str, Any]) -> dict[str, list[str]]:
    """The machine's part of the report: lines by heading."""
    found, kernel = data["compiler"], data["kernel"]
    lines = {
        "versions": [", ".join(f"{name} {version}" for name, version in data["versions"].items())],
        "processor": [f"{data['processor']['name']}, {data['processor']['system']}"],
    }
    if found["trouble"]:
        lines["compiler"] = [found["trouble"]]
    else:
        lines["compiler"] = [found["version"], f"{found['command']} {shlex.join(found['flags'])}"]
    if kernel["trouble"]:
        lines["kernels"] = [f"none can be run: {kernel['trouble']}"]
    else:
        lanes = kernel["float32_lanes"]
        lines["kernels"] = [
            f"instruction set {kernel['arch']}: vectors of {lanes} float32 or {lanes // 2} float64",
            f"the smallest kernel was ready, and had run, after {kernel['seconds']:.2f} s",
        ]
    threads = data["threads"]
    lines["threads"] = [
        f"{threads['torch']} of torch ({'with' if threads['openmp'] else 'without'} OpenMP), "
        f"{threads['cores']} cores for this process"
    ]
    lines["cache"] = _cache_told(data["cache"])
    if data["shipped"]:
        shipped_here = data["shipped"]
        lines["shipped"] = [
            shipped_here["trouble"]
            or f"{shipped_here['folder']}: {shipped_here['libraries']} libraries for {shipped_here['arch']}"
        ]
    lines["engine"] = [f"{data['engine']}, where nothing else is chosen"]
    if data["variables"]:
        lines["variables"] = [f"{name}={value}" for name, value in data["variables"].items()]
    return lines


def _cache_told(found: dict[str, Any]) -> list[str]:
    if found["trouble"]:
        return [found["trouble"]]
    can = "can be written to" if found["writable"] else "can't be written to"
    return [
        found["folder"],
        f"{found['libraries']} libraries, {bytes_in_words(found['bytes'])}; it is this user's own and {can}",
    ]


def _told_of(entry: dict[str, Any]) -> str:
    """The engines of one layer and direction, in a sentence."""
    where = f" {entry['index']} {entry['direction']}" if entry["stacked"] else ""
    modes = {mode: entry[mode] for mode in _MODES if mode in entry}
    told = {
        mode: found["engine"] + ("" if found["engine"] == "native" else f" ({found['why']})")
        for mode, found in modes.items()
    }
    same = len(set(told.values())) == 1
    engines_told = next(iter(told.values())) if same else ", ".join(f"{m} {t}" for m, t in told.items())
    return f"{entry['layer']}{where}: {entry['cell']}, {entry['dtype']}: {engines_told}"
