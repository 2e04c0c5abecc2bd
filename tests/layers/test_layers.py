"""Parameters, repr, files and errors of the drop-in layers, compared with torch.nn."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence

import unrolled as ur
from helpers.layer_pairs import CELLS, LAYERS, assert_close, pair
from helpers.sampling import sample

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False, "dropout": 0.5},
    {"dtype": torch.float64},
    {"num_layers": 2, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_same_parameters_repr_and_state_dict(kind: str, arguments: dict[str, Any]) -> None:
    ours, theirs = pair(kind, 4, 5, **arguments)
    assert repr(ours) == repr(theirs)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter), name
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [len(part) for part in ours.all_weights] == [len(part) for part in theirs.all_weights]
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
                 "bidirectional", "proj_size"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.flatten_parameters()
    torch.manual_seed(7)
    ours.reset_parameters()
    torch.manual_seed(7)
    theirs.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("hidden", [1, 2, 3, 7, 8, 31, 32, 128])
def test_same_initial_parameters_in_float64(hidden: int) -> None:
    for kind, table in (("lstm", LAYERS), ("gru", CELLS)):
        ours, theirs = (cls(2, hidden, dtype=torch.float64) for cls in table[kind][:2])
        for layer in (ours, theirs):
            torch.manual_seed(hidden)
            layer.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_same_cells(kind: str, arguments: dict[str, Any]) -> None:
    ours, theirs = pair(kind, 4, 5, table=CELLS, **arguments)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.bias_ih is None) == (theirs.bias_ih is None)


def test_positional_arguments_have_torchs_order() -> None:
    assert repr(ur.RNN(2, 3, 2, "relu", False, True, 0.5, True)) == repr(
        nn.RNN(2, 3, 2, "relu", False, True, 0.5, True)
    )
    assert repr(ur.LSTM(2, 3, 2, False, True, 0.5, True, 1)) == repr(
        nn.LSTM(2, 3, 2, False, True, 0.5, True, 1)
    )
    assert repr(ur.GRU(2, 3, 2, False, True, 0.5, True)) == repr(nn.GRU(2, 3, 2, False, True, 0.5, True))
    assert repr(ur.RNNCell(2, 3, False, "relu")) == repr(nn.RNNCell(2, 3, False, "relu"))
    last = (0, "cpu", torch.float64)  # in all torch.nn layers proj_size comes before device and dtype
    for name in ("LSTM", "GRU"):
        args = (2, 3, 2, False, True, 0.5, True, *last)
        ours, theirs = getattr(ur, name)(*args), getattr(nn, name)(*args)
        assert repr(ours) == repr(theirs)
        assert ours.weight_ih_l0.dtype == torch.float64
    assert ur.RNN(2, 3, 2, "relu", False, True, 0.5, True, *last).weight_ih_l0.dtype == torch.float64
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        theirs = list(inspect.signature(getattr(nn, name)).parameters)
        assert list(inspect.signature(getattr(ur, name)).parameters) == theirs


def test_sizes_may_be_numpy_integers() -> None:
    three, two = numpy.int64(3), numpy.int32(2)
    assert repr(ur.LSTM(three, 4, two)) == "LSTM(3, 4, num_layers=2)"
    assert repr(ur.GRUCell(three, three)) == "GRUCell(3, 3)"
    assert type(ur.GRUCell(three, three).hidden_size) is int


@pytest.mark.parametrize("kind", sample(LAYERS, ["gru", "lstm-proj"]))
def test_state_dicts_load_in_both_directions(kind: str) -> None:
    ours, theirs = pair(kind, 4, 5, num_layers=2)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer, weights_only=True))
        x = torch.randn(3, 2, 4)
        assert_close(target(x), source(x), 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.slow
def test_copy_pickle_mode_dtype_and_device(kind: str) -> None:
    layer, _ = pair(kind, 4, 5, num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 4)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(twin(x), expected, 0)
        assert repr(twin) == repr(layer)
    assert layer.train().training
    assert not layer.eval().training
    assert_close(layer.double()(x.double())[0].float(), expected[0], 1e-5)
    assert layer.to("meta")(x.double().to("meta"))[0].device.type == "meta"


@pytest.mark.parametrize("kind", LAYERS)
def test_keywords_and_state_names(kind: str) -> None:
    ours, theirs = pair(kind, 4, 5)
    x = torch.randn(3, 2, 4)
    _, state = theirs(x)
    expected = theirs(input=x, hx=state)
    assert_close(ours(input=x, hx=state), expected, 1e-5)
    assert_close(ours(x, state=state), expected, 1e-5)
    with pytest.raises(TypeError, match="twice"):
        ours(x, state, state=state)


def test_a_parameter_that_is_none() -> None:
    layer = ur.LSTM(3, 4)
    layer._parameters["bias_hh_l0"] = None  # type: ignore[assignment]
    for engine in ("auto", "reference"):
        with ur.engine(engine), pytest.raises(ValueError, match="the parameter bias_hh_l0 is None"):
            layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("kind", LAYERS)
def test_empty_batch(kind: str) -> None:
    layer, _ = pair(kind, 4, 5, num_layers=2, bidirectional=True)
    output, final = layer(torch.randn(3, 0, 4))
    assert output.shape == (3, 0, 2 * (layer.proj_size or 5))
    assert (final[0] if layer.mode == "LSTM" else final).shape[:2] == (4, 0)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True], ids=["grad", "gradgrad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_finite_differences(kind: str, second: bool) -> None:
    if kind == "rnn-relu":
        torch.manual_seed(4)  # with this seed no pre-activation is close to the kink of ReLU
    layer, _ = pair(kind, 2, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        output, final = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return (output, *final) if isinstance(final, tuple) else (output, final)

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(run, (x, *values), fast_mode=True)


def test_parameters_are_read_at_each_call() -> None:
    layer = ur.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    reference = nn.LSTM(3, 4)
    nn.utils.parametrizations.weight_norm(reference, "weight_hh_l0")
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    assert_close(layer(x), reference(x), 1e-5)


class Doubling(ur.Cell):
    """A cell with one parameter, for error messages."""

    weight = ur.Param("hidden", "input")

    def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        return 2 * h + x @ self.weight.T


def with_float64(module: nn.Module, name: str) -> nn.Module:
    """Convert one parameter of the module to float64."""
    setattr(module, name, nn.Parameter(getattr(module, name).double()))
    return module


BAD_CALLS: list[tuple[Any, type[Exception], str]] = [
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 2, 6)), ValueError, r"input_size. Expected 4, got 6"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 2, 6)), RuntimeError, r"input_size. Expected 4, got 6"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 2, 2, 4)), ValueError, r"2D \(time, features\) or 3D .* got 4D"),
    (lambda: ur.GRU(4, 5)(torch.randn(4)), ValueError, "got 1D"),
    (lambda: ur.GRU(4, 5)([1.0, 2.0]), TypeError, "a Tensor or a PackedSequence, got list"),
    (lambda: ur.GRU(4, 5)(torch.randn(0, 2, 4)), ValueError, "sequence length to be larger than 0"),
    (lambda: ur.GRU(4, 5, batch_first=True)(torch.randn(2, 0, 4)), ValueError, "no time step"),
    (lambda: ur.GRU(4, 5)(torch.ones(3, 2, 4, dtype=torch.int64)), ValueError, r"dtype \(torch.int64\)"),
    (lambda: ur.GRU(4, 5)(torch.ones(3, 2, 4, dtype=torch.int64)), ValueError,
     r"Convert input: input.to\(torch.float32\)$"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 2, 4).double()), ValueError, "does not match weight dtype"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 2, 4).double()), ValueError, "or convert model: model.to"),
    (lambda: with_float64(ur.GRU(4, 5, 2), "bias_hh_l1")(torch.randn(3, 2, 4)), ValueError,
     r"GRU has parameters with different dtypes or devices, weight_ih_l1 \(torch.float32, cpu\) and "
     r"bias_hh_l1 \(torch.float64, cpu\): convert all of them"),
    (lambda: with_float64(ur.GRUCell(4, 5), "weight_hh")(torch.randn(2, 4)), RuntimeError,
     "with different dtypes or devices"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 2, 4, device="meta")), ValueError, "on meta but .* on cpu"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 2, 4), torch.randn(1, 3, 5)), RuntimeError,
     r"Expected hidden size \(1, 2, 5\), got \[1, 3, 5\]"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 2, 4), torch.randn(2, 5)), RuntimeError,
     "For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 4), torch.randn(1, 1, 5)), RuntimeError,
     "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 4), (torch.randn(1, 1, 5), torch.randn(1, 5))), RuntimeError,
     r"hx and cx should also be 2-D but got \(3-D, 2-D\) tensors"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 4), torch.randn(1, 5)), TypeError,
     r"the state \(h, c\) to be a tuple of 2 tensors, got a Tensor"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 4), (torch.randn(1, 5),)), ValueError, "tuple of 2 tensors, got 1"),
    (lambda: ur.LSTM(4, 5)(torch.randn(3, 4), (torch.randn(1, 5), None)), TypeError, "Tensor, NoneType"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 4), (torch.randn(1, 5),)), TypeError, "to be a tensor, got a tuple"),
    (lambda: ur.GRU(4, 5)(torch.randn(3, 4), torch.randn(1, 5).double()), ValueError,
     r"state h dtype .*Convert state: state.to\(torch.float32\)"),
    (lambda: ur.LSTM(4, 5, proj_size=2)(torch.randn(3, 4), (torch.randn(1, 5), torch.randn(1, 5))),
     RuntimeError, r"Expected hidden size \(1, 2\), got \[1, 5\] for the state h"),
    (lambda: ur.GRU(4, 5)(PackedSequence(torch.randn(6), torch.tensor([3, 3]))), ValueError,
     "packed data must have 2 dimensions"),
    (lambda: ur.GRU(4, 5)(PackedSequence(torch.randn(6, 3), torch.tensor([3, 3]))), ValueError,
     "Expected 4, got 3"),
    (lambda: ur.RNN(4, 0), ValueError, "hidden_size must be greater than zero, got 0"),
    (lambda: ur.RNN(4, -3), ValueError, "hidden_size must be greater than zero, got -3"),
    (lambda: ur.RNN(0, 3), ValueError, "input_size must be greater than zero"),
    (lambda: ur.RNN(4, 3.0), TypeError, "hidden_size should be of type int, got: float"),
    (lambda: ur.RNN(4, 3, 0), ValueError, "num_layers must be greater than zero"),
    (lambda: ur.RNN(4, 3, 1.5), TypeError, "num_layers should be of type int, got: float"),
    (lambda: ur.RNN(4, 3, bias=1), TypeError, "bias should be of type bool, got: int"),
    (lambda: ur.RNN(4, 3, batch_first="yes"), TypeError, "batch_first should be of type bool, got: str"),
    (lambda: ur.RNN(4, 3, 2, dropout=1.5), ValueError, r"range \[0, 1\].* got 1.5"),
    (lambda: ur.RNN(4, 3, 2, dropout=-0.1), ValueError, r"range \[0, 1\]"),
    (lambda: ur.RNN(4, 3, 2, dropout=True), ValueError, r"range \[0, 1\]"),
    (lambda: ur.RNN(4, 3, nonlinearity="gelu"), ValueError,
     "Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."),
    (lambda: ur.LSTM(4, 3, proj_size=3), ValueError, "smaller than hidden_size=3, got 3"),
    (lambda: ur.LSTM(4, 3, proj_size=-1), ValueError, "positive integer or zero"),
    (lambda: ur.GRU(4, 3, proj_size=1), ValueError, "only supported for LSTM"),
    (lambda: ur.RNN(4, 3, proj_size=1), ValueError, "only supported for LSTM"),
    (lambda: ur.LSTM(4, 3, batchfirst=True), TypeError, "no option 'batchfirst': did you mean 'batch_first'"),
    (lambda: ur.LSTM(4, 3, zoneot=0.1), TypeError, "LSTM has no option 'zoneot': did you mean 'zoneout'?"),
    (lambda: ur.LSTM(4, 3, zzzz=True), TypeError, "^LSTM has no option 'zzzz': its options are input_size,"),
    (lambda: ur.LSTM(4, 3, proj_size=1.5), TypeError, "proj_size should be of type int, got: float"),
    (lambda: ur.LSTMCell(4, 3, zzzz=True), TypeError, "LSTMCell.*unexpected keyword argument 'zzzz'"),
    (lambda: ur.Recurrent(nn.LSTM, 4, 3), TypeError, "subclass of unrolled.Cell"),
    (lambda: ur.Recurrent(Doubling, 4, 3, heads=2), TypeError, "Recurrent of Doubling has no option 'heads'"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 5)), RuntimeError,
     "input has inconsistent input_size: got 5 expected 4"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 2, 4)), ValueError,
     "RNNCell: Expected input to be 1D or 2D, got 3D"),
    (lambda: ur.RNNCell(4, 3)("x"), TypeError, "got str"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 4), torch.randn(2, 7)), RuntimeError,
     "hidden0 has inconsistent hidden_size: got 7, expected 3"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 4), torch.randn(5, 3)), RuntimeError,
     "Input batch size 2 doesn't match hidden0 batch size 5"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 4), torch.randn(3)), ValueError, "2D like the input, got 1D"),
    (lambda: ur.RNNCell(4, 3)(torch.randn(2, 4), torch.randn(1, 1, 2, 3)), ValueError,
     "Expected hidden to be 1D or 2D, got 4D"),
    (lambda: ur.LSTMCell(4, 3)(torch.randn(2, 4), (torch.randn(2, 3), torch.randn(2, 2, 3))), ValueError,
     r"LSTMCell: Expected hx\[1\] to be 1D or 2D, got 3D"),
    (lambda: ur.LSTMCell(4, 3)(torch.randn(2, 4), torch.randn(2, 3)), TypeError, "tuple of 2 tensors"),
    (lambda: ur.RNNCell(4, 3, nonlinearity="gelu"), ValueError, "Unknown nonlinearity"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"), BAD_CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_errors_are_one_line(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("construct", [lambda **k: ur.GRU(2, 3, **k), lambda **k: ur.LSTM(2, 3, **k),
                                  lambda **k: ur.Recurrent(Doubling, 2, 3, **k)])  # fmt: skip
def test_the_warning_about_dropout_has_the_callers_line(construct: Any) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
        construct(dropout=0.5)
    assert caught[0].filename == __file__


def test_invalid_return_values_of_a_step() -> None:
    def layer_returning(compute: Any) -> Any:
        class Wrong(ur.Cell):
            state = ("h", "c")

            def step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
                return compute(x, h, c)

        return ur.Recurrent(Wrong, 3, 4)

    x = torch.randn(2, 1, 3)
    with pytest.raises(TypeError, match=r"Wrong.step should return 2 states \(h, c\), got 1"):
        layer_returning(lambda x, h, c: h)(x)
    with pytest.raises(ValueError, match=re.escape("Wrong.step returned h of shape (1, 3), expected (1, 4)")):
        layer_returning(lambda x, h, c: (x, c))(x)
    with pytest.raises(TypeError, match="should return tensors .* got float for c"):
        layer_returning(lambda x, h, c: (h, 1.0))(x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_step_must_not_change_its_arguments(mode: Any) -> None:
    """The states are the outputs of earlier steps, which would change, too."""

    class Fading(ur.Cell):
        weight = ur.Param("hidden", "input")

        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            h *= 0.5
            h += x @ self.weight.T
            return h

    class Doubled(ur.Cell):
        def step(self, x: torch.Tensor, h: torch.Tensor) -> Any:
            return h + x.mul_(2)

    x = torch.randn(5, 2, 3)
    with mode():
        with pytest.raises(ValueError, match=r"Fading.step changes its input or state in place.*h = h \* f"):
            ur.Recurrent(Fading, 3, 4)(x)
        with pytest.raises(ValueError, match="Fading.step changes"):
            ur.Recurrent(Fading, 3, 4)(x, torch.zeros(1, 2, 4))
        with pytest.raises(ValueError, match="Doubled.step changes its input"):
            ur.Recurrent(Doubled, 3, 3)(x)


def test_nan_weights_spread_as_in_torch() -> None:
    ours, theirs = pair("lstm", 4, 5)
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight_ih_l0[2, 1] = torch.nan
    x = torch.randn(3, 2, 4)
    assert torch.equal(ours(x)[0].isnan(), theirs(x)[0].isnan())
    assert ours(x)[0].isnan().any()


@pytest.mark.parametrize("kind", ["norm", "orthogonal", "spectral", "prune"])
def test_reset_parameters_of_parametrized_and_pruned_layers(kind: str) -> None:
    layer = ur.GRU(3, 4)
    register: Any = {
        "norm": nn.utils.parametrizations.weight_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
        "spectral": nn.utils.parametrizations.spectral_norm,
        "prune": lambda layer, name: prune.l1_unstructured(layer, name, 0.3),
    }[kind]
    register(layer, "weight_hh_l0")
    layer(torch.ones(2, 3))  # pruning computes the weight in a forward pre-hook
    before = layer.weight_hh_l0.clone()
    layer.reset_parameters()
    layer(torch.ones(2, 3))
    assert not torch.allclose(before, layer.weight_hh_l0)
