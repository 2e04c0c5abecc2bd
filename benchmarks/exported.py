"""Time one step of exported C against RTNeural and ONNX Runtime, for one input and batch size 1.

RTNeural's layers have sizes that are fixed at compile time. Its source isn't in this repository: pass the
folder of a clone. ONNX Runtime runs on one thread with bound inputs and outputs. For this comparison, our
step is called with ctypes, so both include the overhead of a call from Python. All results are first compared
with torch. The runtimes are timed in turn, and the times are medians.

python benchmarks/exported.py [--rtneural FOLDER] [--march native] [--units 8,16,32,64,128] [--cc clang]
                              [--weights int8]
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import unrolled as ur

KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU}
BACKENDS = {  # of RTNeural: the arguments of the compiler
    "Eigen": (
        "-DRTNEURAL_USE_EIGEN=1",
        "-DRTNEURAL_DEFAULT_ALIGNMENT=32",  # its maximum
        "-DEIGEN_STACK_ALLOCATION_LIMIT=0",  # matrices of 128 units are larger than its default allows
    ),
    "xsimd": ("-DRTNEURAL_USE_XSIMD=1", "-DRTNEURAL_DEFAULT_ALIGNMENT=64"),
}
STEPS = 64
ROUNDS, CALLS = 21, 400  # for ONNX Runtime
TOLERANCE = 1e-4  # of the outputs; RTNeural approximates no function, but sums in another order
QUANTIZED_TOLERANCE = 0.02  # with --weights
PROGRAM = Path(__file__).with_suffix(".cpp")


def main() -> None:
    """Print a table for each kind of layer."""
    parser = argparse.ArgumentParser(description="Time one step of exported C.")
    parser.add_argument("--rtneural", type=Path, metavar="FOLDER", help="a clone of RTNeural")
    parser.add_argument("--xsimd", type=Path, metavar="FOLDER", help="headers of xsimd, if it has none")
    parser.add_argument("--march", default="native", help="instruction set for -march (default: native)")
    parser.add_argument("--units", default="8,16,32,64,128", help="hidden sizes (default: 8,16,32,64,128)")
    parser.add_argument("--cc", default="cc", help="C compiler for ours (default: cc)")
    parser.add_argument("--cxx", default="c++", help="C++ compiler for RTNeural (default: c++)")
    parser.add_argument("--weights", help="ours with int8, bfloat16 or float16 weights (default: float32)")
    options = parser.parse_args()
    console = Console(highlight=False)
    for name in KINDS:
        rows = [measure(name, int(units), options) for units in options.units.split(",")]
        console.print(table(name, rows))


def measure(name: str, units: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the hidden size, our times, and the times of the others relative to ours."""
    torch.manual_seed(0)
    layer = KINDS[name](1, units).eval()
    ours_layer = layer if options.weights is None else ur.quantize(ur.convert(layer), options.weights)
    result = {"units": float(units)}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        ur.export.c(ours_layer, folder, name="m")
        flags = ("-O3", f"-march={options.march}", "-ffp-contract=off")
        run(options.cc, *flags, "-fPIC", "-c", folder / "m.c", "-o", folder / "m.o")
        if options.rtneural is not None:
            (folder / "layer.h").write_text(header(name, layer))
            for backend, ours, theirs in against_rtneural(folder, options):
                result |= {"ours, us": ours, f"RTNeural, {backend}": theirs / ours}
        run(options.cc, "-shared", folder / "m.o", "-o", folder / "m.so")
        ours, theirs = against_onnx_runtime(layer, ctypes.CDLL(str(folder / "m.so")), options)
        return result | {"ours by ctypes, us": ours, "ONNX Runtime": theirs / ours}


def run(*command: object) -> str:
    """Run a command, and return what it prints."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"{command[0]} can't be run: {error.strerror}") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[:2000]}")
    return done.stdout


def header(name: str, layer: nn.RNNBase) -> str:
    """Return the sizes, the weights in RTNeural's layout, and inputs with torch's outputs, as C++."""
    # The gates of RTNeural's GRU are z, r, n; those of torch r, z, n.
    order = (0, 1, 2, 3) if name == "LSTM" else (1, 0, 2)

    def gates(parameter: Tensor) -> Tensor:
        parts = parameter.detach().chunk(len(order))
        return torch.cat([parts[index] for index in order])

    biases = [gates(layer.bias_ih_l0), gates(layer.bias_hh_l0)]
    x = torch.randn(STEPS, 1)
    with torch.no_grad():
        y = layer(x)[0]
    arrays = {
        "WEIGHT_IH": gates(layer.weight_ih_l0).T,
        "WEIGHT_HH": gates(layer.weight_hh_l0).T,
        "BIAS": biases[0] + biases[1] if name == "LSTM" else torch.cat(biases),
        "X": x,
        "Y": y,
    }
    numbers = {"INPUTS": 1, "UNITS": layer.hidden_size, "GATES": len(order), "STEPS": STEPS}
    lines = [f"#define {key} {value}" for key, value in numbers.items()]
    lines.append(f"#define LAYER {name}LayerT")
    for key, values in arrays.items():
        text = ", ".join(f"{value:.9e}f" for value in values.reshape(-1).tolist())
        lines.append(f"static const float {key}[] = {{{text}}};")
    return "\n".join(lines) + "\n"


def against_rtneural(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Yield for each of RTNeural's backends its name, and the times of a step: ours and RTNeural's."""
    clone = options.rtneural.resolve()
    xsimd = options.xsimd or clone / "modules" / "xsimd" / "include"
    for backend, defines in BACKENDS.items():
        includes = [clone, clone / "modules" / "Eigen", xsimd.resolve(), folder]
        if backend == "xsimd" and not xsimd.is_dir():
            continue
        flags = ["-std=c++17", "-O3", f"-march={options.march}", *defines]
        program = folder / backend
        run(options.cxx, *flags, *(f"-I{one}" for one in includes), PROGRAM, folder / "m.o", "-o", program)
        *differences, ours, theirs = map(float, run(program).split())
        if max(differences) > tolerance(options):
            raise SystemExit(f"the outputs differ from torch's by {max(differences):g} ({backend})")
        yield backend, ours, theirs


def tolerance(options: argparse.Namespace) -> float:
    """Return by how much outputs may differ."""
    return TOLERANCE if options.weights is None else QUANTIZED_TOLERANCE


def against_onnx_runtime(
    layer: nn.RNNBase, library: ctypes.CDLL, options: argparse.Namespace
) -> tuple[float, float]:
    """Return the times of a step in microseconds: ours by ctypes, and ONNX Runtime's."""
    x, y = np.zeros((1, 1, 1), np.float32), np.zeros(layer.hidden_size, np.float32)
    state = ctypes.create_string_buffer(1 << 16)
    library.m_init(state)
    arguments = [state, *(ctypes.c_void_p(one.ctypes.data) for one in (x, y))]
    session, binding, arrays = onnx_session(layer, x)
    steps: list[Callable[[], Any]] = [
        lambda: library.m_step(*arguments),
        lambda: session.run_with_iobinding(binding),
    ]
    x[:] = 0.5
    for step in steps:
        step()
    if not math.isclose(0, float(np.abs(arrays["output"].reshape(-1) - y).max()), abs_tol=tolerance(options)):
        raise SystemExit("the outputs of ONNX Runtime differ from ours")
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for step, one in zip(steps, times, strict=True):
            start = time.perf_counter()
            for _ in range(CALLS):
                step()
            one.append((time.perf_counter() - start) / CALLS * 1e6)
    return median(times[0]), median(times[1])


def onnx_session(layer: nn.RNNBase, x: np.ndarray) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Return a session for a step on one thread, its binding and the bound arrays, which must stay alive."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = ur.io.to_onnx(ur.convert(layer), states=True).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    arrays: dict[str, np.ndarray] = {"x": x}
    for one in session.get_inputs()[1:]:
        arrays[one.name] = np.zeros((1, 1, layer.hidden_size), np.float32)
        binding.bind_cpu_input(one.name, arrays[one.name])
    for one in session.get_outputs():
        arrays[one.name] = array = np.zeros((1, 1, layer.hidden_size), np.float32)
        binding.bind_output(one.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    return session, binding, arrays


def table(name: str, rows: list[dict[str, float]]) -> Table:
    """Return a table with a row for each size, and the means of the ratios."""
    result = Table(title=f"{name}: a step in us, and the others' times relative to ours")
    columns = list(rows[0])
    for column in columns:
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(*[f"{row[one]:.0f}" if one == "units" else f"{row[one]:.3g}" for one in columns])
    ratios = [one for one in columns if one != "units" and "us" not in one]
    means = {one: geometric_mean([row[one] for row in rows]) for one in ratios}
    result.add_row("mean", *[f"{means[one]:.3g}" if one in means else "" for one in columns[1:]])
    return result


if __name__ == "__main__":
    main()
