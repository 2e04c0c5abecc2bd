"""Random steps out of the whole vocabulary, native against reference: each a program of its own, compiled.

Hypothesis draws the programs, twice from the same seed: first they are captured and their loops compiled
together (``batch``), then each is run, forward and backward, and a failing one is shrunk. Every program is
captured, split and written as C++ as any user's step is; what is saved is only the compiler's effort.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

import unrolled as ur
from batch import Batch
from kinds import TOLERANCE, tensors
from unrolled.engines import native
from unrolled.engines.native import loop
from vocabulary import ANY, JUMPING, PAIRS, PRODUCTS, Get, fit

MANY, WIDEST = 110, 12  # programs of a test; columns of a value


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


def drawn(longest: int) -> st.SearchStrategy[Program]:
    """Programs of so many operations at most."""
    number = st.integers(0, 20)
    states = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
    ends = st.tuples(st.sampled_from([*ENDS, *ENDS, *RAW]), number)
    return st.builds(
        Program,
        input=st.integers(1, 5),
        hidden=st.integers(1, 9),
        states=states,
        operations=st.lists(
            st.tuples(st.sampled_from(NAMES), number, number), min_size=2, max_size=longest
        ).map(tuple),
        ends=st.tuples(ends, ends, ends),
        dtype=st.sampled_from(["float64", "float32"]),
        time=st.integers(1, 4),
        batch=st.sampled_from([1, 2, 3, 5, 7, 17]),
        threads=st.integers(1, 3),
        layout=st.sampled_from(["dense", "batch-first", "every-other", "expanded"]),
        bidirectional=st.sampled_from([False, False, True]),
        stateful=st.booleans(),
        lengths=st.sampled_from([False, False, True]),
    )


def run_step(program: Program, x: Tensor, old: tuple[Tensor, ...], get: Get) -> tuple[Tensor, ...]:
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


class Shapes:
    """Gives tensors of any shape, and remembers which."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *shape: int) -> Tensor:
        self.shapes.append(shape)
        return torch.zeros(shape)


def cell_of(program: Program) -> type[ur.Cell]:
    """The cell that a program is the step of."""
    seen = Shapes()
    run_step(program, torch.ones(2, program.input), tuple(torch.ones(2, n) for n in program.states), seen)
    params = [f"p{k}" for k in range(len(seen.shapes))]
    states = {f"s{k}": width for k, width in enumerate(program.states)}

    def step(self: Any, x: Tensor, *old: Tensor) -> tuple[Tensor, ...]:
        given = iter([getattr(self, name) for name in params])
        return run_step(program, x, old, lambda *_: next(given))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = [inspect.Parameter(name, kind) for name in ("self", "x", *states)]
    step.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    declared = {name: ur.Param(*shape) for name, shape in zip(params, seen.shapes, strict=True)}
    return type("Random", (ur.Cell,), {"state": states, "step": step, **declared})


@contextmanager
def team(threads: int) -> Iterator[None]:
    """So many threads, for the smallest work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("_WORTH", "_WORTH_BY_ROWS"):
            patch.setattr(loop, limit, 0, raising=False)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class Case:
    """A layer of a program, with its input."""

    def __init__(self, program: Program) -> None:
        self.program = program
        dtype = getattr(torch, program.dtype)
        self.layer = ur.Recurrent(
            cell_of(program), program.input, program.hidden, bidirectional=program.bidirectional, dtype=dtype
        )
        if program.bidirectional:  # its second layer's input would be of another size, but there is one layer
            assert self.layer.num_layers == 1

    def fill(self) -> None:
        """Draw parameters, input and states."""
        program, layer = self.program, self.layer
        for param in layer.parameters():
            nn.init.normal_(param, 0, 0.5)
        dtype = next(layer.parameters()).dtype
        time, batch, features = program.time, program.batch, program.input
        shape = {
            "dense": (time, batch, features),
            "batch-first": (batch, time, features),
            "every-other": (2 * time, 2 * batch, 2 * features),
            "expanded": (time, 1, features),
        }[program.layout]
        self.base = torch.randn(shape, dtype=dtype).requires_grad_()
        lanes = 1 + program.bidirectional
        sizes = layer._first.state_sizes().values()
        self.state = [torch.randn(batch, lanes, size, dtype=dtype).requires_grad_() for size in sizes]
        self.lengths = torch.randint(1, time + 1, (batch,))
        self.lengths[0] = time
        self.weights: list[Tensor] = []

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
        state: Any = tuple(part.transpose(0, 1) for part in self.state) if program.stateful else None
        state = state[0] if state is not None and len(state) == 1 else state
        if program.lengths:
            x = nn.utils.rnn.pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return list(tensors(self.layer(x, state)))

    def all(self) -> list[Tensor]:
        """Outputs, final states and every gradient; zeros where there is none."""
        values = self.values()
        if not self.weights:
            self.weights = [torch.randn_like(value) for value in values]
        loss = sum((value * weight).sum() for value, weight in zip(values, self.weights, strict=True))
        leaves = [self.base, *self.state, *self.layer.parameters()]
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return values
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        made = [
            torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)
        ]
        return [*(value.detach() for value in values), *made]

    def noise(self, expected: list[Tensor]) -> list[float]:
        """How far the reference moves when all that it is given moves by some units in the last place."""
        leaves = [self.base, *self.state, *self.layer.parameters()]
        kept = [leaf.detach().clone() for leaf in leaves]
        moved = [0.0] * len(expected)
        for _ in range(3):
            with torch.no_grad():
                for leaf, value in zip(leaves, kept, strict=True):
                    leaf.copy_(value * (1 + 4 * torch.finfo(value.dtype).eps * torch.randn_like(value)))
            for k, (a, b) in enumerate(zip(self.all(), expected, strict=True)):
                moved[k] = max(moved[k], largest(a - b))
        with torch.no_grad():
            for leaf, value in zip(leaves, kept, strict=True):
                leaf.copy_(value)
        return moved


def largest(value: Tensor) -> float:
    return float(value.detach().double().abs().max()) if value.numel() else 0.0


def check(case: Case) -> None:
    """Both engines give the same numbers: to the tolerance, or as near as the step's own condition allows."""
    case.fill()
    expected = case.all()
    tolerance = TOLERANCE[expected[0].dtype]
    with team(case.program.threads), ur.engine("native"):
        with torch.no_grad():
            actual = case.values()
        trained = case.all()
    pairs = [*zip(actual, expected, strict=False), *zip(trained, expected, strict=True)]
    errors = [largest(a - b) for a, b in pairs]
    allowed = [tolerance * max(largest(b), 1e-30) for _, b in pairs]
    if all(error <= most for error, most in zip(errors, allowed, strict=True)):
        return
    noise = case.noise(expected)
    noise = [*noise[: len(actual)], *noise]
    for k, (error, most, moved) in enumerate(zip(errors, allowed, noise, strict=True)):
        assert error <= most + 20 * moved, (k, error, most, moved)


def run_programs(longest: int, number: int, many: int, optimize: str = "-O0") -> None:
    """Draw, compile and run programs."""
    cases: dict[Program, Case] = {}
    options: dict[str, Any] = {
        "max_examples": many,
        "database": None,
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
    }

    def prepared(program: Program) -> Case:
        if program not in cases:
            case = cases[program] = Case(program)
            compiled = native.compiled(case.layer._first, getattr(torch, program.dtype))
            compiled.prepare_training()
        return cases[program]

    with Batch(optimize) as batch:

        @seed(number)
        @settings(**options, phases=[Phase.generate])
        @given(drawn(longest))
        def collect(program: Program) -> None:
            prepared(program)
            if len(cases) % 40 == 0:
                batch.start()

        @seed(number)
        @settings(**options, phases=[Phase.generate, Phase.shrink])
        @given(drawn(longest))
        def compare(program: Program) -> None:
            case = prepared(program)
            batch.finish()
            check(case)

        collect()
        assert len(cases) >= many - 5
        assert len(batch.sources) > 2 * many  # so the programs are different ones
        compare()


@pytest.mark.parametrize("number", range(5))
def test_random_steps(number: int) -> None:
    run_programs(longest=7, number=number, many=MANY)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(100, 200))
def test_ten_thousand_random_steps(number: int) -> None:
    run_programs(longest=12, number=number, many=100, optimize="-O1")
