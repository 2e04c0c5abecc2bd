"""Exported ONNX models: ONNX Runtime gives the same outputs for any batch size and sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn.utils import prune

import unrolled as ur
from helpers.user_cell import MGU

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "RNN": (ur.cells.RNN, {"nonlinearity": "relu"}),
    "GRU": (ur.cells.GRU, {"bias": False}),
    "LSTM": (ur.cells.LSTM, {}),
    "LSTM, projected": (ur.cells.LSTM, {"proj_size": 3}),
    "reset before": (ur.cells.ResetBeforeGRU, {}),
    "peepholes": (ur.cells.PeepholeLSTM, {"initial_state": "learned"}),
    "custom": (MGU, {}),
    "layer norm": (ur.cells.LayerNormLSTM, {}),
}
STANDARD = ("RNN", "GRU", "LSTM", "reset before")
SAMPLED = ("RNN", "GRU", "peepholes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.exhaustive) for name in CASES]
)
def test_onnx_runtime_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    cell, options = CASES[name]
    layers = 2 if name in (*STANDARD, "custom") else 1
    shape = {"num_layers": layers, "bidirectional": True, "batch_first": name in ("LSTM", "custom")}
    layer = ur.Recurrent(cell, 4, 5, **shape, **options)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    for states in (False, True) if name in ("RNN", "peepholes") else (True,):
        model = ur.io.to_onnx(layer, tmp_path / "layer.onnx", states=states)
        operators = {node.op_type for node in model.graph.node}
        assert ("Scan" in operators) is (name not in STANDARD)
        session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
        for time, batch in ((6, 2), (1, 3)):
            x = torch.randn((batch, time, 4) if layer.batch_first else (time, batch, 4))
            sizes = layer._first.state_sizes()
            initial = {
                f"initial_{state}": torch.randn(2 * layers, batch, size) for state, size in sizes.items()
            }
            state: Any = tuple(initial.values()) if len(initial) > 1 else next(iter(initial.values()))
            with torch.no_grad():
                output, final = layer(x, state if states else None)
            inputs = {"x": x, **(initial if states else {})}
            outputs = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            finals = final if isinstance(final, tuple) else (final,)
            for a, b in zip(outputs, (output, *finals), strict=True):
                assert a.shape == tuple(b.shape)
                numpy.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_float64_export_and_round_trip() -> None:
    layer = ur.GRU(4, 5, dtype=torch.float64)
    session = onnxruntime.InferenceSession(
        ur.io.to_onnx(layer).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    numpy.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], layer(x)[0].detach(), atol=1e-12)
    single = ur.LSTM(4, 5)
    [node] = ur.io.from_onnx(ur.io.to_onnx(single)).values()
    assert torch.equal(node(x.float())[0].squeeze(1), single(x.float())[0])


@pytest.mark.slow
@pytest.mark.parametrize("cell", [ur.cells.GRU, MGU])
def test_parametrized_and_pruned_weights(cell: Any) -> None:
    layer, x = ur.Recurrent(cell, 4, 5), torch.randn(5, 2, 4)
    normed, pruned = list(layer._parameters)[:2]
    torch.nn.utils.parametrizations.weight_norm(layer, normed)
    prune.l1_unstructured(layer, pruned, 0.5)
    model = ur.io.to_onnx(layer).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    numpy.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], layer(x)[0].detach(), atol=1e-6)


def test_unsupported_layers_raise_an_error() -> None:
    for make_layer, error, message in (
        (lambda: torch.nn.LSTM(2, 3), TypeError, "to_onnx expects a recurrent layer of unrolled, got LSTM"),
        (
            lambda: torch.nn.Sequential(ur.LSTM(2, 3)),
            TypeError,
            "got Sequential: pass its recurrent layers one",
        ),
        (lambda: ur.LSTMCell(2, 3), TypeError, "got LSTMCell: pass a layer of this cell"),
        (lambda: ur.LSTM(2, 3, 2, dropout=0.5), ValueError, "LSTM: dropout makes the model random"),
        (lambda: ur.LSTM(2, 3, zoneout=0.5), ValueError, "an ONNX model doesn't support dropout over time"),
        (
            lambda: ur.LSTM(2, 3).half(),
            ValueError,
            "supports float32 and float64, but weight_ih_l0 is",
        ),
        (lambda: ur.LSTM(2, 3, device="meta"), ValueError, "but weight_ih_l0 is on the meta device"),
    ):
        with pytest.raises(error, match=message):
            ur.io.to_onnx(make_layer())
