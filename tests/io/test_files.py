"""Weights and sequences from files: the layers found, and the errors for bad files."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.layer_pairs import CELLS, LAYERS, assert_close
from unrolled.io import files
from unrolled.io.state_dicts import find_layers
from unrolled.io.weight_files import read_weights


class Model(nn.Module):
    """A typical model: several recurrent layers among other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.encoder = nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=5)
        self.norm = nn.LayerNorm(10)
        self.block = nn.ModuleDict({"gru": nn.GRU(10, 10, bias=False), "rnn": nn.RNN(3, 1)})
        self.cell = nn.LSTMCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 3)


EXPECTED = {
    "encoder": "LSTM(6, 8, proj_size=5, num_layers=2, bidirectional=True)",
    "block.gru": "GRU(10, 10, bias=False)",
    "block.rnn": "RNN(3, 1)",
    "cell": "LSTM(4, 4)",
}


def test_finds_every_recurrent_layer(tmp_path: Path) -> None:
    model = Model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    torch.save(
        {"epoch": 3, "model": model.state_dict(), "optimizer": {"state": {0: torch.ones(2)}}},
        tmp_path / "c.pth",
    )
    for name, prefix in (("w.safetensors", ""), ("w.pt", ""), ("c.pth", "model.")):
        layers = find_layers(read_weights(tmp_path / name).tensors)
        assert {k: repr(v) for k, v in layers.items()} == {prefix + k: v for k, v in EXPECTED.items()}
        x = torch.randn(5, 2, 6)
        assert_close(layers[f"{prefix}encoder"](x), model.encoder(x), 1e-5)


@pytest.mark.slow
@settings(max_examples=80)
@given(
    kind=st.sampled_from([kind for kind in LAYERS if kind != "rnn-relu"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(4, 40), st.integers(1, 3)),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_size_is_inferred(
    kind: str, sizes: tuple[int, int, int], bias: bool, bidirectional: bool, dtype: Any
) -> None:
    _, torch_class, options = LAYERS[kind]
    module = torch_class(*sizes, **options, bias=bias, bidirectional=bidirectional, dtype=dtype)
    layers = find_layers({f"a.b.{name}": value for name, value in module.state_dict().items()})
    assert {k: repr(v) for k, v in layers.items()} == {"a.b": repr(module)}
    assert layers["a.b"].weight_hh_l0.dtype == dtype
    assert find_layers({}) == {}


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_found_as_a_layer(kind: str) -> None:
    for bias, (inputs, hidden) in itertools.product([True, False], [(3, 4), (4, 4), (8, 2), (1, 1)]):
        module = CELLS[kind][1](inputs, hidden, bias=bias)
        (layer,) = find_layers(module.state_dict()).values()
        assert (layer.input_size, layer.hidden_size, layer.bias) == (inputs, hidden, bias)
        assert layer.cell.__name__ in type(module).__name__


def test_inconsistent_shapes_raise_an_error() -> None:
    weights = nn.LSTM(3, 4, num_layers=2).state_dict()
    weights["weight_hh_l1"] = torch.zeros(16, 5)
    with pytest.raises(
        ValueError, match=r"weight_hh_l1: expected shape \(16, 4\) for LSTM.*got shape \(16, 5\)"
    ):
        find_layers(weights)
    del weights["weight_hh_l1"]
    with pytest.raises(ValueError, match="weight_hh_l1: expected shape .* got no such tensor"):
        find_layers(weights)


class Evil:
    """Unpickling it would run a command that creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_bad_weight_files(tmp_path: Path) -> None:
    def check_error(name: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)

    torch.save(Evil(tmp_path / "was-here"), tmp_path / "evil.pt")
    check_error("evil.pt", ValueError, r"refused, because loading it would run code \((posix|nt).system\)")
    assert not (tmp_path / "was-here").exists()
    torch.save(nn.LSTM(2, 3), tmp_path / "whole.pt")
    check_error("whole.pt", ValueError, r"would run code .*save model.state_dict\(\) instead of the model")
    for protocol in (3, 4, 5):
        (tmp_path / "new.pt").write_bytes(pickle.dumps(Evil(tmp_path / "was-here"), protocol))
        check_error("new.pt", ValueError, "refused, .* run code")
    torch.save(nn.LSTM(2, 3).state_dict(), tmp_path / "new.pt", pickle_protocol=4)
    check_error(
        "new.pt", ValueError, "refused, because loading this pickle may run code; .* its default pickle"
    )
    assert not (tmp_path / "was-here").exists()
    script = {"version": "1", "constants.pkl": "", "data.pkl": ""}  # what torch.load recognizes it by
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name, content in script.items():
            archive.writestr(f"script/{name}", content)
    check_error(
        "script.pt", ValueError, r"script.pt: refused, .* TorchScript program; save module.state_dict\(\)"
    )
    torch.save(nn.LSTM(2, 3).state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    safetensors.torch.save_file(nn.LSTM(2, 3).state_dict(), tmp_path / "w.safetensors")
    safe = (tmp_path / "w.safetensors").read_bytes()
    for cut in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        check_error("cut.pt", ValueError, "not a torch.save checkpoint, or damaged")
    for cut in (0, 4, 50, len(safe) - 1):
        (tmp_path / "cut.safetensors").write_bytes(safe[:cut])
        check_error("cut.safetensors", ValueError, "not a safetensors file, or damaged")
    torch.save(nn.LSTM(90, 90).state_dict(), tmp_path / "large.pt")
    large = (tmp_path / "large.pt").read_bytes()
    for cut in (len(large) // 2, len(large) - 3):
        (tmp_path / "cut.pt").write_bytes(large[:cut])
        check_error("cut.pt", ValueError, "cut.pt: not a torch.save checkpoint, or damaged")
    (tmp_path / "text.pt").write_text("hello, world\n" * 30)
    check_error("text.pt", ValueError, "damaged")
    check_error("missing.pt", FileNotFoundError, "missing.pt")
    check_error("weights.h5", FileNotFoundError, "weights.h5")
    (tmp_path / "text").write_text("hello, world\n" * 30)
    check_error("text", ValueError, "text: unknown format; expected a checkpoint of torch.save, a")
    (tmp_path / "folder.pt").mkdir()
    check_error("folder.pt", IsADirectoryError, "folder.pt")


@settings(max_examples=300)
@given(
    legacy=st.booleans(),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=9),
)
def test_random_damage_raises_nothing_but_value_error(
    tmp_path_factory: Any, legacy: bool, changes: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save(nn.GRU(2, 3).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    for position, byte in changes:
        content[int(position * len(content))] = byte
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_weights(path)


# In an entry of the list of names: the version, flags, compression, lengths, position and name.
@pytest.mark.parametrize(
    ("offset", "value"), [(6, 64), (8, 1), (8, 8), (10, 99), (28, 255), (42, 255), (46, 255)]
)
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_damaged_list_of_names(tmp_path: Path, suffix: str, offset: int, value: int) -> None:
    path, weights = tmp_path / f"damaged{suffix}", nn.GRU(2, 3).state_dict()
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        numpy.savez(path, **{name: tensor.numpy() for name, tensor in weights.items()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] = value
    path.write_bytes(content)
    with contextlib.suppress(ValueError):  # some of them can still be read
        read_weights(path)


def test_uppercase_suffixes(tmp_path: Path) -> None:
    torch.save(nn.LSTM(2, 3).state_dict(), tmp_path / "W.PT")
    assert find_layers(read_weights(tmp_path / "W.PT").tensors)
    (tmp_path / "X.CSV").write_text("1,2\n")
    assert files.read_input(tmp_path / "X.CSV").tolist() == [[1, 2]]


def test_input_files(tmp_path: Path) -> None:
    values = numpy.random.default_rng(0).normal(size=(7, 3))
    numpy.savetxt(tmp_path / "x.csv", values, delimiter=",", fmt="%.17g")
    (tmp_path / "named.csv").write_text("a,b,c\n" + (tmp_path / "x.csv").read_text() + "\n")
    (tmp_path / "excel.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "x.csv").read_bytes())
    numpy.save(tmp_path / "x.npy", values)
    numpy.savetxt(tmp_path / "spaces.csv", values, fmt="%.17g", header="a b c")
    numpy.savetxt(tmp_path / "tabs.csv", values, fmt="%.17g", delimiter="\t")
    for name in ("x.csv", "named.csv", "excel.csv", "spaces.csv", "tabs.csv", "x.npy"):
        numpy.testing.assert_array_equal(files.read_input(tmp_path / name).numpy(), values)
    numpy.save(tmp_path / "one.npy", numpy.arange(4))
    assert files.read_input(tmp_path / "one.npy").tolist() == [[0], [1], [2], [3]]
    (tmp_path / "column.csv").write_text("unit 1\n0\n1\n2\n3\n")
    assert files.read_input(tmp_path / "column.csv").tolist() == [[0], [1], [2], [3]]
    (tmp_path / "nan.csv").write_text("1,nan\ninf,2\n")
    assert files.read_input(tmp_path / "nan.csv").isfinite().tolist() == [[True, False], [False, True]]


BAD_INPUTS = [
    ("a.csv", b"1,2\n3,x\n", "line 2, column 2: expected a number, got 'x'"),
    ("b.csv", b"1,2\n3,4,5\n", "line 2: expected 2 fields as in the rows above, got 3"),
    ("c.csv", b"1,2\n3,\n", "line 2, column 2: expected a number, got ''"),
    ("d.csv", b"", "expected one row of numbers per time step, found none"),
    ("j.csv", b"1_000,2\n", "line 1, column 1: expected a number, got '1_000'"),
    ("k.npy", b"\x93NUMPY\x01\x00\x0e\x00{'descr': (((\n", "not an array of numbers, or damaged"),
    ("l.csv", b"1;2\n3;4\n", "line 1, column 1: expected a number, got '1;2'; separate numbers by commas$"),
    ("m.csv", b"1 2 3\n4 5\n", "line 2: expected 3 fields as in the rows above, got 2"),
    ("n.csv", b"1,5 2,5\n", "line 1, column 2: expected a number, got '5 2'; separate numbers by commas$"),
    ("e.csv", b"time,value\n", "found none"),
    ("f.csv", b"\xff\xfe\x00\x01", "not a CSV file of numbers"),
    ("g.npy", b"not an array", "not an array of numbers, or damaged"),
    ("h.npy", b"", "not an array of numbers, or damaged"),
    ("i.json", b"[1]", "expected a .csv or .npy file, got '.json'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_INPUTS)
def test_bad_input_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_input(tmp_path / name)
    assert name in str(caught.value)


def test_bad_arrays(tmp_path: Path) -> None:
    for array, message in (
        (numpy.zeros((2, 3, 4)), r"an array of shape \(time, features\), got \(2, 3, 4\); save one "),
        (numpy.zeros((0, 4)), r"got \(0, 4\)"),
        (numpy.array(["a"]), "real numbers, got <U1"),
        (numpy.array([1j]), "real numbers, got complex128"),
        (numpy.array([{}], dtype=object), "not an array of numbers"),
    ):
        numpy.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=message):
            files.read_input(tmp_path / "x.npy")
    numpy.savez(tmp_path / "x.npz", numpy.zeros(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="got an archive"):
        files.read_input(tmp_path / "x.npy")
