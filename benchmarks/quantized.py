"""Compare the speed of quantized layers with float32 and with other runtimes' int8.

    python benchmarks/quantized.py                    # LSTM and GRU, 128 to 1024 units, batches 1, 8 and 32
    python benchmarks/quantized.py --hidden 512 --batch 1 --threads 1

For each row, the runtimes are timed in turn, in blocks of calls. There is a pause before each block, because
the threads of other runtimes spin for some time after a call. Ratios above 1 mean that our int8 is faster.
The reading limit is the time to read as many bytes as the int8 recurrent weights have, once per step. On one
thread, no loop that reads its weights in each step can be faster.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import unrolled as ur

PAUSE = 0.05  # seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", nargs="+", default=["LSTM", "GRU"], choices=["LSTM", "GRU"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="blocks of calls of each runtime")
    parser.add_argument("--seconds", type=float, default=0.2, help="duration of a block")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{options.threads} threads, {options.steps} steps, input = hidden; milliseconds, medians of blocks"
    )
    for cell in options.cell:
        for hidden in options.hidden:
            for batch in options.batch:
                print_row(cell, hidden, batch, options)


@torch.no_grad()
def print_row(cell: str, hidden: int, batch: int, options: argparse.Namespace) -> None:
    """Time all runtimes, and print a row."""
    theirs = getattr(nn, cell)(hidden, hidden).eval()
    x = torch.randn(options.steps, batch, hidden)
    ours = ur.convert(theirs)
    calls: dict[str, Callable[[], Any]] = {}
    with ur.frozen(ours):
        calls["float32"] = lambda: ours(x)
        for weights in ("int8", "bfloat16", "float16"):
            calls[weights] = functools.partial(ur.quantize(theirs, weights), x)
        calls["int8, float x"] = functools.partial(ur.quantize(theirs, quantize_input=False), x)
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), dtype=torch.qint8)[0]
        calls["torch int8"] = lambda: dynamic(x)
        calls.update(onnx_calls(theirs, x, options.threads))
        times = measure(calls, options.rounds, options.seconds)
    gates = 4 if cell == "LSTM" else 3
    limit = (reading_limit(gates * hidden * hidden) - reading_limit(8)) * options.steps
    name = f"{cell} {hidden} × {batch}"
    print(f"{name:16}", "  ".join(f"{key} {value * 1e3:.3f}" for key, value in times.items()))
    ratios = {key: value / times["int8"] for key, value in times.items() if key != "int8"}
    print(" " * 16, "to int8:", "  ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()))
    if hidden >= 512 and batch == 1:
        print(" " * 16, f"reading limit {limit * 1e3:.3f}: {limit / times['int8']:.0%}")
    found, right = ur.quantize(theirs)(x)[0], theirs(x)[0]
    error = float((found - right).square().mean().sqrt())
    other = float((dynamic(x)[0] - right).square().mean().sqrt())
    print(" " * 16, f"rms error of int8 {error:.2g}, of torch's int8 {other:.2g}", flush=True)


def onnx_calls(layer: nn.Module, x: Tensor, threads: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield calls of ONNX Runtime, in float32 and, for the LSTM, in int8. Nothing without onnxruntime."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = ur.io.to_onnx(ur.convert(layer))
    feeds = {"x": x.numpy()}
    for name in ("ort float32", "ort int8"):
        if name == "ort int8":
            if not isinstance(layer, nn.LSTM):
                return
            model = dynamic_lstm(onnx, layer)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        yield name, lambda session=session: session.run(None, feeds)


def dynamic_lstm(onnx: Any, layer: nn.LSTM) -> Any:
    """Return a model with ONNX Runtime's DynamicQuantizeLSTM, with one scale per row of the weights."""
    hidden = layer.hidden_size
    order = torch.cat([torch.arange(k * hidden, (k + 1) * hidden) for k in (0, 3, 1, 2)])  # i, o, f, c
    arrays = {}
    for name, weight in (("W", layer.weight_ih_l0), ("R", layer.weight_hh_l0)):
        rows = weight.detach()[order]
        scales = rows.abs().amax(1) / 127
        quantized = (rows / scales[:, None]).round().to(torch.int8)
        arrays[name] = quantized.t().contiguous()[None]
        arrays[f"{name}_scale"] = scales[None]
        arrays[f"{name}_zero"] = torch.zeros(1, 4 * hidden, dtype=torch.int8)
    arrays["B"] = torch.cat([layer.bias_ih_l0.detach()[order], layer.bias_hh_l0.detach()[order]])[None]
    helper = onnx.helper
    names = ["x", "W", "R", "B", "", "", "", "", "W_scale", "W_zero", "R_scale", "R_zero"]
    node = helper.make_node("DynamicQuantizeLSTM", names, ["y"], domain="com.microsoft", hidden_size=hidden)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "lstm",
        [helper.make_tensor_value_info("x", float32, [None, None, layer.input_size])],
        [helper.make_tensor_value_info("y", float32, None)],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def measure(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, float]:
    """Return the median time of a call for each runtime, in seconds."""
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def reading_limit(size: int) -> float:
    """Return the time of one pass over some bytes, in seconds, on one thread."""
    values = numpy.ones(size // 8, numpy.int64)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        values.max()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
