"""torch.onnx.export of models with layers of unrolled: ONNX Runtime gives the outputs of the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.user_cell import MGU

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow

CELLS = sorted(name for name in ur.cells.__all__ if issubclass(getattr(ur.cells, name), ur.Cell))


class Model(nn.Module):
    """A layer between linear layers, which also returns the layer's final states."""

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__()
        directions = 2 if layer.bidirectional else 1
        self.encode = nn.Linear(3, layer.input_size)
        self.layer, self.options = layer, options
        self.decode = nn.Linear(next(iter(layer._first.state_sizes().values())) * directions, 2)

    def forward(self, x: Tensor, *inputs: Tensor) -> Any:
        options = dict(zip(self.options, inputs, strict=True))
        output, state = self.layer(torch.tanh(self.encode(x)), **options)
        return self.decode(output), state


def export(model: nn.Module, x: Any, shapes: Any, program: bool = False) -> Any:
    """Return the ONNX model as torch.onnx.export writes it, from the model or from an exported program."""
    axes = (shapes[0], shapes[1:]) if len(shapes) > 1 else shapes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        if program:
            exported = torch.export.export(model, x, dynamic_shapes=axes)
            done: Any = torch.onnx.export(exported, dynamo=True, verbose=False)
        else:
            done = torch.onnx.export(model, x, dynamo=True, dynamic_shapes=axes, verbose=False)
        return done.model_proto


def sizes(*axes: str) -> dict[int, Any]:
    return {k: torch.export.Dim(name, min=3 if name == "time" else 2) for k, name in enumerate(axes)}


def check(model: nn.Module, proto: Any, *inputs: Tensor) -> None:
    """Compare ONNX Runtime's outputs with the model's, on the reference engine."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    results = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    with ur.engine("reference"), torch.no_grad():
        output, states = model(*inputs)
    expected = (output, *(states if isinstance(states, tuple) else (states,)))
    for a, b in zip(results, expected, strict=True):
        assert a.shape == tuple(b.shape)
        numpy.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


def recurrent_operators(proto: Any) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.op_type in ("RNN", "GRU", "LSTM", "Scan")]


def check_layer(layer: Any, operators: list[str], program: bool = False) -> None:
    model = Model(layer).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    axes = ("batch", "time") if layer.batch_first else ("time", "batch")
    proto = export(model, (torch.randn(5, 4, 3),), (sizes(*axes),), program)
    assert recurrent_operators(proto) == operators
    for shape in ((5, 2, 3), (2, 7, 3), (1, 1, 3)):
        check(model, proto, torch.randn(shape))


@pytest.mark.parametrize(
    ("create", "operators"),
    [
        (lambda: ur.LSTM(4, 5, 2, bidirectional=True, batch_first=True), ["LSTM"] * 2),
        (lambda: ur.Recurrent(MGU, 4, 5, bidirectional=True), ["Scan"] * 2),
    ],
)
def test_a_model_with_a_layer(create: Any, operators: list[str]) -> None:
    check_layer(create(), operators)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("create", "operators"),
    [
        (lambda: ur.RNN(4, 5, 2, "relu", bidirectional=True, bias=False), ["RNN"] * 2),
        (lambda: ur.GRU(4, 5, batch_first=True), ["GRU"]),
        (lambda: ur.Recurrent(ur.cells.ResetBeforeGRU, 4, 5), ["GRU"]),
        (lambda: ur.LSTM(4, 5, proj_size=2), ["Scan"]),
        (lambda: ur.LSTM(4, 5, initial_state="learned", zoneout=0.1, recurrent_dropout=0.5), ["Scan"]),
    ],
)
@pytest.mark.parametrize("program", [False, True])
def test_other_layers(create: Any, operators: list[str], program: bool) -> None:
    check_layer(create(), operators, program)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CELLS)
def test_every_cell(name: str) -> None:
    layer = ur.Recurrent(getattr(ur.cells, name), 4, 4)
    standard = {"RNN": "RNN", "GRU": "GRU", "ResetBeforeGRU": "GRU", "LSTM": "LSTM"}
    check_layer(layer, [standard.get(name, "Scan")])


def test_an_exported_program_with_lengths_and_resets() -> None:
    """Without a compiled kernel: the export needs no C++ compiler."""
    model = Model(ur.Recurrent(ur.cells.CFN, 4, 5, bidirectional=True), lengths=None, resets=None).eval()
    x, lengths, resets = torch.randn(5, 3, 3), torch.tensor([5, 2, 4]), torch.rand(5, 3) < 0.3
    shapes = (sizes("time", "batch"), {0: sizes("time", "batch")[1]}, sizes("time", "batch"))
    proto = export(model, (x, lengths, resets), shapes, program=True)
    assert recurrent_operators(proto) == ["Scan"] * 2
    check(model, proto, x, lengths, resets)
    check(model, proto, torch.randn(4, 2, 3), torch.tensor([3, 4]), torch.rand(4, 2) < 0.3)


def test_it_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path))

    class Fresh(ur.Cell):
        """No other test has compiled it."""

        weight = ur.Param("hidden", "input")

        def step(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.sigmoid(h + x @ self.weight.T)

    layer = ur.Recurrent(Fresh, 4, 5)
    check_layer(layer, ["Scan"])


def test_the_nodes_can_be_imported_again() -> None:
    model = Model(ur.LSTM(4, 5)).eval()
    proto = export(model, (torch.randn(5, 2, 3),), (sizes("time", "batch"),))
    [layer] = ur.io.from_onnx(proto).values()
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(layer(x)[0].squeeze(1), model.layer(x)[0])


class Packed(nn.Module):
    """Packs its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ur.GRU(3, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2])))[1]


class Bessel(ur.Cell):
    """A cell whose step the compiler doesn't support."""

    def step(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.special.bessel_j0(x + h)


def test_calls_that_cannot_be_exported() -> None:
    layer = ur.Recurrent(Bessel, 3, 3)
    for module, message in (
        (Packed(), "GRU: .*packed sequence.*pass a padded input and lengths"),
        (layer, r"this call of Bessel: .*bessel_j0.*unrolled.io.to_onnx\. .*unrolled.revert\(model\)"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(Exception, match=message):
                torch.onnx.export(module, (torch.randn(4, 2, 3),), dynamo=True, verbose=False)
