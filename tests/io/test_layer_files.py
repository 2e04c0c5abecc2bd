"""Recurrent layers in files of any format: the content tells the format, and nothing is left out silently."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import unrolled as ur
from unrolled.io.layer_files import LayerFile, load_layers
from unrolled.io.weight_files import read_weights

h5py = pytest.importorskip("h5py")
NAMES = ("weights", "w.ckpt", "w.bin", "w.th", "w.pt", "w.npz", "w.onnx", "w.h5", "w.keras", "w.txt")


@pytest.fixture(autouse=True)
def reference_engine() -> Iterator[None]:
    with ur.engine("reference"):
        yield


@pytest.mark.parametrize("content", ["torch", "legacy", "lightning", "safetensors", "npz", "hdf5"])
def test_the_content_tells_the_format(content: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"enc": nn.GRU(3, 5, bidirectional=True), "dec": nn.LSTM(4, 2, 2, bias=False)})
    state, path = model.state_dict(), tmp_path / "file"
    arrays = {name: value.numpy() for name, value in state.items()}
    if content == "safetensors":
        safetensors.torch.save_file(state, path)
    elif content == "npz":
        with path.open("wb") as file:
            numpy.savez_compressed(file, **arrays, note=numpy.array("text"))
    elif content == "hdf5":
        with h5py.File(path, "w") as file:
            for name, value in arrays.items():
                file[name.replace(".", "/")] = value.astype(">f4")  # of another byte order
    else:
        document = {"epoch": 3, "state_dict": state} if content == "lightning" else state
        torch.save(document, path, _use_new_zipfile_serialization=content != "legacy")
    prefix = "state_dict." if content == "lightning" else ""
    for name in NAMES:
        path = path.rename(tmp_path / name)
        layers = load_layers(path).layers
        assert {name: repr(layer) for name, layer in layers.items()} == {
            f"{prefix}enc": "GRU(3, 5, bidirectional=True)",
            f"{prefix}dec": "LSTM(4, 2, num_layers=2, bias=False)",
        }
        for key, value in model["dec"].state_dict().items():
            assert torch.equal(layers[f"{prefix}dec"].get_parameter(key), value)


def test_onnx_models(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    gru = ur.GRU(3, 5, bidirectional=True)
    path = tmp_path / "model"
    ur.io.to_onnx(gru, path)
    file = load_layers(path)
    [(name, layer)] = file.layers.items()
    assert name.startswith("GRU_")
    assert (file.notes, file.stores_options) == ([], True)
    assert torch.equal(layer.weight_hh_l0_reverse, gru.weight_hh_l0_reverse)
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "GRU")
    backward = onnx.numpy_helper.from_array(gru.weight_hh_l0.detach().numpy()[None], "R1")
    inputs = onnx.numpy_helper.from_array(gru.weight_ih_l0.detach().numpy()[None], "W1")
    model.graph.initializer.extend([backward, inputs])
    reverse = onnx.helper.make_node(
        "GRU", [node.input[0], "W1", "R1"], ["Y1"], "back", hidden_size=5, direction="reverse"
    )
    model.graph.node.append(reverse)
    onnx.save(model, str(path))
    file = load_layers(path)
    assert list(file.layers) == [name]
    assert file.notes == ["back: it reads the sequence from its end (direction='reverse')"]


@pytest.mark.parametrize(
    ("cell", "options", "shape"),
    [
        (ur.cells.SLSTM, {"heads": 2}, {"num_layers": 2}),
        (ur.cells.LRU, {"state_size": 3}, {"bias": False}),
        (ur.cells.PeepholeLSTM, {}, {"bidirectional": True}),
        (ur.cells.LayerNormLSTM, {}, {"bias": False}),
        (ur.cells.QRNN, {}, {}),
        (ur.cells.SCRN, {"context_size": 3}, {"bias": False}),
        (ur.cells.FastGRNN, {"input_rank": 2, "hidden_rank": 3}, {}),
    ],
)
def test_cells_of_the_package_are_recognized(cell: Any, options: Any, shape: Any, tmp_path: Path) -> None:
    layer, torch_layer = ur.Recurrent(cell, 6, 4, **options, **shape), nn.LSTM(2, 3)
    model = nn.ModuleDict(
        {"own": layer, "usual": torch_layer, "out": nn.Linear(4, 2), "norm": nn.LayerNorm(4)}
    )
    torch.save(model.state_dict(), tmp_path / "w.ckpt")
    file = load_layers(tmp_path / "w.ckpt")
    assert file.ambiguous == {}
    assert list(file.layers) == ["usual", "own"]
    found = file.layers["own"]
    assert repr(found) == repr(layer)
    x = torch.randn(5, 2, 6)
    torch.testing.assert_close(found(x)[0], layer(x)[0])


def test_weights_that_several_cells_have(tmp_path: Path) -> None:
    torch.save({"a": ur.Recurrent(ur.cells.MGU, 3, 4).state_dict()}, tmp_path / "w.pt")
    file = load_layers(tmp_path / "w.pt")
    assert file.layers == {}
    assert {"MGU", "JANET"} <= set(file.ambiguous["a"])
    assert "GRU" not in file.ambiguous["a"]
    file = load_layers(tmp_path / "w.pt", [ur.cells.MGU])
    assert {name: repr(layer) for name, layer in file.layers.items()} == {"a": "Recurrent(MGU, 3, 4)"}


@pytest.mark.slow
def test_every_cell_is_found_or_named(tmp_path: Path) -> None:
    for name in ur.cells.__all__:
        cell = getattr(ur.cells, name)
        torch.save(ur.Recurrent(cell, 4, 4).state_dict(), tmp_path / "w.pt")
        file = load_layers(tmp_path / "w.pt")
        if name == "ResetBeforeGRU":  # has the weights of the GRU of torch.nn
            assert file.layers[""].cell is ur.cells.GRU
        elif file.layers:
            assert file.layers[""].cell is cell
        else:
            assert name in file.ambiguous[""]


def test_bad_files(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "w.npz", a=numpy.array([{}], dtype=object))
    with pytest.raises(ValueError, match="w.npz: refused, because loading its Python objects may run code"):
        read_weights(tmp_path / "w.npz")
    numpy.savez(tmp_path / "w.npz", a=numpy.zeros(300))
    content = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.npz: not an .npz file, or damaged"):
        read_weights(tmp_path / "cut.npz")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["weight_hh_l0"] = numpy.zeros((4, 4), numpy.float32)
    content = (tmp_path / "w.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.h5: not a readable HDF5 file, or damaged"):
        read_weights(tmp_path / "cut.h5")
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("a", (8,), "f8", external=[(str(tmp_path / "secret"), 0, 64)])
    with pytest.raises(ValueError, match="w.h5: refused, because a takes its numbers from another file"):
        read_weights(tmp_path / "w.h5")
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    torch.export.save(program, tmp_path / "w.pt2")
    with pytest.raises(ValueError, match="w.pt2: refused, because it is a program of torch.export; save"):
        read_weights(tmp_path / "w.pt2")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="w.zip: unknown format; expected a checkpoint of torch.save"):
        read_weights(tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", "not HDF5")
    with pytest.raises(ValueError, match="w.keras: not a readable .keras file, or damaged"):
        read_weights(tmp_path / "w.keras")


def keras_arrays(gates: int, inputs: int, hidden: int, bias: tuple[int, ...] | None) -> list[Any]:
    shapes = [(inputs, gates * hidden), (hidden, gates * hidden)] + ([] if bias is None else [bias])
    return [numpy.random.default_rng(hidden).normal(size=shape).astype(numpy.float32) for shape in shapes]


def check_layer(file: LayerFile, name: str, arrays: list[Any], reset_after: bool = True) -> None:
    layer, expected = file.layers[name], ur.io.from_keras(arrays, reset_after)
    assert layer.cell is expected.cell
    for key, value in expected.state_dict().items():
        assert torch.equal(layer.get_parameter(key), value)


def test_layouts_of_keras(tmp_path: Path) -> None:
    """The groups that Keras 2 and 3 write; that they are these is tested with Keras itself below."""
    lstm, gru, rnn = (
        keras_arrays(4, 3, 5, (20,)),
        keras_arrays(3, 2, 4, (12,)),
        keras_arrays(1, 4, 3, None),
    )
    kernels = ("kernel:0", "recurrent_kernel:0", "bias:0")
    with h5py.File(tmp_path / "old", "w") as file:
        for group, arrays in (("lstm/lstm/lstm_cell", lstm), ("inner/my_gru/gru_cell_3", gru)):
            for leaf, array in zip(kernels, arrays, strict=True):
                file[f"{group}/{leaf}"] = array
        file["dense/dense/kernel:0"], file["dense/dense/bias:0"] = numpy.zeros((2, 3)), numpy.zeros(3)
    file = load_layers(tmp_path / "old")
    assert list(file.layers) == ["inner.my_gru", "lstm"]
    check_layer(file, "lstm", lstm)
    check_layer(file, "inner.my_gru", gru, reset_after=False)
    assert file.notes == ["The file has no configuration of the layers: the defaults of Keras are assumed."]

    with h5py.File(tmp_path / "new", "w") as file:
        for group, arrays in (("layers/simple_rnn/cell", rnn), ("layers/rnn/cell", gru), ("x/cell", lstm)):
            for k, array in enumerate(arrays):
                file[f"{group}/vars/{k}"] = array
        file["layers/simple_rnn"].create_group("vars").attrs["name"] = "first"
        file["layers/rnn/cell/vars"].attrs["name"] = "own_cell"
    loaded = load_layers(tmp_path / "new", options={"nonlinearity": "relu"})
    assert list(loaded.layers) == ["first", "x"]
    check_layer(loaded, "first", rnn)
    assert repr(loaded.layers["first"]).startswith("RNN(4, 3")
    assert loaded.layers["first"].chosen_options() == {"nonlinearity": "relu"}
    assert loaded.notes[0] == "rnn: its cell 'own_cell' is not the SimpleRNN, GRU or LSTM of Keras"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.weights.h5"])
@pytest.mark.filterwarnings("ignore")
def test_files_of_keras(name: str, tmp_path: Path) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    parts = [
        layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both"),
        layers.GRU(2, reset_after=False, name="mine", return_sequences=True),
        layers.GRU(3, return_sequences=True, use_bias=False),
        layers.SimpleRNN(3, activation="relu", return_sequences=True),
        layers.LSTM(2, recurrent_activation="hard_sigmoid", name="hard", return_sequences=True),
        layers.LSTM(2, go_backwards=True, name="back"),
    ]
    model = keras.Sequential([keras.Input((5, 3)), *parts, layers.Dense(1)])
    for weight in model.weights:
        weight.assign(torch.randn(*weight.shape) / 2)
    (model.save_weights if "weights" in name else model.save)(tmp_path / name)
    file = load_layers((tmp_path / name).rename(tmp_path / "model"), options={"nonlinearity": "relu"})
    x: Tensor = torch.randn(2, 5, 3)
    for part in parts[:4]:
        with torch.no_grad():
            expected = part(x)
            actual = file.layers[part.name](x.transpose(0, 1))[0].transpose(0, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        x = expected
    if "weights" in name:
        assert len(file.layers) == 6
        assert file.notes[-1].startswith("The file has no configuration")
    else:
        assert len(file.layers) == 4
        assert sorted(file.notes) == [
            "back: it reads the sequence from its end (go_backwards=True)",
            "hard: its recurrent_activation is 'hard_sigmoid', and unrolled has only 'sigmoid'",
        ]
