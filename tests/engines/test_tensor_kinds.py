"""Tensors without memory, and others that compiled code can't read: right numbers or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:.*quant.*:UserWarning"),
]


def lazy_zeros(like: Tensor) -> Tensor:
    return torch._efficientzerotensor(like.shape, dtype=like.dtype)


def view_of_lazy_zeros(like: Tensor) -> Tensor:
    return torch._efficientzerotensor((len(like) + 1, *like.shape[1:]), dtype=like.dtype)[1:]


def freed(like: Tensor) -> Tensor:
    tensor = like.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def view_of_freed(like: Tensor) -> Tensor:
    base = torch.cat((like, like))
    view = base[len(like) :]
    base.untyped_storage().resize_(0)
    return view


def negated(like: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(like), like).conj().imag


# Each kind, and the tensor with memory that has the same values.
READABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "lazy zeros": (lazy_zeros, torch.zeros_like),
    "view of lazy zeros": (view_of_lazy_zeros, torch.zeros_like),
    "negated": (negated, torch.neg),
    "functionalized": (torch._to_functional_tensor, torch.clone),
    "expanded": (lambda t: t[:1].expand(t.shape), lambda t: t[:1].repeat(len(t), *[1] * (t.dim() - 1))),
    "overlapping": (
        lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()),
        lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()).clone(),
    ),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "freed": (freed, "memory of a tensor was freed|storage of size 0"),
    "view of freed": (view_of_freed, "memory of a tensor was freed|storage of size 0"),
    "meta": (lambda t: t.to("meta"), "on meta but|on the meta device|different dtypes or devices"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "nested tensor|NestedTensorImpl"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "dtype"),
}


def call_packed(layer: Any, x: Tensor, state: Any) -> Any:
    order = torch.tensor([1, 0])
    output, final = layer(PackedSequence(x.flatten(0, 1), torch.tensor([2] * len(x)), order, order), state)
    return output.data, final


def call_frozen(layer: Any, x: Tensor, state: Any) -> Any:
    with torch.no_grad(), ur.frozen(layer):
        layer(torch.randn(4, 2, 3))
        return layer(x, state)


def call_stream(layer: Any, x: Tensor, state: Any) -> Any:
    stream = ur.Stream(layer)
    stream(torch.randn(4, 2, 3))
    stream.state = state
    return stream(x), stream.state


def call_reference(layer: Any, x: Tensor, state: Any) -> Any:
    with ur.engine("reference"):
        return layer(x, state)


def gradients(layer: Any, x: Tensor, state: Any) -> Any:
    output, _ = layer(x, state)
    weights = [layer.weight_ih_l0, layer.weight_ih_l1, layer.bias_hh_l0]
    return torch.autograd.grad(output.pow(2).sum(), weights)


CALLS: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "plain": lambda layer, x, state: layer(x, state),
    "no gradients": torch.no_grad()(lambda layer, x, state: layer(x, state)),
    "gradients": gradients,
    "reference": call_reference,
    "packed": call_packed,
    "frozen": call_frozen,
    "stream": call_stream,
    "lengths": lambda layer, x, state: layer(x, state, lengths=[4, 4]),
    "resets": lambda layer, x, state: layer(x, state, resets=torch.zeros(4, 2, dtype=torch.bool)),
    "checkpoint": lambda layer, x, state: layer(x, state, checkpoint=2),
}


def arguments(role: str, make: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor, Tensor]:
    """Return a layer, an input and a state, one of which ``make`` converts."""
    torch.manual_seed(1)
    layer, x, state = ur.GRU(3, 4, 2), torch.randn(4, 2, 3), torch.randn(2, 2, 4)
    if role == "parameter":
        layer._parameters["weight_hh_l0"] = make(layer.weight_hh_l0.detach())  # type: ignore[assignment]
    return layer, make(x) if role == "x" else x, make(state) if role == "state" else state


def values(result: Any) -> list[Tensor]:
    if isinstance(result, tuple):
        return [value for part in result for value in values(part)]
    return [torch._from_functional_tensor(result) if torch._is_functional_tensor(result) else result]


@pytest.mark.parametrize("call", sample(CALLS, list(CALLS)[:5]))
@pytest.mark.parametrize("role", sample(["state", "x", "parameter"]))
def test_tensors_without_memory_of_their_own(role: str, call: str) -> None:
    for make, make_expected in READABLE.values():
        expected = CALLS[call](*arguments(role, make_expected))
        actual = CALLS[call](*arguments(role, make))
        torch.testing.assert_close(values(actual), values(expected))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("role", ["x", "state", "parameter"])
def test_tensors_that_are_refused(role: str, call: str) -> None:
    for kind, (make, message) in REFUSED.items():
        if call == "packed" and (role, kind) in (("x", "nested"), ("x", "quantized")):
            continue  # torch can't flatten it
        with pytest.raises(RuntimeError, match=message):
            CALLS[call](*arguments(role, make))


def test_sparse_tensors() -> None:
    layer, x, state = ur.GRU(3, 4), torch.randn(4, 2, 3), torch.randn(1, 2, 4)
    for arguments in ((x.to_sparse(), state), (x, state.to_sparse()), (x.to_sparse_csr(), state)):
        for engine in ("auto", "reference"):
            with (
                ur.engine(engine),
                pytest.raises(RuntimeError, match="input and the states to be dense, got"),
            ):
                layer(*arguments)
    expected = layer(x, state)
    layer._parameters["weight_hh_l0"] = layer.weight_hh_l0.detach().to_sparse_csr()  # type: ignore[assignment]
    torch.testing.assert_close(layer(x, state), expected)  # torch multiplies with it


def test_single_step_with_lazy_zeros() -> None:
    cell, theirs = ur.LSTMCell(16, 16), nn.LSTMCell(16, 16)
    theirs.load_state_dict(cell.state_dict())
    zeros = torch._efficientzerotensor((1, 16))
    torch.testing.assert_close(cell(zeros), theirs(torch.zeros(1, 16)))
    torch.testing.assert_close(cell(zeros, (zeros, zeros)), theirs(torch.zeros(1, 16)))


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("kind", ["lazy zeros", "view of lazy zeros", "negated", "expanded"])
def test_incoming_gradients(kind: str, checkpoint: int | None) -> None:
    make, make_expected = READABLE[kind]
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    other = copy.deepcopy(layer)
    like = torch.randn(5, 2, 4)

    def run(layer: Any, grad: Tensor) -> Any:
        output, final = layer(x, checkpoint=checkpoint)
        return torch.autograd.grad((output, final), (x, *layer.parameters()), (grad, torch.ones(1, 2, 4)))

    with ur.engine("reference"):
        expected = run(other, make_expected(like))
    torch.testing.assert_close(run(layer, make(like)), expected)


def test_freed_between_forward_and_backward() -> None:
    layer, x = ur.GRU(3, 4), torch.randn(5, 2, 3)
    for index in range(3):
        output, _ = layer(x)
        storage = (x, layer.weight_hh_l0, output.detach())[index].untyped_storage()
        size, backup = storage.nbytes(), storage.clone()
        storage.resize_(0)
        with pytest.raises(RuntimeError, match="memory of a tensor was freed"):
            output.backward(torch.ones(5, 2, 4))
        storage.resize_(size)
        storage.copy_(backup)


def test_a_trace_of_freed_memory() -> None:
    layer = ur.GRU(3, 4)
    with pytest.raises(RuntimeError, match="memory of a tensor was freed"):
        ur.trace(layer, freed(torch.randn(5, 2, 3)))
    layer._parameters["weight_hh_l0"] = layer.weight_hh_l0.detach().to("meta")  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="on the meta device"):
        ur.trace(layer, torch.randn(5, 2, 3))


def reset_rows(rows: Tensor) -> Any:
    stream = ur.Stream(ur.LSTM(3, 4))
    stream(torch.randn(4, 2, 3))
    stream.reset(rows)
    return stream(torch.randn(4, 2, 3))


OTHER_PLACES: dict[str, tuple[Tensor, Callable[[Tensor], Any]]] = {
    "lengths": (torch.tensor([4, 3]), lambda t: ur.LSTM(3, 4)(torch.randn(4, 2, 3), lengths=t)),
    "resets": (torch.zeros(4, 2).bool(), lambda t: ur.LSTM(3, 4)(torch.randn(4, 2, 3), resets=t)),
    "rows of a stream": (torch.tensor([True, False]), reset_rows),
    "x of a cell": (torch.randn(2, 3), lambda t: ur.LSTMCell(3, 4)(t)),
    "x of a step": (torch.randn(2, 3), lambda t: ur.LSTM(3, 4).step(t)),
    "x of a trace": (torch.randn(4, 2, 3), lambda t: ur.trace(ur.LSTM(3, 4), t)),
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(2, -1)[0], t.reshape(2, -1)[1]]),
    "sparse": Tensor.to_sparse,
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", OTHER_PLACES)
def test_other_arguments_that_are_refused(place: str, kind: str) -> None:
    tensor, call = OTHER_PLACES[place]
    with pytest.raises(RuntimeError, match="nested tensor|layout|meta") as raised:
        call(KINDS[kind](tensor))
    assert "Internal error" not in str(raised.value)
    assert not isinstance(raised.value, NotImplementedError)
