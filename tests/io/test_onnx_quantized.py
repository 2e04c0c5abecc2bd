"""ONNX models of quantized layers: ONNX Runtime gives the numbers of the layer, up to rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.user_cell import MGU
from unrolled.cells.onnx_products import column_scales
from unrolled.cells.quantized_products import weight_scales

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CELLS = sorted(name for name in ur.cells.__all__ if issubclass(getattr(ur.cells, name), ur.Cell))
INT8, FLOAT16, BFLOAT16 = (getattr(onnx.TensorProto, name) for name in ("INT8", "FLOAT16", "BFLOAT16"))
REDUCED = (torch.int8, torch.float16, torch.bfloat16)
X = torch.randn(8, 2, 5)


class Heads(ur.Cell):
    """A cell with a matrix for each head, and a matrix that is computed."""

    state = {"h": "2*hidden"}
    matrices = ur.Param("2", "hidden", "hidden")
    w = ur.Param("2*hidden", "input")
    scale = ur.Param("2*hidden", "1")

    def step(self, x: Tensor, h: Tensor) -> Any:
        heads = torch.bmm(h.view(-1, 2, self.hidden).transpose(0, 1), self.matrices)
        return torch.tanh(x @ (self.w * self.scale).t() + heads.transpose(0, 1).reshape(-1, 2 * self.hidden))


def uniform(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    return module.eval()


def run(proto: Any, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(output) for output in outputs]


def check(found: Tensor, quantized: Tensor, original: Tensor) -> None:
    """Check that numbers are those of the quantized module, and not those of the original.

    Gates may differ in their last bits, and then a value is sometimes rounded to another whole number.
    """
    error = (original - quantized).norm()
    assert found.shape == quantized.shape
    assert error > 0
    assert (found - quantized).norm() < 0.3 * error + 1e-6 * quantized.norm()


def graphs(proto: Any) -> list[Any]:
    """Return the main graph and the bodies of all Scans."""
    bodies = [a.g for node in proto.graph.node for a in node.attribute if a.name == "body"]
    return [proto.graph, *bodies]


def matrices(proto: Any) -> dict[int, int]:
    """Return the number of weights in matrices of each type."""
    counts: dict[int, int] = {}
    for graph in graphs(proto):
        for one in graph.initializer:
            if sum(size > 1 for size in one.dims) > 1:
                counts[one.data_type] = counts.get(one.data_type, 0) + int(numpy.prod(one.dims))
    return counts


LAYERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "GRU": (lambda: ur.GRU(5, 33, bidirectional=True), {}),
    "projection": (lambda: ur.LSTM(5, 40, proj_size=7, batch_first=True), {}),
    "calibrated": (lambda: ur.Recurrent(MGU, 5, 40), {"calibration": [0.5 * X]}),
    "float input": (lambda: ur.LSTM(5, 40, initial_state="learned"), {"quantize_input": False}),
    "heads": (lambda: ur.Recurrent(Heads, 5, 12), {}),
    "LSTM, float16": (lambda: ur.LSTM(5, 40, bidirectional=True), {"weights": "float16"}),
    "RNN, bfloat16": (lambda: ur.RNN(5, 40), {"weights": "bfloat16"}),
    "own cell, bfloat16": (lambda: ur.Recurrent(MGU, 5, 40), {"weights": "bfloat16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    create, options = LAYERS[name]
    layer = uniform(create())
    quantized = ur.quantize(layer, **options)
    proto = ur.io.to_onnx(quantized)
    onnx.checker.check_model(proto, full_check=True)
    for shape in ((8, 2, 5), (1, 1, 5), (3, 7, 5)):
        x = torch.randn(shape)
        with ur.engine("reference"), torch.no_grad():
            right, original = quantized(x), layer(x)
        output, final, *_ = run(proto, x)
        check(output, right[0], original[0])
        first = right[1][0] if isinstance(right[1], tuple) else right[1]
        assert final.shape == first.shape
    if name != "own cell, bfloat16":  # torch.onnx converts its small matrices to float32
        kind = {"int8": INT8, "float16": FLOAT16, "bfloat16": BFLOAT16}[options.get("weights", "int8")]
        count = layer.w_l0.numel() + layer.matrices_l0.numel() if name == "heads" else _weights(quantized)
        assert matrices(proto)[kind] == count


def _weights(quantized: Any) -> int:
    """Return the number of quantized weights."""
    return sum(one.numel() for one in quantized.state_dict().values() if one.dtype in REDUCED)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CELLS)
def test_every_cell(name: str) -> None:
    layer = uniform(ur.Recurrent(getattr(ur.cells, name), 12, 12))
    quantized, x = ur.quantize(layer), torch.randn(4, 3, 12)
    with ur.engine("reference"), torch.no_grad():
        right, original = quantized(x)[0], layer(x)[0]
    check(run(ur.io.to_onnx(quantized), x)[0], right, original)


class Model(nn.Module):
    """A layer between linear layers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.encode, self.layer = nn.Linear(5, layer.input_size), layer
        self.decode = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.layer(torch.tanh(self.encode(x)))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("create", "weights", "operators"),
    [
        (lambda: ur.GRU(4, 40, bidirectional=True), "int8", ["Scan"] * 2),
        (lambda: ur.LSTM(4, 40, zoneout=0.1), "int8", ["Scan"]),
        (lambda: ur.LSTM(4, 40, num_layers=2), "float16", ["LSTM"] * 2),
        (lambda: ur.Recurrent(MGU, 4, 40), "bfloat16", ["Scan"]),
    ],
)
def test_a_model_through_torch(create: Any, weights: str, operators: list[str]) -> None:
    model = uniform(Model(create()))
    quantized = ur.quantize(model, weights)
    axes = {0: torch.export.Dim("time", min=3), 1: torch.export.Dim("batch", min=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        proto: Any = torch.onnx.export(
            quantized, (torch.randn(5, 4, 5),), dynamo=True, dynamic_shapes=(axes,), verbose=False
        ).model_proto  # type: ignore[union-attr]
    assert [node.op_type for node in proto.graph.node if node.op_type in ("Scan", "LSTM")] == operators
    used = {node.op_type for graph in graphs(proto) for node in graph.node}
    assert ("MatMulInteger" in used) is (weights == "int8")
    for shape in ((8, 2, 5), (3, 7, 5)):
        x = torch.randn(shape)
        with ur.engine("reference"), torch.no_grad():
            check(run(proto, x)[0], quantized(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo=False is deprecated
def test_torchscript_has_no_products_in_int8(tmp_path: Path) -> None:
    for model, x in ((nn.Sequential(ur.LSTM(5, 4)), X), (nn.Sequential(ur.LSTMCell(5, 4)), X[0])):
        quantized = ur.quantize(model.eval())
        with pytest.raises(Exception, match=r"Pass dynamo=True"):
            torch.onnx.export(quantized, (x,), tmp_path / "m.onnx", dynamo=False)


@pytest.mark.slow
def test_special_values() -> None:
    """Rows with infinity or NaN give NaN, zeros and tiny values zeros."""
    quantized = ur.quantize(uniform(ur.GRU(5, 33, bias=False)))
    x = torch.randn(1, 5, 5)
    x[0, 0, 3], x[0, 1, 2], x[0, 2], x[0, 3] = torch.nan, torch.inf, 0.0, 1e-38
    found, expected = run(ur.io.to_onnx(quantized), x)[0], quantized(x)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_float64_layer() -> None:
    layer = uniform(ur.GRU(5, 33))
    quantized, x = ur.quantize(layer).double(), torch.randn(6, 2, 5, dtype=torch.float64)
    with ur.engine("reference"):
        right = quantized(x)[0]
    check(run(ur.io.to_onnx(quantized), x)[0], right, layer.double()(x)[0].detach())


def test_scales_in_operators_of_onnx() -> None:
    """They are those of the definition, which uses the bits of floats."""
    for _ in range(3):
        matrix = torch.randn(3, 100_000) * torch.logspace(-31, 36, 100_000)
        assert torch.equal(column_scales(matrix), weight_scales(matrix, 0))
    matrix = torch.cat(
        [torch.zeros(1, 9), torch.tensor([[0.0, 1, 127, 254, 2, 3e-30, 1e-38, 0.5, 1.0000001]])]
    )
    assert torch.equal(column_scales(matrix), weight_scales(matrix, 0))
