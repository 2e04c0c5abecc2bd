"""Plans of stacks that record gradients, compared with torch.nn and with calls without plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrolled as ur
from helpers.layer_pairs import NEEDS_COMPILER, assert_close
from helpers.planned import PlanSpy, flat, plan_spy, same, without_plans
from helpers.sampling import sample

__all__ = ["plan_spy"]  # a fixture

pytestmark = NEEDS_COMPILER
FAST = ["GRU"]


def new_pair(kind: str, **options: Any) -> tuple[Any, Any]:
    ours = getattr(ur, kind)(5, 4, dtype=torch.float64, **options)
    theirs = getattr(nn, kind)(5, 4, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def new_state(kind: str, layers: int, rows: tuple[int, ...]) -> Any:
    parts = [torch.randn(layers, *rows, 4, dtype=torch.float64) for _ in range(2 if kind == "LSTM" else 1)]
    return tuple(parts) if kind == "LSTM" else parts[0]


def gradients(module: Any, x: Tensor, state: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The results, and the gradients of everything that requires one."""
    leaves = [x, *flat([] if state is None else state), *module.parameters()]
    results = flat(module(x, state))
    loss = torch.stack([(part.sin() * (k + 1)).sum() for k, part in enumerate(results)]).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return results, [*torch.autograd.grad(loss, wanted, allow_unused=True)]


@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 2, 5), (2, 5)], ids=str)
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("layers", sample([2, 3]))
@pytest.mark.parametrize("kind", sample(["GRU", "LSTM", "RNN"], FAST))
def test_results_and_gradients(
    kind: str, layers: int, stateful: bool, shape: tuple[int, ...], plan_spy: PlanSpy
) -> None:
    ours, theirs = new_pair(kind, num_layers=layers)
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        state = new_state(kind, layers, shape[1:-1]) if stateful else None
        for part in flat([] if state is None else state):
            part.requires_grad_()
        results, expected = gradients(ours, x, state), gradients(theirs, x, state)
        usual = gradients(without_plans(ours), x, state)
        assert same(results[0], usual[0])
        for part in (0, 1):
            for result, other in zip(results[part], expected[part], strict=True):
                assert result is not None
                assert other is not None
                assert_close(result, other, 1e-12)
    assert plan_spy.calls == 2
    assert plan_spy.backwards == 2 * layers


def test_a_frozen_first_layer_and_an_input_without_gradient(plan_spy: PlanSpy) -> None:
    ours, theirs = new_pair("GRU", num_layers=2, batch_first=True)
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("_l1" in name)
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    for _ in range(4):
        (results, grads), (expected, others) = gradients(ours, x, None), gradients(theirs, x, None)
        for result, other in zip([*results, *grads], [*expected, *others], strict=True):
            assert_close(result, other, 1e-12)
    assert plan_spy.calls == 2


def test_states_of_other_shapes_and_changed_parameters(plan_spy: PlanSpy) -> None:
    ours, theirs = new_pair("LSTM", num_layers=2)
    x = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        state = new_state("LSTM", 2, (3,))
        with torch.no_grad():
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.add_(0.1)
                other.add_(0.1)
        for result, expected in zip(flat(ours(x, state)), flat(theirs(x, state)), strict=True):
            assert_close(result, expected, 1e-12)
    assert plan_spy.calls == 1
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(x, new_state("LSTM", 3, (3,)))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(x, new_state("LSTM", 2, (2,)))


def test_gradients_of_gradients(plan_spy: PlanSpy) -> None:
    ours, theirs = new_pair("RNN", num_layers=2)
    x, second = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True), []
    for _ in range(3):
        second = []
        for module in (ours, theirs):
            (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
            second.append(torch.autograd.grad(grad.square().sum(), [x, *module.parameters()]))
    assert plan_spy.calls == 1
    for result, expected in zip(*second, strict=True):
        assert_close(result, expected, 1e-10)
