"""The torch operators check every argument, in calls without and with gradients, and in exported programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER
from helpers.sampling import sample
from unrolled.engines.torch_ops import operators

pytestmark = [
    NEEDS_COMPILER,
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\..* is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # from comparisons of sizes
]

ops: Any = torch.ops.unrolled


class Scaled(ur.Cell):
    """A cell with a tensor attribute, two states, and saved values that are numbers and booleans."""

    state = ("h", "m")
    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = torch.linspace(0.5, 1.5, self.hidden)

    def step(self, x: Tensor, h: Tensor, m: Tensor) -> Any:
        weight = torch.where(self.weight_hh > 0, self.weight_hh, 0.1 * self.weight_hh)
        m = 0.5 * m + torch.tanh(linear(x, self.weight_ih / self.weight_ih.norm()))
        return torch.tanh(m + linear(h * self.scale.to(h.dtype), weight)), m


def operator_arguments(cell: type[ur.Cell], packed: bool, directions: int) -> list[Any]:
    """Return the arguments of ``unrolled::recurrence``: x, tensors, sizes and text."""
    layer = ur.Recurrent(cell, 3, 4, bidirectional=directions == 2)
    texts: list[str] = []
    tensors: list[Tensor] = []
    for number, suffix in enumerate(layer._cells):
        bound = layer._bind(suffix)
        text, own, _, _ = operators.serialize_direction(
            bound.unbound, (), False, torch.float32, torch.device("cpu"), stateful=True, reverse=number == 1
        )
        texts.append(text)
        tensors += [torch.randn(2, width) for width in bound.state_sizes().values()]
        tensors += [getattr(bound, name).detach() for name in (*bound.shapes(), *own)]
    x = torch.randn(5, 3) if packed else torch.randn(4, 2, 3)
    return [x, tensors, torch.tensor([2, 2, 1]) if packed else None, f"[{', '.join(texts)}]"]


def calls(cell: type[ur.Cell], packed: bool, directions: int) -> dict[str, tuple[Any, list[Any]]]:
    """Return the three operators with valid arguments."""
    arguments = operator_arguments(cell, packed, directions)
    kept = ops.recurrence_kept(*arguments)
    count = len(ops.recurrence(*arguments))
    per_direction = count // directions
    outputs = [kept[k * per_direction] for k in range(directions)]
    grads = [torch.randn_like(result) for result in kept[:count]]
    return {
        "recurrence": (ops.recurrence, arguments),
        "recurrence_kept": (ops.recurrence_kept, arguments),
        "recurrence_back": (ops.recurrence_back, [grads, [*outputs, *kept[count:]], *arguments]),
    }


def wrong_tensors(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.double() if tensor.dtype is torch.float32 else tensor.float()
    yield tensor.to(torch.float16)
    yield tensor.to(torch.int64)
    yield tensor.to("meta")
    yield tensor.unsqueeze(0)
    if tensor.dim():
        yield torch.cat((tensor, tensor), -1)
        yield tensor[..., :-1]
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    yield freed


def variants(arguments: list[Any]) -> Iterator[list[Any]]:
    """Return arguments of which one is wrong."""
    for index, argument in enumerate(arguments):
        wrong: list[Any] = []
        if isinstance(argument, list):
            wrong = [[], argument[:-1], [*argument, argument[0]]]
            for k, tensor in enumerate(argument):
                rows = [tensor[:1], torch.cat((tensor, tensor))] if tensor.dim() > 1 else []
                for replacement in (*wrong_tensors(tensor), *rows):
                    wrong.append([*argument[:k], replacement, *argument[k + 1 :]])
        elif isinstance(argument, Tensor) and argument.is_floating_point():
            wrong = [*wrong_tensors(argument), argument[:0]]
        elif isinstance(argument, Tensor):
            sizes = [[1, 2, 2], [2, 2, 2], [3, 2], [3, 2, 0], [4, 2, -1], [2**62] * 4 + [5], []]
            wrong = [torch.tensor(values, dtype=torch.int64) for values in sizes]
            wrong += [argument.int(), argument.float(), argument.unsqueeze(0), argument.to("meta"), None]
        elif argument is None:
            wrong = [torch.tensor([2, 2, 2, 2])]
        for value in wrong:
            yield [*arguments[:index], value, *arguments[index + 1 :]]


def with_gradients(argument: Any) -> Any:
    if isinstance(argument, list):
        return [with_gradients(part) for part in argument]
    is_differentiable = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.detach().requires_grad_() if is_differentiable else argument


@pytest.mark.parametrize("gradients", sample([True, False]))
@pytest.mark.parametrize(
    ("cell", "packed", "directions"),
    [(ur.cells.GRU, True, 2), pytest.param(Scaled, False, 1, marks=pytest.mark.slow)],
)
def test_wrong_tensors(cell: type[ur.Cell], packed: bool, directions: int, gradients: bool) -> None:
    for operator, arguments in calls(cell, packed, directions).values():
        assert operator(*arguments)
        for wrong in variants(arguments):
            wrong = with_gradients(wrong) if gradients else wrong
            with pytest.raises(RuntimeError, match="expected|batch_sizes|memory of a tensor was freed"):
                operator(*wrong)


def test_groups() -> None:
    for packed in (False, True):
        operator, arguments = calls(ur.cells.GRU, packed, 1)["recurrence_back"]
        for groups in (0, -1, 3, 2**40, *([2] if packed else [])):
            with pytest.raises(RuntimeError, match="expected groups to divide the batch"):
                operator(*arguments, groups)


def test_texts() -> None:
    for operator, arguments in calls(ur.cells.GRU, False, 1).values():
        *others, text = arguments
        [direction] = json.loads(text)
        entries = [
            {**direction, "cell": 5},
            {**direction, "cell": "null"},
            {**direction, "cell": '{"cell": 5}'},
            {**direction, "stateful": "yes"},
            {**direction, "back": 3},
            {**direction, "own": 5},
            {**direction, "own": None},
            {key: value for key, value in direction.items() if key != "own"},
        ]
        texts = ["", "null", "[]", "{}", text[:-3], json.dumps([direction] * 3)]
        for wrong in (*texts, *(json.dumps([entry]) for entry in entries)):
            with pytest.raises(ValueError, match="should be the text that a layer has put into the graph"):
                operator(*others, wrong)
        for entry in ({**direction, "own": ["scale"]}, {**direction, "stateful": False}):
            with pytest.raises(RuntimeError, match="expected . tensors"):
                operator(*others, json.dumps([entry]))
        hidden = {**direction, "cell": direction["cell"].replace('"hidden": 4', '"hidden": 5')}
        with pytest.raises(RuntimeError, match="expected"):
            operator(*others, json.dumps([hidden]))


DRAWS = {"draws": [["normal", [-1, 4]]], "layer": 0, "directions": 1, "first": 0}


def test_the_operator_that_draws_random_numbers() -> None:
    draw = torch.ops.unrolled.draw
    x, seed, sizes, text = torch.randn(5, 2, 3), torch.tensor(3), torch.tensor([3, 2]), json.dumps(DRAWS)
    assert draw(x, seed, None, None, text).shape == (5, 2, 4)
    assert draw(x[:, 0], seed, sizes, torch.tensor([2, 0, 1]), text).shape == (5, 4)
    freed = torch.randn(5, 2, 3)
    freed.untyped_storage().resize_(0)
    wrong: list[Any] = [
        *(
            (value, seed, None, None)
            for value in (x.half(), x.bfloat16(), x > 0, x.int(), x.to(torch.complex64))
        ),
        *((value, seed, None, None) for value in (x[0], x.flatten(), freed)),
        *((x, value, None, None) for value in (seed.double(), seed.int(), seed > 0, seed.unsqueeze(0))),
        (x, seed, sizes, None),
        *((x[:, 0], seed, torch.tensor(value), None) for value in ([-1, 6], [2, 3], [3, 3], [5.0])),
        *((x, seed, None, torch.tensor(value)) for value in ([0, 2], [5, -7], [0, 1, 0], [0.0, 1.0])),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match=r"expected|batch_sizes|freed"):
            draw(*arguments, text)
    for key, value in {
        "draws": [["normal", [3, 4]]], "layer": -1, "directions": 10**8, "first": None,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match="should be the text that a layer has put into the graph"):
            draw(x, seed, None, None, json.dumps(DRAWS | {key: value}))
    for invalid in ("", "[]", "{}", json.dumps(DRAWS | {"draws": [["other", [-1]]]})):
        with pytest.raises(ValueError, match="should be the text that a layer has put into the graph"):
            draw(x, seed, None, None, invalid)


class Packed(nn.Module):
    """A layer that takes the tensors of a packed sequence, of which all but two may be missing."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *tensors: Tensor) -> Any:
        output, state = self.layer(PackedSequence(*tensors))
        return output.data, state


def packed_tensors(lengths: list[int]) -> tuple[Any, ...]:
    rows = [torch.randn(length, 3) for length in lengths]
    is_sorted = lengths == sorted(lengths, reverse=True)
    packed = pack_sequence(rows, enforce_sorted=is_sorted)
    return tuple(packed)[: 2 if is_sorted else 4]


DYNAMIC = torch.export.Dim.DYNAMIC


def record(method: str, module: nn.Module, tensors: tuple[Any, ...]) -> Any:
    if method == "jit.trace":
        return torch.jit.trace(module, tensors, check_trace=False)
    if method.startswith("make_fx"):
        return make_fx(module.forward, pre_dispatch=method.endswith("pre-dispatch"))(*tensors)
    shapes = (tuple({0: DYNAMIC} for _ in tensors),)
    strict = method == "export strict"
    return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=strict).module()


METHODS = ["jit.trace", "make_fx", "make_fx pre-dispatch", "export", "export strict"]


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if "strict" in name else []) for name in METHODS]
)
@pytest.mark.parametrize(
    "lengths",
    [[[5, 4, 2], [4, 4, 4], [7, 2], [9, 3, 3, 1]], [[5, 2, 4], [2, 3, 3], [1, 6], [7, 3, 2, 9]]],
    ids=["sorted", "unsorted"],
)
def test_graphs_take_lengths_as_data(method: str, lengths: list[list[int]]) -> None:
    ours = ur.LSTM(3, 4, 2, bidirectional=True)
    theirs = nn.LSTM(3, 4, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    first, *others = lengths
    graph = record(method, Packed(ours), packed_tensors(first))
    for other in others:
        tensors = packed_tensors(other)
        torch.testing.assert_close(graph(*tensors), Packed(theirs)(*tensors))


@pytest.mark.parametrize("method", ["jit.trace", "make_fx", "export"])
def test_graphs_check_lengths(method: str) -> None:
    graph = record(method, Packed(ur.GRU(3, 4)), packed_tensors([2, 3, 5]))
    data, sizes, after, before = packed_tensors([2, 4, 5])
    identity = torch.arange(3)
    for wrong in (
        (data, torch.tensor([1, 4, 6]), after, before),
        (data[:-1], sizes, after, before),
        (data, sizes, identity, before),
        (data, sizes, torch.zeros_like(after), torch.zeros_like(before)),
        (data, sizes, identity[:2], identity[:2]),
        (data, sizes, torch.tensor([0, 1, 9]), before),
    ):
        with pytest.raises(
            (RuntimeError, IndexError), match="batch_sizes|_indices|out of range|out of bounds"
        ):
            graph(*wrong)


class WithLengths(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *tensors: Tensor) -> Tensor:
        x, lengths = tensors
        output: Tensor = self.layer(x, lengths=lengths)[0]
        return output


@pytest.mark.slow
@pytest.mark.parametrize("method", sample(["jit.trace", "make_fx", "export"], ["make_fx"]))
def test_graphs_check_lengths_of_padded_inputs(method: str) -> None:
    model, x = WithLengths(ur.GRU(3, 4)), torch.randn(5, 2, 3)
    inputs = x, torch.tensor([5, 3])
    graph = (
        torch.export.export(model, inputs).module() if method == "export" else record(method, model, inputs)
    )
    for lengths in (torch.tensor([0, 5]), torch.tensor([4, 1])):
        torch.testing.assert_close(graph(x, lengths), model(x, lengths))
    for lengths in (torch.tensor([6, 2]), torch.tensor([3, -1])):
        with pytest.raises(RuntimeError, match="Expected lengths from 0 to the number of time steps"):
            graph(x, lengths)


@pytest.mark.parametrize("method", ["jit.trace", "make_fx", "export"])
def test_what_needs_lengths_as_constants_is_refused(method: str) -> None:
    learned = Packed(ur.GRU(3, 4, initial_state="learned"))
    with pytest.raises(RuntimeError, match="pass a padded input and lengths"):
        record(method, learned, packed_tensors([5, 4, 2]))
    with ur.engine("reference"), pytest.raises(RuntimeError, match="pass a padded input and lengths"):
        record(method, Packed(ur.GRU(3, 4)), packed_tensors([5, 4, 2]))


def test_exported_programs_check_states() -> None:
    layer = ur.GRU(3, 4)
    x, state = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {1: DYNAMIC})
    exported = torch.export.export(layer, (x, state), dynamic_shapes=shapes)
    graph, checked = exported.graph_module, exported.module()
    weights = list(layer.parameters())
    torch.testing.assert_close(graph(*weights, x, state)[0], layer(x, state)[0])
    for wrong in (
        state.double(),
        state.half(),
        state.long(),
        state[:, :1],
        state[..., :3],
        torch.cat((state, state), -1),
    ):
        with pytest.raises(RuntimeError, match="expected the state h to be a torch.float32 tensor"):
            graph(*weights, x, wrong)
        with pytest.raises((RuntimeError, AssertionError)):
            checked(x, wrong)


@pytest.mark.parametrize("cell", sample([Scaled, ur.cells.MGU, ur.cells.SLSTM]))
def test_cells_that_save_lists_numbers_and_booleans(cell: type[ur.Cell]) -> None:
    layer = ur.Recurrent(cell, 3, 4, num_layers=2)
    x = torch.randn(2, 5, 2, 3)
    exported = torch.export.export(layer, (x[0],)).module()
    torch.testing.assert_close(exported(x[1]), layer(x[1]))
    actual = torch.func.vmap(torch.func.grad(lambda part: layer(part)[0].pow(2).sum()))(x)
    layer.double()
    expected = []
    with ur.engine("reference"):
        for part in x.double():
            leaf = part.requires_grad_()
            expected += torch.autograd.grad(layer(leaf)[0].pow(2).sum(), leaf)
    torch.testing.assert_close(actual, torch.stack(expected).float())
