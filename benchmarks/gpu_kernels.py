"""Compile the GPU kernels for several devices, and list the registers and the memory that they need.

    python benchmarks/gpu_kernels.py --json runs/gpu_kernels.json [--cells LSTM,GRU] [--dtype float32]

It needs Triton (``pip install triton``), but no GPU. For each kernel that ``engines/gpu/choice.py`` prefers,
it prints the strategy, the registers per thread, the bytes per thread that are spilled to local memory, and
the shared memory per program. The exit code is 1 if a kernel needs more shared memory than the device has.

The results are saved after each kernel. If the file exists, the kernels in it are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import unrolled as ur
from unrolled.engines.gpu.backend import BACKEND
from unrolled.engines.gpu.kernel_source import Argument, KernelSpec
from unrolled.engines.gpu.runtime import TritonRuntime
from unrolled.engines.gpu.tuning import COLUMN_ROWS, ROWS, SHARED_ROWS

CELLS = ("RNN", "GRU", "LSTM", "LayerNormLSTM", "MinGRU", "SLSTM")
HIDDEN = (32, 64, 128, 256, 512, 1024)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a program, by capability
LOOPS = ("inference", "training", "backward")
_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
}


def compile_for(spec: KernelSpec, dtype: torch.dtype, capability: int) -> dict[str, Any]:
    """Compile a kernel, and return its registers and memory.

    Args:
        spec: The kernel.
        dtype: Dtype of the tensors of a call.
        capability: Compute capability of the device, such as 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = TritonRuntime().load(spec.source)
    precision = "ieee" if dtype is torch.float64 else "tf32"
    rows = SHARED_ROWS if spec.meetings else COLUMN_ROWS if spec.blocks else ROWS
    constants = {"REVERSE": False, "SHIFT": 0, "PRECISION": precision, "ROWS": rows}
    constants |= {"starts": None, "lengths": None}
    types = {one.name: _TYPES[_dtype_of(one, dtype)] for one in spec.arguments}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in types:
            attributes[(position,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": spec.warps, "enable_fp_fusion": True}
    if spec.meetings:
        options["launch_cooperative_grid"] = True
    start = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - start
    usage = _resources(kernel.asm["cubin"], Path(triton.__file__).parent)
    products = kernel.asm["ptx"].count("mma")
    return {"shared": kernel.metadata.shared, "products": products, "seconds": round(seconds, 1), **usage}


def _dtype_of(argument: Argument, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the tensor for a pointer."""
    if argument.kind == "arrived":
        return torch.int32
    half = dtype in (torch.bfloat16, torch.float16)
    # What is computed from parameters, and workspaces, are float32.
    is_derived = argument.kind == "value" and argument.target.op != "placeholder"
    return torch.float32 if half and (argument.kind == "workspace" or is_derived) else dtype


def _resources(cubin: bytes, triton_folder: Path) -> dict[str, int]:
    """Return the registers of a thread, and the bytes of its stack, which holds what is spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return {"registers": int(found[1]), "spilled": int(found[2])}


def specs_of(cell: str, hidden: int, dtype: torch.dtype) -> dict[str, KernelSpec]:
    """Return the kernel of each loop that is launched first."""
    compiled: Any = BACKEND.compile(getattr(ur.cells, cell)(hidden, hidden), dtype, torch.device("cuda", 0))
    return {loop: getattr(compiled, loop).specs[0] for loop in LOOPS}


def format_table(entries: list[dict[str, Any]]) -> str:
    """Return the results as a table in Markdown, a row for each cell and size."""
    capabilities = sorted({entry["capability"] for entry in entries})
    devices = " | ".join(f"sm_{capability}" for capability in capabilities)
    lines = [f"| cell | hidden | dtype | strategy | {devices} |", "|---" * (4 + len(capabilities)) + "|"]
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault((entry["cell"], entry["hidden"], entry["dtype"]), []).append(entry)
    for key in sorted(rows, key=lambda key: (CELLS.index(key[0]) if key[0] in CELLS else len(CELLS), key)):
        strategies = dict.fromkeys(entry["strategy"] for entry in rows[key])
        cells = [_format_device(rows[key], capability) for capability in capabilities]
        lines.append("| " + " | ".join([*map(str, key), ", ".join(strategies), *cells]) + " |")
    return "\n".join(lines)


def _format_device(entries: list[dict[str, Any]], capability: int) -> str:
    """Return the KiB of shared memory of each loop, and the most registers and spilled bytes of a thread."""
    loops = {entry["loop"]: entry for entry in entries if entry["capability"] == capability}
    if loops.keys() != {*LOOPS}:
        return "–"
    shared = " / ".join(f"{loops[loop]['shared'] / 1024:.0f}" for loop in LOOPS)
    registers, spilled = (max(one[name] for one in loops.values()) for name in ("registers", "spilled"))
    return f"{shared}; {registers}; {spilled}"


def main() -> int:
    """Compile all kernels and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help="names in unrolled.cells, or all")
    parser.add_argument("--hidden", default=",".join(map(str, HIDDEN)))
    parser.add_argument("--capabilities", default=",".join(map(str, SHARED_MEMORY)))
    parser.add_argument("--dtype", default="float32", choices=[str(dtype)[6:] for dtype in _TYPES][:4])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    every = [name for name in ur.cells.__all__ if isinstance(getattr(ur.cells, name), type)]
    names = every if options.cells == "all" else options.cells.split(",")
    entries = json.loads(options.json.read_text()) if options.json.exists() else []
    key = ("cell", "hidden", "dtype", "loop", "capability")
    done = {tuple(entry[name] for name in key) for entry in entries}
    dtype = getattr(torch, options.dtype)
    for cell, hidden in itertools.product(names, map(int, options.hidden.split(","))):
        specs = specs_of(cell, hidden, dtype)
        for loop, capability in itertools.product(LOOPS, map(int, options.capabilities.split(","))):
            if (cell, hidden, options.dtype, loop, capability) in done:
                continue
            entry = {"cell": cell, "hidden": hidden, "dtype": options.dtype, "loop": loop}
            entry |= {"strategy": specs[loop].choice.strategy, "capability": capability}
            entries.append(entry | compile_for(specs[loop], dtype, capability))
            options.json.write_text(json.dumps(entries, indent=1))
    print("KiB of shared memory in inference / training / backward; registers; bytes that a thread spills\n")
    print(format_table(entries))
    wrong = [one for one in entries if one["shared"] > SHARED_MEMORY[one["capability"]]]
    for entry in wrong:
        print(f"too large: {entry}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
