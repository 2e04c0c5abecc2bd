"""Random steps out of the whole vocabulary, native against reference: each a program of its own, compiled.

Every program is captured, split and written as C++ as any user's step is; what is saved is only the
compiler's effort (``batch``). Of a program that fails, operations are left out as long as it fails.
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
from helpers.layer_pairs import NEEDS_COMPILER, assert_as_near, team, tensors, with_gradients
from helpers.step_batch import Batch
from helpers.step_operations import ANY, JUMPING, PAIRS, PRODUCTS, Get, cell_of, fit

pytestmark = NEEDS_COMPILER

MANY, WIDEST = 100, 12  # programs of a test; columns of a value


@dataclass(frozen=True)
class Program:
    """A random step and what it is run on.

    Attributes:
        input, hidden, states: sizes; the first state is the output.
        operations: a name of the vocabulary, and which earlier values it takes.
        ends: for each state, how it is made of which value.
        dtype: torch's name of it.
        time, batch, threads, layout, bidirectional, stateful, lengths: of the run.
    """

    input: int
    hidden: int
    states: tuple[int, ...]
    operations: tuple[tuple[str, int, int], ...]
    ends: tuple[tuple[str, int], ...]
    dtype: str
    time: int
    batch: int
    threads: int
    layout: str
    bidirectional: bool
    stateful: bool
    lengths: bool


NAMES = [
    *ANY,
    *(f"jump: {name}" for name in JUMPING),
    *(f"pair: {name}" for name in PAIRS for _ in range(2)),
    *(f"product: {name}" for name in PRODUCTS for _ in range(2)),
]
ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda value, old: torch.tanh(value),
    "softsign": lambda value, old: value / (1 + value.abs()),
    "leak": lambda value, old: 0.5 * old + 0.5 * torch.sin(value),
    "gate": lambda value, old: torch.lerp(old, torch.cos(value), torch.sigmoid(old)),
    "whole": lambda value, old: torch.nn.functional.hardtanh(value, -2, 2),
}
RAW = ("as-it-was", "another", "input")  # a state that is an input of the step, unchanged


def drawn(rng: random.Random, longest: int) -> Program:
    """A program of so many operations at most."""

    def end() -> tuple[str, int]:
        return rng.choice([*ENDS, *ENDS, *RAW]), rng.randrange(20)

    return Program(
        input=rng.randint(1, 5),
        hidden=rng.randint(1, 9),
        states=tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3))),
        operations=tuple(
            (rng.choice(NAMES), rng.randrange(20), rng.randrange(20)) for _ in range(rng.randint(2, longest))
        ),
        ends=(end(), end(), end()),
        dtype=rng.choice(["float64", "float32"]),
        time=rng.randint(1, 4),
        batch=rng.choice([1, 2, 3, 5, 7, 17]),
        threads=rng.randint(1, 3),
        layout=rng.choice(["dense", "batch-first", "every-other", "expanded"]),
        bidirectional=rng.random() < 0.3,
        stateful=rng.random() < 0.5,
        lengths=rng.random() < 0.3,
    )


def step(program: Program, x: Tensor, old: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
    """The step that a program is."""
    a = linear(x, get(program.hidden, program.input), get(program.hidden))
    b = linear(old[0], get(program.hidden, program.states[0]))
    values = [a + b, x, *old]
    for name, i, j in program.operations:
        family, _, operation = name.partition(": ")
        first, second = values[-1 - i % len(values)], values[-1 - j % len(values)]
        if family == "pair":
            value = PAIRS[operation](first, fit(second, first.shape[1]))
        elif family == "product":
            value = PRODUCTS[operation](first, get)
        else:
            value = JUMPING[operation](first) if family == "jump" else ANY[name](first)
        values.append(value[:, :WIDEST] if value.shape[1] > WIDEST else value)
    new = []
    for k, (how, number) in zip(range(len(old)), program.ends, strict=False):
        width = program.states[k]
        if how in ENDS:
            new.append(ENDS[how](fit(values[-1 - number % len(values)], width), old[k]))
        else:
            new.append(
                old[k] if how == "as-it-was" else fit(x if how == "input" else old[number % len(old)], width)
            )
    return tuple(new)


class Case:
    """A layer of a program, with its input."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.dtype: torch.dtype = getattr(torch, program.dtype)
        cell = cell_of(functools.partial(step, program), program.input, program.states)
        self.layer = ur.Recurrent(
            cell, program.input, program.hidden, bidirectional=program.bidirectional, dtype=self.dtype
        )

    def fill(self) -> None:
        """Draw parameters, input, states and lengths, and the weights of the results."""
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
        lanes = 1 + program.bidirectional
        self.state = [torch.randn(batch, lanes, n, dtype=dtype).requires_grad_() for n in program.states]
        self.lengths = torch.randint(1, time + 1, (batch,))
        self.lengths[0] = time
        self.leaves = [self.base, *self.state, *self.layer.parameters()]
        self.weights = [torch.randn_like(value) for value in self.values()]

    def values(self) -> list[Tensor]:
        """Outputs and final states."""
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

    def all(self) -> list[Tensor]:
        """Outputs, final states and every gradient."""
        return with_gradients(self.values(), self.weights, self.leaves)

    def exact(self) -> list[Tensor]:
        """The same in float64."""
        twin = copy.copy(self)
        twin.layer = copy.deepcopy(self.layer).double()
        twin.base, *twin.state = (
            value.detach().double().requires_grad_() for value in (self.base, *self.state)
        )
        twin.leaves = [twin.base, *twin.state, *twin.layer.parameters()]
        twin.weights = [weight.double() for weight in self.weights]
        return twin.all()


def check(case: Case) -> None:
    """Both engines give the same numbers."""
    torch.manual_seed(1)
    with ur.engine("reference"):
        case.fill()
        expected = case.all()
    with team(case.program.threads), ur.engine("native"):
        with torch.no_grad():
            actual = case.values()
        actual += case.all()

    def twice(make: Callable[[], list[Tensor]]) -> list[Tensor]:
        with ur.engine("reference"):
            found = make()
        return [*found[: len(case.weights)], *found]

    expected = [*expected[: len(case.weights)], *expected]
    again, exact = (functools.partial(twice, make) for make in (case.all, case.exact))
    # functions are squeezed between numbers of about 1: what cancels there no change of the leaves may show
    assert_as_near(
        actual, expected, again, case.leaves, terms=0.1, exact=exact if case.dtype is torch.float32 else None
    )


def failure(program: Program, batch: Batch, case: Case | None = None) -> str | None:
    """What goes wrong with a program."""
    try:
        check(case or prepared(program, batch))
    except Exception as error:
        return f"{program}\n{type(error).__name__}: {error}"
    return None


def prepared(program: Program, batch: Batch) -> Case:
    """Its case, with its loops made."""
    case = Case(program)
    batch.prepare(case.layer._first, case.dtype)
    return case


def shortened(program: Program, batch: Batch) -> str | None:
    """The failure of the shortest program with some of its operations that fails."""
    found = failure(program, batch)
    for k in reversed(range(len(program.operations))):
        less = dataclasses.replace(program, operations=program.operations[:k] + program.operations[k + 1 :])
        told = failure(less, batch)
        if told is not None:
            program, found = less, told
    return found


def run_programs(programs: list[Program], optimize: str = "-O0") -> None:
    """Compile and run programs; what fails is told with its shortest form."""
    cases: list[Case | None] = []
    with Batch(optimize) as batch:
        for program in programs:
            try:
                cases.append(prepared(program, batch))
            except Exception:  # told below
                cases.append(None)
            if len(cases) % 40 == 0:
                batch.start()
        batch.finish()
        assert len(batch.sources) > 2 * len(programs)  # so the programs are different ones
        pairs = zip(programs, cases, strict=True)
        failed = [program for program, case in pairs if failure(program, batch, case) is not None]
        told = [shortened(program, batch) for program in failed[:3]]
    assert not failed, "\n\n".join(map(str, [f"{len(failed)} of {len(programs)} programs fail", *told]))


def some(number: int, many: int, longest: int) -> list[Program]:
    """Programs of a seed."""
    rng = random.Random(number)
    return [drawn(rng, longest) for _ in range(many)]


def test_random_steps() -> None:
    run_programs(some(0, MANY, longest=5))


def test_what_has_failed_once() -> None:
    """Views with no columns, constants among computed columns, numbers and products that are read outside the
    loop or by the backward, a product of one column, truth values that the loop keeps, constant matrices
    turned around, the carries of unequal lengths, two steps of rows that threads share, a difference that
    rounding hides, a gradient of zeros that the forward computes too, a result of lerp that is laid out as
    its transposed input."""
    lines = (Path(__file__).parent / "random_steps_that_failed.txt").read_text().splitlines()
    run_programs([Program(*ast.literal_eval(line)) for line in lines])


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(100, 200))
def test_ten_thousand_random_steps(number: int) -> None:
    run_programs(some(number, 100, longest=12), optimize="-O1")
