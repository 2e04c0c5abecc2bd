"""Modules with plans that are changed, copied, compiled, shared by threads, and so on."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, prune

import unrolled as ur
from helpers import planned
from helpers.forks import exit_code_of_child
from helpers.layer_pairs import COMPILER_ERROR
from helpers.planned import PlanSpy, flat, new_case, outcome, plan_spy, same
from unrolled.engines.call_plans import inference, native_replay
from unrolled.layers import planned_calls

__all__ = ["plan_spy"]  # a fixture


class Subclass(torch.Tensor):
    pass


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another parameter": lambda m: setattr(m, *_changed(m, nn.Parameter)),
    "data": lambda m: setattr(getattr(m, _changed(m)[0]), "data", _changed(m)[1]),
    "in place": lambda m: getattr(m, _changed(m)[0]).data.mul_(2),
    "transposed storage": lambda m: setattr(
        getattr(m, _changed(m)[0]), "data", _changed(m)[1].t().clone().t()
    ),
    "to double and back": lambda m: m.double().float(),
    "to double": lambda m: m.double(),
    "shared memory": lambda m: m.share_memory(),
    "forward hook": lambda m: m.register_forward_hook(
        lambda _, x, out: tuple(2 * part for part in flat(out))
    ),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:])),
    "own forward": lambda m: setattr(m, "forward", lambda x, hx=None: x + 7),
    "pruned": lambda m: prune.l1_unstructured(m, _changed(m)[0], 0.5),
    "parametrized": lambda m: parametrizations.orthogonal(m, _changed(m)[0]),
    "deleted": lambda m: delattr(m, _changed(m)[0]),
    "plain attribute": lambda m: (delattr(m, name := _changed(m)[0]), setattr(m, name, torch.ones(1))),
    "wrong shape": lambda m: setattr(getattr(m, _changed(m)[0]), "data", torch.ones(3)),
    "freed": lambda m: getattr(m, _changed(m)[0]).untyped_storage().resize_(0),
    "negated": lambda m: setattr(m, (w := _changed(m))[0], nn.Parameter(torch._neg_view(w[1]))),
    "subclass": lambda m: m._parameters.__setitem__(*_changed(m, lambda w: w.as_subclass(Subclass))),
    "eval mode": lambda m: m.eval(),
}


def _changed(module: Any, convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Any:
    """Return the name of a weight, and other values for it."""
    name = next(name for name in module._parameters if name.startswith("weight_hh"))
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(getattr(module, name).shape, generator=generator)
    return name, convert(value)


@pytest.mark.parametrize("name", ["LSTMCell", "GRU", "Leaky"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_module(name: str, change: str) -> None:
    """After a change of the module, its calls are those of a module without plans with the same change."""
    torch.manual_seed(7)
    case, other = new_case(name), new_case(name)
    other.module.load_state_dict(case.module.state_dict())
    with torch.no_grad():
        case.warm_up()
        vars(other.module)["_planned_calls"] = vars(other.usual)["_planned_calls"]
        for module in (case.module, other.module):
            torch.manual_seed(5)
            CHANGES[change](module)
        for _ in range(4):  # the third of which may have a new plan
            result = outcome(lambda: case.module(case.x, case.hx))
            expected = outcome(lambda: other.module(case.x, case.hx))
            assert same(result, expected), (result, expected)


def test_compiled_code_runs_plans(request: pytest.FixtureRequest) -> None:
    """It does wherever torch exports what it needs, as on Linux."""
    with torch.no_grad():
        case = new_case("LSTM").warm_up()
        case.module(case.x, case.hx)
    native = vars(case.module)["_planned_calls"]._native
    in_python = "Python" in request.node.name or COMPILER_ERROR
    assert (native is None) == bool(in_python or native_replay.interface() is None)
    if sys.platform == "linux":
        assert native_replay.interface() is not None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["LSTMCell", pytest.param("GRU", marks=pytest.mark.slow)])
def test_references_are_counted(name: str, grad: bool) -> None:
    """Neither results nor arguments are kept alive, or freed too early, also by calls that have no plan."""
    case = new_case(name)
    with torch.set_grad_enabled(grad):
        case.warm_up()
        case.module(case.x, case.hx)
        objects = [case.x, *case.state, *case.module.parameters(), case.hx, None, False, "_parameters", 0, -1]
        gc.collect()
        before = list(map(sys.getrefcount, objects))
        alive = []
        for _ in range(500):
            alive += [weakref.ref(result) for result in flat(case.module(case.x, case.hx))]
            case.module(case.x)
            with pytest.raises(TypeError):
                case.module(case.x, 1.0)
        after = list(map(sys.getrefcount, objects))
    assert not any(reference() is not None for reference in alive)
    changes = [b - a for a, b in zip(after, before, strict=True)]
    assert max(map(abs, changes)) < 400, changes  # other code uses some of the objects, too


def test_python_values_that_a_step_reads(monkeypatch: pytest.MonkeyPatch, plan_spy: PlanSpy) -> None:
    case = new_case("Leaky")
    with torch.no_grad():
        before = case.warm_up().module(case.x, case.hx)
        assert plan_spy.calls == 1
        monkeypatch.setattr(planned, "FACTOR", 5.0)
        for _ in range(4):
            _, trace = case.module(case.x, case.hx)
            torch.testing.assert_close(trace, case.state[1] + 5 * before[0])
        case.module._cells[""].leak = 1.0
        for _ in range(4):
            torch.testing.assert_close(case.module(case.x, case.hx)[0], case.state[0])
    assert plan_spy.calls > 2  # there are new plans


def test_options_of_a_layer(plan_spy: PlanSpy) -> None:
    """Attributes that are changed after a layer has a plan."""
    with torch.no_grad():
        case = new_case("2 layers").warm_up()
        case.module(case.x, case.hx)
        assert plan_spy.calls == 1
        case.module.dropout = 1.0  # the second layer sees zeros
        zeros, _ = case.module(case.x, case.hx)
        other, _ = case.module(2 * case.x, case.hx)
        assert torch.equal(zeros, other)
        assert plan_spy.calls == 1
        case.module.eval()
        assert not torch.equal(case.module(case.x, case.hx)[0], zeros)
        learned = ur.GRU(5, 4, initial_state="learned")
        for value in (0.0, 1.0, 2.0, 3.0):
            learned.initial_h_l0.fill_(value)
            expected = learned(case.x, learned.initial_h_l0.expand(1, 3, 4).contiguous())[0]
            torch.testing.assert_close(learned(case.x)[0], expected)


@pytest.mark.parametrize(("steps", "batch", "planned"), [(120, 3, True), (1, 300, True), (129, 64, False)])
def test_long_calls_have_plans(steps: int, batch: int, planned: bool, plan_spy: PlanSpy) -> None:
    torch.manual_seed(steps)
    layer, x = ur.LSTM(3, 4), torch.randn(steps, batch, 3)
    theirs = nn.LSTM(3, 4)
    theirs.load_state_dict(layer.state_dict())
    for _ in range(3):
        layer.zero_grad()
        (output, _), ran = plan_spy.ran(lambda: layer(x))
        output.square().sum().backward()
    assert ran == planned
    expected, _ = theirs(x)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for ours, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-4 * other.grad.abs().max())


@pytest.mark.parametrize("cell", [ur.cells.SRU, ur.cells.SCRN, ur.cells.BRC])
def test_training_is_planned_with_its_backward_pass_or_not_at_all(
    cell: type[ur.Cell], plan_spy: PlanSpy
) -> None:
    """Otherwise, each backward pass would compute the forward pass again."""
    layer, x = ur.Recurrent(cell, 3, 4), torch.randn(2, 3, 3, requires_grad=True)
    for _ in range(4):
        layer(x)[0].sum().backward()
    assert plan_spy.calls == plan_spy.backwards


def test_training_that_saves_much_has_no_plan(plan_spy: PlanSpy) -> None:
    layer, x = ur.LSTM(2, 128), torch.randn(50, 33, 2)  # it saves 4.1 MB
    for _ in range(3):
        layer(x)[0].sum().backward()
    assert plan_spy.calls == 0
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert plan_spy.calls == 1


def test_calls_with_much_scratch_memory_have_no_plan(
    monkeypatch: pytest.MonkeyPatch, plan_spy: PlanSpy
) -> None:
    layer, x = ur.LSTM(4, 4, num_layers=2), torch.randn(20, 8, 4)
    between = 20 * 8 * 4 * 4  # bytes of the first layer's output
    for limit in (between // 2, 100 * between):
        monkeypatch.setattr(inference, "MAX_SCRATCH", limit)
        with torch.no_grad():
            new_layer = copy.deepcopy(layer)
            for _ in range(3):
                new_layer(x)
        assert (plan_spy.calls > 0) == (limit > between)


def test_a_subclass_with_its_own_unroll(plan_spy: PlanSpy) -> None:
    class Doubled(ur.GRU):
        def unroll(self, x: Any, *args: Any, **options: Any) -> Any:
            return super().unroll(2 * x, *args, **options)

    layer, x = Doubled(5, 4), torch.randn(1, 3, 5)
    with torch.no_grad():
        results = [layer(x)[0] for _ in range(4)]
        expected = nn.GRU(5, 4)
        expected.load_state_dict(layer.state_dict())
        for result in results:
            torch.testing.assert_close(result, expected(2 * x)[0])
    assert not plan_spy.calls


def test_frozen_layers_and_streams_keep_their_own_way(plan_spy: PlanSpy) -> None:
    with torch.no_grad():
        case = new_case("LSTM").warm_up()
        expected = case.usual(case.x, case.hx)
        with ur.frozen(case.module):
            assert same(case.module(case.x, case.hx), expected)
        stream = ur.Stream(case.module)
        assert not plan_spy.calls
        first, state = case.usual(case.x)
        assert torch.equal(stream(case.x), first)
        assert torch.equal(stream(case.x), case.usual(case.x, state)[0])
        case.module(case.x, case.hx)
        assert plan_spy.calls == 1


def test_the_log_of_engines_names_each_call(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        case = new_case("LSTMCell").warm_up()
        with caplog.at_level(logging.INFO, "unrolled.engine"):
            for _ in range(3):
                case.module(case.x, case.hx)
    assert caplog.messages == ["LSTM: native engine (selected: auto)"] * 3


@pytest.mark.filterwarnings("ignore")  # of torch.jit.trace
@pytest.mark.parametrize("name", ["LSTMCell", "LSTM"])
def test_torch_compile_and_export(name: str) -> None:
    """They see the module without plans, as one graph."""

    class Model(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
            return self.inner(x, (h, c))

    with torch.no_grad():
        case = new_case(name).warm_up()
        expected, arguments = flat(case.usual(case.x, case.hx)), (case.x, *case.state)
        compiled = torch.compile(Model(case.module), fullgraph=True, backend="eager")
        exported = torch.export.export(Model(case.module), arguments).module()
        traced = torch.jit.trace(Model(case.module), arguments)
        for model in (compiled, exported, traced):
            for result, other in zip(flat(model(*arguments)), expected, strict=True):
                torch.testing.assert_close(result, other)


def test_a_new_plan_does_not_invalidate_compiled_code() -> None:
    counter = CompileCounter()
    case = new_case("GRUCell")
    compiled = torch.compile(case.module, backend=counter)
    with torch.no_grad():
        before = compiled(case.x, case.hx)
        case.warm_up()
        assert torch.equal(compiled(case.x, case.hx), before)
    assert counter.frame_count == 1


def test_copies_and_pickles() -> None:
    with torch.no_grad():
        case = new_case("LSTMCell").warm_up()
        assert vars(case.module)["_planned_calls"]._plans
        for other in (copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))):
            assert not vars(other)["_planned_calls"]._plans
            other.weight_hh.mul_(2)
            expected = other.double()(case.x.double(), tuple(part.double() for part in case.state))
            other.float()
            for _ in range(3):
                result = other(case.x, case.hx)
            torch.testing.assert_close(result[0].double(), expected[0])
        old = copy.copy(case.module)  # a module that was saved before there were plans
        del vars(old)["_planned_calls"]
        assert same(old(case.x, case.hx), case.usual(case.x, case.hx))


@pytest.mark.parametrize("grad", [False, True])
def test_plans_hold_no_tensor(grad: bool) -> None:
    case = new_case("LSTM")
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            results = flat(case.module(case.x, case.hx))
            if grad:
                sum(result.sum() for result in results).backward()
    plans = vars(case.module)["_planned_calls"]
    assert any(plans._plans.values())
    alive = [weakref.ref(tensor) for tensor in (case.x, *case.state, *results, *case.module.parameters())]
    del case, results
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_the_number_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch, plan_spy: PlanSpy) -> None:
    monkeypatch.setattr(planned_calls, "MAX_PLANS", 4)
    monkeypatch.setattr(planned_calls, "MAX_COUNTED", 6)
    cell, other = ur.GRUCell(2, 3), nn.GRUCell(2, 3)
    other.load_state_dict(cell.state_dict())
    plans = vars(cell).setdefault("_planned_calls", planned_calls.PlannedCalls())
    with torch.no_grad():
        for _ in range(3):
            for rows in range(1, 10):
                x = torch.randn(rows, 2)
                for _ in range(3):
                    torch.testing.assert_close(cell(x), other(x))
                assert len(plans._plans) <= 4
                assert len(plans._counts) <= 7
    assert plan_spy.calls


def test_in_a_forked_child() -> None:
    import threading

    with torch.no_grad():
        case = new_case("LSTMCell").warm_up()
        expected = case.usual(case.x, case.hx)

        def call() -> None:
            with torch.no_grad():
                assert same(case.module(case.x, case.hx), expected)

        assert exit_code_of_child(threading.Lock(), call, seconds=60) == 0


def test_threads_share_plans() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with torch.no_grad():
        case = new_case("LSTM", rows=4, width=6, hidden=8).warm_up()
        inputs = [torch.randn_like(case.x) for _ in range(4)]
        expected = [flat(case.usual(x, case.hx)) for x in inputs]

    def work(index: int) -> bool:
        torch.set_num_threads(threads_now)
        with torch.no_grad():
            return all(same(flat(case.module(inputs[index], case.hx)), expected[index]) for _ in range(300))

    threads_now = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
