"""Plans of calls that record gradients, compared with torch.nn, float64 and calls without plans."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unrolled as ur
from helpers.planned import Case, PlanSpy, flat, new_case, outcome, plan_spy, same, sampled

__all__ = ["plan_spy"]  # a fixture

MODULES = (
    "LSTMCell",
    "GRUCell",
    "RNNCell",
    "LSTM",
    "GRU",
    "Leaky",
    "3 steps",
    "batch_first, 3 steps",
    "no state",
)


def leaves(case: Case) -> list[Tensor]:
    """Return the input, the states and the parameters of a case, which then require gradients."""
    for tensor in (case.x, *case.state):
        tensor.requires_grad_()
    return [case.x, *case.state, *case.module.parameters()]


def gradients(module: Any, case: Case, used: Sequence[int], **options: Any) -> list[Tensor | None]:
    """Return the gradients of the leaves of a sum of squares of some results."""
    results = flat(module(case.x, case.hx))
    loss = torch.stack([(results[k] ** 2).sum() * (k + 1) for k in used]).sum()
    return list(torch.autograd.grad(loss, leaves(case), allow_unused=True, **options))


@pytest.mark.parametrize("name", MODULES)
def test_gradients(name: str, plan_spy: PlanSpy) -> None:
    """The gradients of each subset of the results are those of a call without a plan, to the bit."""
    case = new_case(name)
    leaves(case)
    case.warm_up()
    count = len(flat(case.module(case.x, case.hx)))
    for size in range(1, count + 1):
        for used in itertools.combinations(range(count), size):
            expected = gradients(case.usual, case, used)
            calls, backwards = plan_spy.calls, plan_spy.backwards
            result = gradients(case.module, case, used)
            assert (plan_spy.calls, plan_spy.backwards) == (calls + 1, backwards + 1)
            for grad, other in zip(result, expected, strict=True):
                assert (grad is None) == (other is None)
                if grad is not None and other is not None:
                    assert torch.equal(grad, other)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize(
    ("width", "hidden"),
    [(3, 16), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 1), (17, 8)))],
)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "LSTM", "GRU", "RNN"])
def test_gradients_of_torch(name: str, width: int, hidden: int, rows: int, plan_spy: PlanSpy) -> None:
    case = new_case(name, rows, width, hidden, torch.float64)
    theirs = getattr(nn, name)(width, hidden, dtype=torch.float64)
    theirs.load_state_dict(case.module.state_dict())
    inputs = [*leaves(case)[: 1 + len(case.state)]]
    for _ in range(3):
        ours_loss = sum((part.sin()).sum() for part in flat(case.module(case.x, case.hx)))
        theirs_loss = sum((part.sin()).sum() for part in flat(theirs(case.x, case.hx)))
        torch.testing.assert_close(ours_loss, theirs_loss)
        result = torch.autograd.grad(ours_loss, [*inputs, *case.module.parameters()])
        expected = torch.autograd.grad(theirs_loss, [*inputs, *theirs.parameters()])
        for grad, other in zip(result, expected, strict=True):
            torch.testing.assert_close(grad, other)
    assert plan_spy.calls == plan_spy.backwards == 1


def test_without_initial_states(plan_spy: PlanSpy) -> None:
    cell, theirs = ur.LSTMCell(4, 6), nn.LSTMCell(4, 6)
    theirs.load_state_dict(cell.state_dict())
    for rows in ((), (3,)):
        x = torch.randn(*rows, 4)
        for _ in range(3):
            state, other = cell(x), theirs(x)
            for _ in range(3):
                state, other = cell(x, state), theirs(x, other)
            result = torch.autograd.grad(state[0].sum(), list(cell.parameters()))
            expected = torch.autograd.grad(other[0].sum(), list(theirs.parameters()))
            for grad, theirs_grad in zip(result, expected, strict=True):
                torch.testing.assert_close(grad, theirs_grad)
    assert plan_spy.backwards > 12


def test_training_by_an_optimizer() -> None:
    """Parameters that change in place between calls, and their gradients that accumulate."""
    torch.manual_seed(1)
    cell, theirs = ur.GRUCell(3, 5), nn.GRUCell(3, 5)
    theirs.load_state_dict(cell.state_dict())
    optimizers = [torch.optim.Adam(module.parameters(), 0.05) for module in (cell, theirs)]
    for _ in range(6):
        x, losses = torch.randn(4, 3), []
        for module, optimizer in zip((cell, theirs), optimizers, strict=True):
            h = torch.zeros(4, 5)
            for _ in range(3):
                h = module(x, h)
            loss = (h - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        torch.testing.assert_close(*losses)


@pytest.mark.parametrize("needs", ["x", "state", "one weight"])
def test_what_requires_gradients(needs: str, plan_spy: PlanSpy) -> None:
    case = new_case("LSTMCell")
    for parameter in case.module.parameters():
        parameter.requires_grad_(False)
    tensor = {"x": case.x, "state": case.state[1], "one weight": case.module.weight_hh}[needs]
    tensor.requires_grad_()
    case.warm_up()
    results = [module(case.x, case.hx) for module in (case.module, case.usual)]
    assert plan_spy.calls == 1
    assert same(*results)
    grads = [torch.autograd.grad(result[0].sum(), tensor)[0] for result in results]
    assert torch.equal(*grads)
    tensor.requires_grad_(False)
    for _ in range(3):
        assert not case.module(case.x, case.hx)[0].requires_grad


def hooked(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


Way = Callable[[Any, Case], Any]


def second_gradients(module: Any, case: Case) -> Any:
    first = gradients(module, case, [0], create_graph=True)
    total = torch.stack([grad.square().sum() for grad in first if grad is not None]).sum()
    return list(torch.autograd.grad(total, leaves(case), allow_unused=True))


def batched_gradients(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    grads = torch.eye(result.numel()).view(-1, *result.shape)
    return list(torch.autograd.grad(result, leaves(case), grads, is_grads_batched=True, allow_unused=True))


def vmapped_backward(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    directions = torch.stack((torch.ones_like(result), result.detach()))
    return list(
        torch.vmap(lambda v: torch.autograd.grad(result, case.x, v, retain_graph=True)[0])(directions)
    )


def two_backward_passes(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    first = torch.autograd.grad(result.sum(), leaves(case), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad((2 * result).sum(), leaves(case), allow_unused=True)
    return [*first, *second]


def graph_is_gone(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0].sum()
    result.backward()
    error = outcome(result.backward)
    assert module is case.usual or "a second time" in str(error)
    return torch.zeros(1)


def input_changed_in_place(module: Any, case: Case) -> Any:
    x = case.x * 1
    result = flat(module(x, case.hx))[0].sum()
    with torch.no_grad():
        x.mul_(2)
    error = outcome(lambda: torch.autograd.grad(result, case.x))
    return type(error)(str(error)[:80])  # before the name of the operation


def output_changed_in_place(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    result.mul_(3)
    return list(torch.autograd.grad(result.sum(), leaves(case), allow_unused=True))


def saved_tensor_hooks(module: Any, case: Case) -> Any:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return 2 * tensor

    with hooked(pack, lambda tensor: tensor / 2):
        result = gradients(module, case, [0])
    return [*result, torch.tensor([len(packed)])]


def offloaded(module: Any, case: Case) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return gradients(module, case, [0])


def checkpointed(module: Any, case: Case) -> Any:
    result = checkpoint(lambda x: flat(module(x, case.hx))[0], case.x, use_reentrant=False)
    return list(torch.autograd.grad(result.sum(), leaves(case), allow_unused=True))


def checkpointed_reentrant(module: Any, case: Case) -> Any:
    result = checkpoint(lambda x: flat(module(x, case.hx))[0], case.x, use_reentrant=True)
    result.sum().backward()
    grads = [tensor.grad for tensor in leaves(case)]
    for tensor in leaves(case):
        tensor.grad = None
    return [grad for grad in grads if grad is not None]


def negated_gradient(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    grad = torch._neg_view(torch.ones_like(result))
    return list(torch.autograd.grad(result, leaves(case), grad, allow_unused=True))


def zero_gradient(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    grad = torch._efficientzerotensor(result.shape)
    return list(torch.autograd.grad(result, leaves(case), grad, allow_unused=True))


def strided_gradient(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    strided = torch.randn(
        *result.shape[:-1], 2 * result.shape[-1], generator=torch.Generator().manual_seed(1)
    )
    return list(torch.autograd.grad(result, leaves(case), strided[..., ::2], allow_unused=True))


def anomaly_mode(module: Any, case: Case) -> Any:
    with torch.autograd.detect_anomaly(check_nan=True):
        return gradients(module, case, [0])


def autocast(module: Any, case: Case) -> Any:
    with torch.autocast("cpu"):
        return gradients(module, case, [0])


def jvp_of_grad(module: Any, case: Case) -> Any:
    inputs = case.x.detach()
    return torch.func.jvp(torch.func.grad(lambda x: flat(module(x, case.hx))[0].sum()), (inputs,), (inputs,))[
        1
    ]


def jacobian(module: Any, case: Case) -> Any:
    return torch.func.jacrev(lambda x: flat(module(x, case.hx))[0])(case.x)


def inference_tensor(module: Any, case: Case) -> Any:
    with torch.inference_mode():
        x = case.x.detach().clone()
    return outcome(lambda: module(x, case.hx))


def other_threads_in_backward(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0].sum()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        return list(torch.autograd.grad(result, leaves(case), allow_unused=True))
    finally:
        torch.set_num_threads(before)


def tensor_hook(module: Any, case: Case) -> Any:
    result = flat(module(case.x, case.hx))[0]
    result.register_hook(lambda grad: 2 * grad)
    return list(torch.autograd.grad(result.sum(), leaves(case), allow_unused=True))


def subclass(module: Any, case: Case) -> Any:
    class Subclass(torch.Tensor):
        pass

    result = flat(module(case.x.as_subclass(Subclass), case.hx))[0]
    return [
        grad.as_subclass(Tensor)
        for grad in torch.autograd.grad(result.sum(), leaves(case), allow_unused=True)
        if grad is not None
    ]


WAYS = (
    second_gradients, batched_gradients, vmapped_backward, two_backward_passes, graph_is_gone,
    input_changed_in_place, output_changed_in_place, saved_tensor_hooks, offloaded, checkpointed,
    checkpointed_reentrant, negated_gradient, zero_gradient, strided_gradient, anomaly_mode, autocast,
    jvp_of_grad, jacobian, inference_tensor, other_threads_in_backward, tensor_hook, subclass,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of torch, about anomaly mode and checkpoints
@pytest.mark.parametrize("name", sampled(MODULES, ["LSTMCell", "Leaky", "batch_first, 3 steps", "no state"]))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_differentiate(way: Way, name: str, plan_spy: PlanSpy) -> None:
    case = new_case(name)
    leaves(case)
    case.warm_up()
    expected = outcome(lambda: way(case.usual, case))
    result = outcome(lambda: way(case.module, case))
    if isinstance(expected, list) and isinstance(result, list):
        assert [part is None for part in result] == [part is None for part in expected]
        result, expected = ([part for part in parts if part is not None] for parts in (result, expected))
    assert same(result, expected), (result, expected)
    case.module(case.x, case.hx)
    assert plan_spy.calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTMCell", "GRU", "Leaky"])
def test_gradcheck(name: str, plan_spy: PlanSpy) -> None:
    case = new_case(name, rows=2, width=2, hidden=2, dtype=torch.float64)
    inputs = leaves(case)[: 1 + len(case.state)]
    case.warm_up()

    def call(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(case.module(x, state if len(state) > 1 else state[0])))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert plan_spy.backwards


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about gradients of tensors that aren't leaves
def test_compiled_autograd(plan_spy: PlanSpy) -> None:
    case = new_case("LSTMCell")
    leaves(case)
    case.warm_up()
    expected = gradients(case.usual, case, [0])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (case.module(case.x, case.hx)[0] ** 2).sum().backward()
    assert plan_spy.calls == 1
    for tensor, grad in zip(leaves(case), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_results_and_what_they_keep_are_freed() -> None:
    case = new_case("LSTM")
    leaves(case)
    case.warm_up()
    gc.collect()
    gc.disable()  # without it, only reference cycles would live on
    try:
        output = case.module(case.x, case.hx)[0]
        node, kept = weakref.ref(output), weakref.ref(output.grad_fn)
        del output
        assert node() is None
        assert kept() is None
        loss = case.module(case.x, case.hx)[0].sum()
        function = loss.grad_fn.next_functions[0][0]
        assert function.kept is not None
        loss.backward()
        assert function.kept is None
    finally:
        gc.enable()


def test_results_are_not_views() -> None:
    """In-place operations on results, which torch.nn allows."""
    case = new_case("LSTM")
    leaves(case)
    case.warm_up()
    output, (h, c) = case.module(case.x, case.hx)
    for tensor in (output, h, c):
        assert not tensor._is_view()
    h.detach_()
    assert not h.requires_grad
