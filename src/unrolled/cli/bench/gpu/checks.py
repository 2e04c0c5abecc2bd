"""Checks that need a GPU: captured graphs, streams, devices, synchronization and bit-identical reruns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unrolled
from unrolled.cli.bench.gpu.custom import REPEATED, Checked, FirstCaptured
from unrolled.cli.bench.gpu.parity import products_in
from unrolled.layers.recurrent import Recurrent
from unrolled.layers.torch_layers import LAYERS

Check = Callable[[torch.device], str | None]
_SIZES = (8, 20, 16, 48)  # steps, batch, input, hidden


def _layer(device: torch.device, cell: Any = Checked) -> tuple[Any, Tensor]:
    steps, batch, features, hidden = _SIZES
    torch.manual_seed(1)
    return Recurrent(cell, features, hidden).to(device), torch.randn(steps, batch, features).to(device)


def capture(device: torch.device) -> str | None:
    """A captured call, replayed with another input, returns the same as a plain call."""
    layer, x = _layer(device)
    static, other = x.clone(), torch.randn_like(x)
    with torch.no_grad():
        expected = layer(other)[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(static)[0]
        static.copy_(other)
        graph.replay()
    return _unless(torch.equal(output, expected), "replaying a CUDA graph gives a different output")


def capture_training(device: torch.device) -> str | None:
    """A captured training step, replayed with another input, gives the gradients of a plain one."""
    layer, x = _layer(device)
    static, other = x.clone().requires_grad_(), torch.randn_like(x)

    def gradients(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(layer(value)[0].square().sum(), [value, *layer.parameters()]))

    side = _stream(device)  # as torch asks for, so that autograd's own work is warm, too
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        gradients(static)
    torch.cuda.current_stream(device).wait_stream(side)
    expected = gradients(other.clone().requires_grad_())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(static)
    with torch.no_grad():
        static.copy_(other)
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    return _unless(same, "replaying a CUDA graph gives different gradients")


def early_capture(device: torch.device) -> str | None:
    """A capture before the kernel is compiled raises an error that says what to do."""
    layer, x = _layer(device, FirstCaptured)
    try:
        with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
    except RuntimeError as error:
        advice = "run the same call once before the capture"
        return _unless(advice in str(error), f"the error doesn't say what to do: {error}")
    return "capturing a call whose kernel isn't compiled raised no error"


def streams(device: torch.device) -> str | None:
    """Calls in two streams at the same time don't disturb each other."""
    layer, x = _layer(device)
    inputs = [x, torch.randn_like(x)]
    with torch.no_grad():
        expected = [layer(value)[0].clone() for value in inputs]
        pool = [_stream(device) for _ in inputs]
        torch.cuda.synchronize(device)
        results: list[Tensor] = []
        for _ in range(20):
            for stream, value in zip(pool, inputs, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer(value)[0])
        torch.cuda.synchronize(device)
    same = all(torch.equal(result, expected[k % 2]) for k, result in enumerate(results))
    return _unless(same, "calls on two streams give different outputs")


def other_device(device: torch.device) -> str | None:
    """Kernels run on the device of their tensors, also if another one is current."""
    if torch.cuda.device_count() < 2:
        return None
    second = torch.device("cuda", 1 - (device.index or 0))
    layer, x = _layer(device)
    with torch.no_grad():
        expected = layer(x)[0].cpu()
        moved = layer.to(second)(x.to(second))[0]
    return _unless(
        torch.equal(moved.cpu(), expected), f"the output on {second} differs from that on {device}"
    )


def synchronization(device: torch.device) -> str | None:
    """A call doesn't wait for the device, in inference and in training."""
    layer, x = _layer(device)
    value = x.clone().requires_grad_()

    def run() -> None:
        layer(value)[0].sum().backward()
        with torch.no_grad():
            layer(x)

    run()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return f"a call waits for the device: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None


def repetition(device: torch.device) -> str | None:
    """Two runs are bit-identical, and rows of a smaller batch agree with those of the whole batch."""
    for cell in REPEATED:
        layer, x = _layer(device, cell)
        with torch.no_grad(), products_in("ieee"):
            output = layer(x)[0]
            if not torch.equal(output, layer(x)[0]):
                return f"{cell.__name__}: two runs aren't bit-identical"
            for first, end in ((0, 1), (3, 20), (19, 20)):
                part = layer(x[:, first:end])[0]
                if not torch.allclose(part, output[:, first:end], rtol=1e-5, atol=1e-6):
                    return f"{cell.__name__}: rows {first} to {end - 1} differ in a smaller batch"
    return None


def drop_in_layers(device: torch.device) -> str | None:
    """The kernels agree with the layers of torch.nn, also with lengths."""
    steps, batch, features, hidden = _SIZES
    lengths = torch.arange(batch) % steps + 1
    for layer_class in LAYERS:
        torch.manual_seed(2)
        layer = layer_class(features, hidden, 2, bidirectional=True).to(device)
        torch_class: Any = layer.torch_class
        theirs = torch_class(features, hidden, 2, bidirectional=True).to(device)
        theirs.load_state_dict(layer.state_dict())
        x = torch.randn(steps, batch, features).to(device)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        with torch.no_grad(), products_in("ieee"):
            expected = [theirs(x)[0], pad_packed_sequence(theirs(packed)[0])[0]]
            with unrolled.engine("native"):
                outputs = [layer(x)[0], layer(x, lengths=lengths)[0]]
        for output, one in zip(outputs, expected, strict=True):
            if not torch.allclose(output, one, rtol=1e-3, atol=1e-4):
                return f"{layer_class.__name__}: kernels differ from torch.nn"
    return None


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _unless(holds: bool, problem: str) -> str | None:
    return None if holds else problem


CHECKS: dict[str, Check] = {
    "drop-in layers": drop_in_layers,
    "repetition": repetition,
    "synchronization": synchronization,
    "streams": streams,
    "other device": other_device,
    "capture": capture,
    "capture of training": capture_training,
    "early capture": early_capture,
}


def run(name: str, device: torch.device) -> str | None:
    """Run a check on the native engine.

    Returns:
        What is wrong, or None.
    """
    with unrolled.engine("native"):
        check = CHECKS[name]
        if name.startswith("capture"):  # what is captured must have run before
            for _ in range(2):
                layer, x = _layer(device)
                value = x.clone().requires_grad_()
                layer(value)[0].square().sum().backward()
                with torch.no_grad():
                    layer(x)
        return check(device)
