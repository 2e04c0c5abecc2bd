"""The programs of a layer's steps, and the reasons why a layer has none."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

import unrolled as ur
from unrolled.tracing.step_graph import LayerProgram, layer_program, model_programs


class Base(ur.Cell):
    """A cell that other tests change."""

    weight_ih = ur.Param("hidden", "input")
    weight_hh = ur.Param("hidden", "hidden")


def program_of(step: Any, training: bool = False, **options: Any) -> LayerProgram:
    """Return the program of a cell with this step."""
    cell = type("Tested", (Base,), {"step": step})
    layer = ur.Recurrent(cell, 3, 4, **options).train(training)
    dtype = options.get("dtype", torch.float32)
    return model_programs(ur.trace(layer, torch.randn(5, 2, 3, dtype=dtype)))[0]


def test_a_program_is_plain_data() -> None:
    trace = ur.trace(nn.LSTM(2, 3, bidirectional=True), torch.randn(6, 2))
    for part, program in zip(trace.layers, model_programs(trace), strict=True):
        assert program.reason is None
        assert program.program_of_step == [0] * 6
        (step,) = program.programs
        assert json.loads(json.dumps(step, allow_nan=False)) == step
        assert list(step["quantities"]) == list(part.names)
        assert step["states"] == {name: step["quantities"][name] for name in ("h", "c")}
        assert step["held"] == list(part.names)
        leaves = {node.get("name", node["leaf"]) for node in step["nodes"] if "leaf" in node}
        assert leaves == {"input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh"}
        for k, node in enumerate(step["nodes"]):
            references = re.findall(r'"ref": (\d+)', json.dumps(node))
            assert all(int(reference) < k for reference in references)


def test_the_values_do_not_change_the_program() -> None:
    layer = nn.GRU(2, 3, num_layers=2)
    programs = [
        [program.programs for program in model_programs(ur.trace(layer, torch.randn(time, 3, 2)), 2)]
        for time in (1, 4)
    ]
    assert programs[0] == programs[1]


def test_constants_are_stored_once() -> None:
    def step(self: Any, x: Tensor, h: Tensor) -> Tensor:
        scale = torch.linspace(0, 1, 4)
        again = torch.linspace(0, 1, 4)
        return torch.tanh(linear(x, self.weight_ih)) * scale + h * again * torch.ones_like(h)

    program = program_of(step)
    assert program.reason is None
    assert [tensor.tolist() for tensor in program.constants] == [
        torch.linspace(0, 1, 4).tolist(),
        [[1.0] * 4],
    ]


def test_a_second_name_of_a_value_is_not_held() -> None:
    """Otherwise holding it would hold what the first name stands for, too."""
    layer = ur.Recurrent(ur.cells.QRNN, 3, 4, pooling="f")
    (program,) = layer_program(ur.trace(layer, torch.randn(3, 3)).layers[0]).programs
    assert program["quantities"]["h"] == program["quantities"]["c"]
    assert program["held"] == ["z", "f", "i", "c"]
    layer = ur.Recurrent(ur.cells.SRU, 4, 4, rescale=False)
    (program,) = layer_program(ur.trace(layer, torch.randn(3, 4)).layers[0]).programs
    assert "past" not in program["held"]  # the input itself


def test_a_function_with_nothing_to_do() -> None:
    def step(self: Any, x: Tensor, h: Tensor) -> Tensor:
        f = torch.sigmoid(linear(x, self.weight_ih)).to(x.dtype).contiguous()
        return f * dropout(h, 0.5, self.training)

    assert program_of(step).reason is None


def test_recorded_random_numbers() -> None:
    def step(self: Any, x: Tensor, h: Tensor) -> Tensor:
        noise = torch.randn_like(h)
        return dropout(linear(x, self.weight_ih), 0.5, self.training) + 0.1 * noise

    program = program_of(step, training=True)
    assert program.reason is None
    assert program.draws is not None
    assert program.draws.shape == (5, 8)


def depends_on_rows(self: Any, x: Tensor, h: Tensor) -> Tensor:
    h = linear(x, self.weight_ih) - h.mean(0)
    return h


def changes_in_place(self: Any, x: Tensor, h: Tensor) -> Tensor:
    new = linear(x, self.weight_ih)
    new[:, 0] = h[:, 1]
    return new


def reads_a_number(self: Any, x: Tensor, h: Tensor) -> Tensor:
    if h.sum() > 0:
        return torch.tanh(h)
    return linear(x, self.weight_ih)


def reads_an_array(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return linear(x, self.weight_ih) + torch.from_numpy(h.numpy() * 2)


def unknown_function(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.i0(linear(x, self.weight_ih)) + h


def hidden_function(self: Any, x: Tensor, h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        hidden = torch.tanh(h)
    return linear(x, self.weight_ih) + hidden


def complex_numbers(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return (torch.polar(torch.ones_like(h), h) * linear(x, self.weight_ih)).real


def random_numbers(self: Any, x: Tensor, h: Tensor) -> Tensor:
    return linear(x, self.weight_ih) + h * torch.randperm(4)


REASONS = {
    depends_on_rows: "h of a row depends on other rows, or on random numbers that weren't recorded",
    changes_in_place: "it changes a tensor in place",
    reads_a_number: r"it reads numbers of a tensor in Python \(bool\)",
    reads_an_array: r"it reads numbers of a tensor in Python \(numpy\)",
    unknown_function: "it uses torch.i0",
    hidden_function: "it computes numbers outside of torch's functions",
    complex_numbers: "it (uses torch.polar|computes with complex64 numbers)",
    random_numbers: "h of a row depends on other rows, or on random numbers that weren't recorded",
}


@pytest.mark.parametrize("step", REASONS, ids=lambda step: step.__name__)
def test_reasons(step: Any) -> None:
    program = program_of(step)
    assert not program.programs
    assert program.reason is not None
    assert re.fullmatch(
        f"The steps of Tested can't be recomputed on the page because {REASONS[step]}\\.", program.reason
    )


def test_other_dtypes() -> None:
    def step(self: Any, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight_ih) + h)

    assert "it computes with bfloat16 numbers" in str(program_of(step, dtype=torch.bfloat16).reason)
    assert program_of(step, dtype=torch.float64).reason is None


def test_dropout_between_layers() -> None:
    layer = nn.LSTM(2, 3, num_layers=2, dropout=0.5)
    lower, upper = model_programs(ur.trace(layer, torch.randn(4, 2)))
    assert lower.reason is None
    assert upper.reason == (
        "The steps of LSTM can't be recomputed on the page because the dropout between the layers was random."
    )
    assert all(
        program.reason is None for program in model_programs(ur.trace(layer.eval(), torch.randn(4, 2)))
    )


def test_a_part_of_a_trace_has_no_program() -> None:
    layer = nn.LSTM(2, 3)
    with ur.record(layer, steps=[1]) as recorded:
        layer(torch.randn(4, 2))
    with pytest.raises(ValueError, match="a program needs all steps"):
        layer_program(recorded[""].layers[0])
    with pytest.raises(IndexError, match="row 5"):
        layer_program(ur.trace(layer, torch.randn(4, 2)).layers[0], 5)
