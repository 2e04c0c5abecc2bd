"""Run a traced layer again with changed numbers, in torch: what the page's evaluator is compared with."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from types import CodeType
from typing import Any

import torch
from torch import Tensor

import unrolled as ur
from unrolled.tracing.layer_trace import LayerTrace
from unrolled.tracing.step_recorder import run_with_locals


class HeldQuantities:
    """The quantities that a step holds, by name: the unit, or None for all, and the value."""

    def __init__(self) -> None:
        self.active: dict[str, tuple[int | None, float | list[float]]] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name not in self.active:
            return value
        unit, held = self.active[name]
        value = value.clone(memory_format=torch.contiguous_format)
        if unit is None:
            value.copy_(torch.tensor(held).expand(value.numel()).view(value.shape))
        else:
            value.view(-1)[unit] = held
        return value


def assigned_names(statement: ast.stmt) -> list[str]:
    """Return the local variables that a statement assigns."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement]
    nodes = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [node.id for node in nodes if isinstance(node.ctx, ast.Store)]


@functools.cache
def step_with_holds(cell: type[ur.Cell]) -> tuple[CodeType, frozenset[str]]:
    """Return the code of a cell's step, with ``f = _hold("f", f)`` after the last assignment of each name.

    Returns:
        The code, and the names. Those that are last assigned in a loop or branch are left out.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cell.step))))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    last = {name: k for k, statement in enumerate(definition.body) for name in assigned_names(statement)}
    simple = frozenset(name for name, k in last.items() if isinstance(definition.body[k], ast.Assign))
    body: list[ast.stmt] = []
    for k, statement in enumerate(definition.body):
        body.append(statement)
        body += [ast.parse(f"{n} = _hold({n!r}, {n})").body[0] for n in sorted(simple) if last[n] == k]
    definition.body = body
    return compile(ast.fix_missing_locations(tree), "<step with holds>", "exec"), simple


def class_with_holds(cell: type[ur.Cell], hold: HeldQuantities) -> type[ur.Cell]:
    """Return a class of cells whose step holds quantities."""
    namespace = {**inspect.unwrap(cell.step).__globals__, "_hold": hold}
    exec(step_with_holds(cell)[0], namespace)
    return type("Held", (cell,), {"step": namespace["step"]})


def held_names(cell: type[ur.Cell]) -> frozenset[str]:
    """Return the names that :func:`run_changed` can hold."""
    return step_with_holds(cell)[1]


def run_changed(
    layers: tuple[LayerTrace, ...], edits: list[dict[str, Any]], batch: int = 0
) -> list[dict[str, Tensor]]:
    """Run all layers and directions of a trace for one row, step by step, with the edits of ``runModel``.

    Returns:
        For each layer and direction, the quantities, ``(time, size)``.
    """
    results: list[dict[str, Tensor]] = []
    for index, part in enumerate(layers):
        length = int(part.lengths[batch])
        below = [results[k] for k, other in enumerate(layers[:index]) if other.layer == part.layer - 1]
        first_state = next(iter(part.cell.state))
        x = torch.cat([r[first_state] for r in below], -1) if below else part.input[:length, batch].clone()
        state = {name: value[batch].clone() for name, value in part.initial_state.items()}
        parameters = {name: getattr(part.cell, name).clone() for name in part.cell.shapes()}
        for edit in edits:
            if edit["kind"] == "input" and not below:
                x[edit["step"], edit["unit"]] = edit["value"]
            if edit.get("part") == index and edit["kind"] == "parameter":
                parameters[edit["name"]].view(-1)[edit["index"]] = edit["value"]
            if edit.get("part") == index and edit["kind"] == "state":
                state[edit["name"]][edit["unit"]] = edit["value"]
        hold = HeldQuantities()
        cell = object.__new__(class_with_holds(type(part.cell), hold))
        cell.__dict__.update(part.cell.bind(parameters).__dict__)
        rows: dict[int, dict[str, Tensor]] = {}
        current = [value.unsqueeze(0) for value in state.values()]
        for step in reversed(range(length)) if part.direction == "backward" else range(length):
            hold.active = {
                edit["name"]: (edit["unit"], edit["value"])
                for edit in edits
                if edit["kind"] == "hold"
                and edit["part"] == index
                and step in (edit["steps"] or range(length))
            }
            draws = contextlib.nullcontext()
            if part.draws is not None:
                draws = part.draws.replace(part.draws.of_row(step, batch))
            with torch.no_grad(), draws:
                new, named = run_with_locals(cell, x[step].unsqueeze(0), *current)
            current = list(new) if isinstance(new, tuple) else [new]
            rows[step] = {name: named[name] for name in part.values}
        results.append(
            {name: torch.cat([rows[step][name] for step in range(length)]) for name in part.values}
        )
    return results
