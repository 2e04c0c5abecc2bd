"""Make a failing program shorter, as long as it fails in the same way."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from fuzz.builder import Line
from fuzz.check import Outcome
from fuzz.program import Call, Program, without_unused

AT_ONCE = 8  # programs that are checked, and compiled, together
CheckAll = Callable[[Sequence[Program]], Sequence[Outcome]]


def shrink(
    program: Program, outcome: Outcome, check_all: CheckAll, max_checks: int = 150
) -> tuple[Program, Outcome]:
    """Return the shortest program found that fails in the same way, and its outcome.

    Args:
        program: The program.
        outcome: Its outcome.
        check_all: Checks several programs.
        max_checks: Maximum number of programs to check.
    """
    tried = {str(program)}
    checks = 0
    while True:
        chunk: list[Program] = []
        for candidate in (*_candidates(program), None):
            if candidate is not None and str(candidate) not in tried:
                tried.add(str(candidate))
                chunk.append(candidate)
            if chunk and (candidate is None or len(chunk) == AT_ONCE):
                checks += len(chunk)
                outcomes = check_all(chunk)
                found = [pair for pair in zip(chunk, outcomes, strict=True) if _is_same(pair[1], outcome)]
                if found:
                    program, outcome = min(found, key=lambda pair: _size(pair[0]))
                    break
                chunk = []
        else:
            return program, outcome
        if checks > max_checks:
            return program, outcome


def _is_same(a: Outcome, b: Outcome) -> bool:
    """Return whether two failures are of the same kind."""
    return a.status == b.status and failure_kind(a) == failure_kind(b)


def failure_kind(outcome: Outcome) -> str:
    """Return what is the same in similar failures."""
    if outcome.status in ("crashed", "slow"):
        return outcome.status
    if outcome.status == "wrong":
        return next(kind for kind in ("None", "off by", "has", "tensor", "") if kind in outcome.message)
    return re.sub(r"\d+", "N", outcome.message)[:80]


def _size(program: Program) -> int:
    return len(program.body) + 4 * len(str(program.call))


def _candidates(program: Program) -> Iterator[Program]:
    """Yield shorter programs, those that might leave out most first."""
    yield from _simpler_calls(program)
    for k, line in enumerate(program.lines):
        for name in ("x", *program.states, *(other.name for other in program.lines[:k])):
            yield _without_line(program, k, name)
        if line.changes:
            for j in range(len(line.changes)):
                changes = line.changes[:j] + line.changes[j + 1 :]
                yield _with_lines(program, {k: replace(line, changes=changes)})
        if not line.changes and len(re.findall(rf"\b{line.name}\b", program.body)) == 2:
            yield _without_line(program, k, f"({line.text})")
    for k, state in enumerate(program.states):
        if program.results[k] != state:
            yield _with_results(program, k, state)
        if len(program.states) > 1:
            yield from _without_state(program, k)
    for k in range(len(program.results)):
        for text in _parts(program.results[k]):
            yield _with_results(program, k, text)
    for k, line in enumerate(program.lines):
        for text in _parts(line.text):
            yield _with_lines(program, {k: replace(line, text=text)})


def _simpler_calls(program: Program) -> Iterator[Program]:
    default, call = Call(), program.call
    for field in fields(Call):
        new: Any = getattr(default, field.name)
        if getattr(call, field.name) != new:
            yield replace(program, call=replace(call, **{field.name: new}))
    if call.time > 1:
        yield replace(program, call=replace(call, time=1))
    if call.batch > 1:
        yield replace(program, call=replace(call, batch=1))


def _without_line(program: Program, k: int, new: str) -> Program:
    """Use another variable, or an expression, instead of the variable of a line."""
    old = program.lines[k].name

    def renamed(text: str) -> str:
        return re.sub(rf"\b{old}\b", lambda _: new, text)

    lines = [
        Line(line.name, renamed(line.text), tuple(map(renamed, line.changes)))
        for j, line in enumerate(program.lines)
        if j != k
    ]
    return without_unused(replace(program, lines=tuple(lines), results=tuple(map(renamed, program.results))))


def _with_lines(program: Program, new: dict[int, Line]) -> Program:
    lines = tuple(new.get(k, line) for k, line in enumerate(program.lines))
    return without_unused(replace(program, lines=lines))


def _with_results(program: Program, k: int, text: str) -> Program:
    results = (*program.results[:k], text, *program.results[k + 1 :])
    return without_unused(replace(program, results=results))


def _without_state(program: Program, k: int) -> Iterator[Program]:
    """Leave out a state that nothing else reads."""
    name = list(program.states)[k]
    states = {other: size for other, size in program.states.items() if other != name}
    results = program.results[:k] + program.results[k + 1 :]
    smaller = without_unused(replace(program, states=states, results=results))
    if not re.search(rf"\b{name}\b", smaller.body):
        yield smaller


def _parts(text: str) -> list[str]:
    """Return an expression with one of its parts replaced by a part of that part."""
    tree = ast.parse(text, mode="eval")
    shorter = []
    for position, node in enumerate(ast.walk(tree)):
        if not isinstance(node, ast.expr) or isinstance(node, (ast.Constant, ast.Name)):
            continue
        parts = [part for part in ast.walk(node) if isinstance(part, ast.expr) and part is not node]
        for part in parts[:6]:
            new = copy.deepcopy(tree)
            target = next(other for k, other in enumerate(ast.walk(new)) if k == position)
            shorter.append(ast.unparse(_Replace(target, copy.deepcopy(part)).visit(new)))
    return sorted({text for text in shorter if text != ast.unparse(tree)}, key=lambda t: (len(t), t))


class _Replace(ast.NodeTransformer):
    """Replace one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        result: ast.AST = self.new if node is self.old else super().visit(node)
        return result
