"""Files that were saved before modules moved to packages: they load, and give the numbers they gave then.

``saved_before_the_move`` was written by commit 20e8c16: layers with torch.save and pickle, their state dicts,
exported programs and ONNX models, and the outputs that each of them had.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.sampling import sample

FOLDER = Path(__file__).parent / "saved_before_the_move"
EXPECTED: dict[str, Any] = torch.load(FOLDER / "expected.pt")
PROGRAMS: dict[str, Any] = torch.load(FOLDER / "programs.pt")
ONNX = sorted(path.stem for path in FOLDER.glob("*.onnx"))
LAYERS = {
    "rnn": lambda: ur.RNN(3, 4, nonlinearity="relu"),
    "lstm": lambda: ur.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "lstm_projected": lambda: ur.LSTM(3, 4, proj_size=2),
    "gru": lambda: ur.GRU(3, 4, bias=False),
    "rnn_cell": lambda: ur.RNNCell(3, 4),
    "lstm_cell": lambda: ur.LSTMCell(3, 4),
    "gru_cell": lambda: ur.GRUCell(3, 4),
    "zoneout": lambda: ur.Recurrent(
        ur.cells.LSTM, 3, 4, zoneout={"h": 0.1, "c": 0.2}, recurrent_dropout=0.1, variational_dropout=0.2
    ),
    "learned": lambda: ur.Recurrent(ur.cells.GRU, 3, 4, bidirectional=True, initial_state="learned"),
    "peephole": lambda: ur.Recurrent(ur.cells.PeepholeLSTM, 3, 4),
    "mgu": lambda: ur.Recurrent(ur.cells.MGU, 3, 4, num_layers=2),
    "slstm": lambda: ur.Recurrent(ur.cells.SLSTM, 4, 4),
    "frozen": lambda: ur.GRU(3, 4),
}


def check(layer: Any, name: str) -> None:
    x, expected = EXPECTED[name]
    with torch.no_grad():
        assert_close(layer(x), expected, 1e-6)


def test_all_files_are_tested() -> None:
    assert {*LAYERS} == {*EXPECTED} == {path.stem for path in FOLDER.glob("*.pickle")}
    assert {*PROGRAMS} == {path.stem for path in FOLDER.glob("*.pt2")}


@pytest.mark.parametrize("name", sample(EXPECTED, ["lstm_cell", "learned", "mgu"]))
def test_pickled_layers(name: str) -> None:
    layer = pickle.loads((FOLDER / f"{name}.pickle").read_bytes())
    assert type(layer).__module__ in ("unrolled.layers.torch_layers", "unrolled.layers.recurrent")
    check(layer, name)
    assert repr(layer) == repr(LAYERS[name]())
    check(pickle.loads(pickle.dumps(layer)), name)  # saved again, under the new names


@pytest.mark.parametrize("name", sample(EXPECTED))
def test_state_dicts(name: str) -> None:
    layer = LAYERS[name]().eval()
    layer.load_state_dict(torch.load(FOLDER / "state_dicts.pt")[name])
    check(layer, name)


def test_a_saved_model() -> None:
    model = torch.load(FOLDER / "model.pt", weights_only=False)
    assert isinstance(model, nn.ModuleDict)
    check(model["a"], "lstm")
    check(model["b"], "zoneout")


@pytest.mark.slow
def test_a_new_process_loads_pickles() -> None:
    """``import unrolled`` is enough: the old modules need not be imported, and functions stay functions."""
    code = (
        "import pickle, sys, unrolled\n"
        "layer = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert callable(unrolled.trace) and callable(unrolled.record), unrolled.trace\n"
        "print(layer)\n"
    )
    command = [sys.executable, "-c", code, str(FOLDER / "lstm.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(LAYERS["lstm"]())


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # by torch 2.12
@pytest.mark.parametrize("name", sample(PROGRAMS))
def test_exported_programs(name: str) -> None:
    inputs, expected = PROGRAMS[name]
    module = torch.export.load(FOLDER / f"{name}.pt2").module()
    with torch.no_grad():
        assert_close(module(*inputs), expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONNX)
def test_onnx_models(name: str) -> None:
    """Written by the version before, run by ONNX Runtime; read by us where we read this operator."""
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    x, expected = EXPECTED[name]
    output = expected[0]
    session = onnxruntime.InferenceSession(str(FOLDER / f"{name}.onnx"))
    assert_close(torch.from_numpy(session.run(["output"], {"x": x.numpy()})[0]), output, 1e-5)
    new = ur.io.to_onnx(pickle.loads((FOLDER / f"{name}.pickle").read_bytes()))
    old = onnx.load(FOLDER / f"{name}.onnx")
    assert [node.op_type for node in new.graph.node] == [node.op_type for node in old.graph.node]
