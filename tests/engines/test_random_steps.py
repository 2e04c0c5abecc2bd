"""Random steps made of all supported operations: compare the native engine with the reference engine.

Each program goes through the same stages as a user's step; only the C++ is compiled with less optimization
(see ``helpers/step_batch.py``). If a program fails, operations are removed from it as long as it still fails.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from helpers.layer_pairs import (
    NEEDS_COMPILER,
    assert_close_within_rounding,
    tensors,
    use_threads,
    values_and_gradients,
)
from helpers.step_batch import BatchCompiler
from helpers.step_operations import BINARY, DISCONTINUOUS, PRODUCTS, UNARY, Get, cell_of, fit

pytestmark = NEEDS_COMPILER

PROGRAMS = 100  # per test
MAX_WIDTH = 12  # columns of a value


@dataclass(frozen=True)
class Program:
    """A random step, and the call that runs it.

    Attributes:
        input: Input size.
        hidden: Hidden size.
        states: Size of each state; the first state is the output.
        operations: For each operation its name, and two numbers that select its operands.
        updates: For each state the function that computes its new value, and a number to select its operand.
        dtype: Name of the dtype.
        time: Number of time steps.
        batch: Batch size.
        threads: Number of threads.
        layout: Memory layout of the input.
        bidirectional: Whether the layer is bidirectional.
        stateful: Whether an initial state is passed.
        lengths: Whether the input is a packed sequence.
    """

    input: int
    hidden: int
    states: tuple[int, ...]
    operations: tuple[tuple[str, int, int], ...]
    updates: tuple[tuple[str, int], ...]
    dtype: str
    time: int
    batch: int
    threads: int
    layout: str
    bidirectional: bool
    stateful: bool
    lengths: bool


NAMES = [
    *UNARY,
    *(f"jump: {name}" for name in DISCONTINUOUS),
    *(f"pair: {name}" for name in BINARY for _ in range(2)),
    *(f"product: {name}" for name in PRODUCTS for _ in range(2)),
]
UPDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda value, old: torch.tanh(value),
    "softsign": lambda value, old: value / (1 + value.abs()),
    "leak": lambda value, old: 0.5 * old + 0.5 * torch.sin(value),
    "gate": lambda value, old: torch.lerp(old, torch.cos(value), torch.sigmoid(old)),
    "whole": lambda value, old: torch.nn.functional.hardtanh(value, -2, 2),
}
PASSED_ON = ("as-it-was", "another", "input")  # the new state is an input of the step, unchanged


def random_program(rng: random.Random, max_operations: int) -> Program:
    """Return a random program with at most ``max_operations`` operations."""

    def update() -> tuple[str, int]:
        return rng.choice([*UPDATES, *UPDATES, *PASSED_ON]), rng.randrange(20)

    return Program(
        input=rng.randint(1, 5),
        hidden=rng.randint(1, 9),
        states=tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3))),
        operations=tuple(
            (rng.choice(NAMES), rng.randrange(20), rng.randrange(20))
            for _ in range(rng.randint(2, max_operations))
        ),
        updates=(update(), update(), update()),
        dtype=rng.choice(["float64", "float32"]),
        time=rng.randint(1, 4),
        batch=rng.choice([1, 2, 3, 5, 7, 17]),
        threads=rng.randint(1, 3),
        layout=rng.choice(["dense", "batch-first", "every-other", "expanded"]),
        bidirectional=rng.random() < 0.3,
        stateful=rng.random() < 0.5,
        lengths=rng.random() < 0.3,
    )


def step(program: Program, x: Tensor, states: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    """Run the step of a program."""
    a = linear(x, get(program.hidden, program.input), get(program.hidden))
    b = linear(states[0], get(program.hidden, program.states[0]))
    values = [a + b, x, *states]
    for name, i, j in program.operations:
        family, _, operation = name.partition(": ")
        first, second = values[-1 - i % len(values)], values[-1 - j % len(values)]
        if family == "pair":
            value = BINARY[operation](first, fit(second, first.shape[1]))
        elif family == "product":
            value = PRODUCTS[operation](first, get)
        else:
            value = DISCONTINUOUS[operation](first) if family == "jump" else UNARY[name](first)
        values.append(value[:, :MAX_WIDTH] if value.shape[1] > MAX_WIDTH else value)
    new_states = []
    for state, width, (update, number) in zip(states, program.states, program.updates, strict=False):
        if update in UPDATES:
            new_states.append(UPDATES[update](fit(values[-1 - number % len(values)], width), state))
        elif update == "as-it-was":
            new_states.append(state)
        else:
            new_states.append(fit(x if update == "input" else states[number % len(states)], width))
    return tuple(new_states)


class Case:
    """A layer for a program, with its inputs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dtype: torch.dtype = getattr(torch, program.dtype)
        cell = cell_of(functools.partial(step, program), program.input, program.states)
        self.layer = ur.Recurrent(
            cell, program.input, program.hidden, bidirectional=program.bidirectional, dtype=self.dtype
        )

    def fill(self) -> None:
        """Draw random parameters, inputs, states and lengths, and weights of the results for the loss."""
        program, dtype = self.program, self.dtype
        for param in self.layer.parameters():
            nn.init.normal_(param, 0, 0.5)
        time, batch, features = program.time, program.batch, program.input
        shape = {
            "dense": (time, batch, features),
            "batch-first": (batch, time, features),
            "every-other": (2 * time, 2 * batch, 2 * features),
            "expanded": (time, 1, features),
        }[program.layout]
        self.base = torch.randn(shape, dtype=dtype).requires_grad_()
        directions = 1 + program.bidirectional
        self.state = [torch.randn(batch, directions, n, dtype=dtype).requires_grad_() for n in program.states]
        self.lengths = torch.randint(1, time + 1, (batch,))
        self.lengths[0] = time
        self.leaves = [self.base, *self.state, *self.layer.parameters()]
        self.weights = [torch.randn_like(value) for value in self.values()]

    def values(self) -> list[Tensor]:
        """Return output and final states."""
        program = self.program
        x = self.base
        if program.layout == "batch-first":
            x = x.transpose(0, 1)
        elif program.layout == "every-other":
            x = x[::2, 1::2, ::2]
        elif program.layout == "expanded":
            x = x.expand(-1, program.batch, -1)
        state: Any = None
        if program.stateful:
            state = tuple(part.transpose(0, 1) for part in self.state)
            state = state if len(state) > 1 else state[0]
        if program.lengths:
            x = nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return list(tensors(self.layer(x, state)))

    def values_and_gradients(self) -> list[Tensor]:
        """Return output, final states and all gradients."""
        return values_and_gradients(self.values(), self.weights, self.leaves)

    def in_float64(self) -> list[Tensor]:
        """Return output, final states and all gradients, computed in float64."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).double()
        twin.base, *twin.state = (
            value.detach().double().requires_grad_() for value in (self.base, *self.state)
        )
        twin.leaves = [twin.base, *twin.state, *twin.layer.parameters()]
        twin.weights = [weight.double() for weight in self.weights]
        return twin.values_and_gradients()


def check(case: Case) -> None:
    """Check that both engines give the same numbers."""
    torch.manual_seed(1)
    with ur.engine("reference"):
        case.fill()
        expected = case.values_and_gradients()
    with use_threads(case.program.threads), ur.engine("native"):
        with torch.no_grad():
            actual = case.values()
        actual += case.values_and_gradients()

    def on_reference(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        with ur.engine("reference"):
            results = compute()
        return [*results[: len(case.weights)], *results]

    expected = [*expected[: len(case.weights)], *expected]
    recompute = functools.partial(on_reference, case.values_and_gradients)
    exact = functools.partial(on_reference, case.in_float64) if case.dtype is torch.float32 else None
    # scale: inside the step, values are about 1. Where they cancel, a change of the leaves may not show it.
    assert_close_within_rounding(actual, expected, recompute, case.leaves, scale=0.1, exact=exact)


def failure(program: Program, batch: BatchCompiler, case: Case | None = None) -> str | None:
    """Return the error message of a program, or None if it passes."""
    try:
        check(case or prepare(program, batch))
    except Exception as error:
        return f"{program}\n{type(error).__name__}: {error}"
    return None


def prepare(program: Program, batch: BatchCompiler) -> Case:
    """Return a program's case, with its kernels collected."""
    case = Case(program)
    batch.prepare(case.layer._first, case.dtype)
    return case


def shrink(program: Program, batch: BatchCompiler) -> str | None:
    """Remove operations from a program as long as it fails, and return its last error message."""
    message = failure(program, batch)
    for k in reversed(range(len(program.operations))):
        shorter = dataclasses.replace(
            program, operations=program.operations[:k] + program.operations[k + 1 :]
        )
        shorter_message = failure(shorter, batch)
        if shorter_message is not None:
            program, message = shorter, shorter_message
    return message


def run_programs(programs: list[Program], optimize: str = "-O0") -> None:
    """Compile and run programs, and report the shortest form of those that fail."""
    cases: list[Case | None] = []
    with BatchCompiler(optimize) as batch:
        for program in programs:
            try:
                cases.append(prepare(program, batch))
            except Exception:  # reported below
                cases.append(None)
            if len(cases) % 40 == 0:
                batch.start()
        batch.finish()
        assert len(batch.sources) > 2 * len(programs)  # the programs differ
        pairs = zip(programs, cases, strict=True)
        failed = [program for program, case in pairs if failure(program, batch, case) is not None]
        messages = [shrink(program, batch) for program in failed[:3]]
    assert not failed, "\n\n".join(map(str, [f"{len(failed)} of {len(programs)} programs fail", *messages]))


def random_programs(seed: int, count: int, max_operations: int) -> list[Program]:
    """Return random programs."""
    rng = random.Random(seed)
    return [random_program(rng, max_operations) for _ in range(count)]


@pytest.mark.slow
def test_random_steps() -> None:
    run_programs(random_programs(0, PROGRAMS, max_operations=5))


@pytest.mark.slow
def test_programs_that_failed_before() -> None:
    """Run programs that once failed.

    They cover views without columns, constants among computed columns, numbers and products that are read
    outside the loop or by the backward, a product with one column, bools that the loop saves, transposed
    constant matrices, carries of sequences of unequal length, threads that share rows over two steps, a
    difference hidden by rounding, a zero gradient that the forward computes too, and a result of lerp with
    the memory layout of its transposed input.
    """
    lines = (Path(__file__).parent / "random_steps_that_failed.txt").read_text().splitlines()
    run_programs([Program(*ast.literal_eval(line)) for line in lines])


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 200))
def test_ten_thousand_random_steps(seed: int) -> None:
    run_programs(random_programs(seed, 100, max_operations=12), optimize="-O1")
