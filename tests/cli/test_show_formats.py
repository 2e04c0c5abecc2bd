"""``unrolled show`` of files in every format, with any suffix."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import unrolled as ur
from unrolled.cli import main


@pytest.fixture
def show(capsys: Any, tmp_path: Path) -> Any:
    x = numpy.random.default_rng(1).normal(size=(5, 3))
    numpy.savetxt(tmp_path / "x.csv", x, delimiter=",")

    def run(*arguments: Any) -> tuple[int, str, str]:
        with ur.engine("reference"):
            code = main.main(["show", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def read_input(folder: Path) -> torch.Tensor:
    return torch.tensor(numpy.loadtxt(folder / "x.csv", delimiter=","), dtype=torch.float32)


def check_output(out: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(json.loads(out)["output"]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["model", "epoch=3.ckpt", "w.npz", "w.h5"])
def test_weight_files(name: str, show: Any, tmp_path: Path) -> None:
    gru, path = nn.GRU(3, 4), tmp_path / name
    arrays = {f"enc.{key}": value.numpy() for key, value in gru.state_dict().items()}
    if name == "w.npz":
        numpy.savez(path, **arrays)
    elif name == "w.h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    else:
        torch.save({"state_dict": nn.ModuleDict({"enc": gru}).state_dict()}, path)
    prefix = "" if "." in name and name[-1] in "z5" else "state_dict."
    code, out, err = show(path)
    assert (code, err) == (0, "")
    assert f"{prefix}enc: GRU(3, 4), float32" in out
    code, out, _ = show(path, "--input", tmp_path / "x.csv", "--json", "--layer", f"{prefix}enc")
    assert code == 0
    check_output(out, gru(read_input(tmp_path))[0])


@pytest.mark.slow
def test_onnx_models(show: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    rnn, path = ur.RNN(3, 4, nonlinearity="relu"), tmp_path / "model.onnx"
    ur.io.to_onnx(rnn, path)
    code, out, err = show(path, "--input", tmp_path / "x.csv")
    assert (code, err) == (0, "")
    assert "Assuming" not in out  # a model has its nonlinearity
    code, out, _ = show(path, "--input", tmp_path / "x.csv", "--json")
    check_output(out, rnn(read_input(tmp_path))[0])
    code, _, err = show(path, "--cell", "gru")
    assert (code, err) == (
        2,
        f"unrolled: --cell has no effect, because {path} says which cells its layers have\n",
    )
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["a"], ["b"])], "none", [], [])
    onnx.save(onnx.helper.make_model(graph), str(path))
    code, _, err = show(path)
    assert code == 2
    assert "model.onnx: the model has no RNN, GRU or LSTM node: its operators are Relu." in err


def test_reversed_layers_are_mentioned(show: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = {"W": numpy.ones((1, 2, 3), numpy.float32), "R": numpy.ones((1, 2, 2), numpy.float32)}
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [
        onnx.helper.make_node("RNN", ["X", "W", "R"], [name], name, hidden_size=2, direction=name)
        for name in ("forward", "reverse")
    ]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "m", [], [], initializers)), str(path))
    note = "reverse: it reads the sequence from its end"
    code, out, _ = show(path)
    assert code == 0
    assert "forward: Recurrent(RNN, 3, 2), float32" in out
    assert note in out
    assert note in json.loads(show(path, "--json")[1])["notes"][0]
    code, _, err = show(path, "--layer", "reverse")
    assert code == 2
    assert f"no recurrent layer 'reverse'; {note}" in err


@pytest.mark.slow
def test_shipped_cells(show: Any, tmp_path: Path) -> None:
    layers = {"a": ur.Recurrent(ur.cells.MGU, 3, 4), "b": ur.Recurrent(ur.cells.PeepholeLSTM, 3, 4)}
    torch.save(nn.ModuleDict(layers).state_dict(), tmp_path / "both")
    torch.save(layers["a"].state_dict(), tmp_path / "one")
    code, out, _ = show(tmp_path / "both")
    assert code == 0
    assert "b: Recurrent(PeepholeLSTM, 3, 4), float32" in out
    text = " ".join(out.split())
    assert "a: several cells have such weights, choose one with --cell: janet, " in text
    assert ", mgu" in text
    code, _, err = show(tmp_path / "one")
    assert code == 2
    assert "one: no recurrent layer found; its weights: several cells have such weights, choose one" in err
    code, out, _ = show(tmp_path / "one", "--cell", "mgu", "--input", tmp_path / "x.csv", "--json")
    check_output(out, layers["a"](read_input(tmp_path))[0])


def test_missing_packages(show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, content, message in (
        ("onnx", b"\x08\x09\x3a\x00", "from_onnx needs onnx: pip install 'unrolled[onnx]'"),
        (
            "h5py",
            b"\x89HDF\r\n\x1a\n",
            f"{tmp_path / 'file'} is an HDF5 file, which needs h5py: pip install h5py",
        ),
    ):
        (tmp_path / "file").write_bytes(content)
        monkeypatch.setitem(sys.modules, package, None)
        code, _, err = show(tmp_path / "file")
        assert code == 2
        assert err.startswith(f"unrolled: {message}")
