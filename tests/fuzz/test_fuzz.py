"""Random cells on the native engine and as torch operators, compared with the reference engine in float64.

``python tests/fuzz/run.py`` checks more of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzz import run
from fuzz.builder import Line
from fuzz.check import Outcome, check
from fuzz.program import Call, Program, random_program
from fuzz.rounding import SAMPLES, Noise, difference
from fuzz.shrink import shrink
from fuzz.worker import Worker
from helpers.layer_pairs import NEEDS_COMPILER, NEEDS_SYSTEM_COMPILER
from helpers.sanitizers import MEMORY, UnavailableError, archs, environment
from unrolled.engines.native.operations import OPERATIONS, Operand, Splat
from unrolled.engines.native.operations import Call as FunctionCall

FAST, ALL, SANITIZED = range(20), range(20, 200), range(170, 190)
BATCH = 25


def assert_cells_pass(seeds: range, worker: Worker) -> None:
    """Check the cells of some seeds. The message shows a short version of the first one that fails."""
    programs = list(map(random_program, seeds))
    for program, outcome in zip(programs, worker.check_all(programs), strict=True):
        if outcome.failed:
            shorter, outcome = shrink(program, outcome, worker.check_all)
            pytest.fail(f"seed {program.seed}: {outcome.status}: {outcome.message}\n\n{shorter}")


@NEEDS_COMPILER
def test_random_cells() -> None:
    with Worker() as worker:
        assert_cells_pass(FAST, worker)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("start", ALL[::BATCH])
def test_more_random_cells(start: int) -> None:
    with Worker() as worker:
        assert_cells_pass(range(start, start + BATCH), worker)


@NEEDS_SYSTEM_COMPILER
@pytest.mark.slow
def test_random_cells_under_sanitizers(tmp_path: Path) -> None:
    try:
        variables = environment(MEMORY, tmp_path, archs()[-1])
    except UnavailableError as error:
        pytest.skip(str(error))
    overflowing = program_of(  # exponents of infinity, and of numbers below -1
        "linear((x.abs() + 0.1) ** 2.5 + torch.log1p(x), self.weight)",
        result="torch.tanh(v0 + s)",
        dtype="float32",
        time=7,
        batch=17,
        values="special",
    )
    with Worker(environment=variables) as worker:
        [outcome] = worker.check_all([overflowing])
        assert not outcome.failed, outcome
        assert_cells_pass(SANITIZED, worker)


def test_a_seed_repeats_a_program() -> None:
    for seed in range(10):
        assert str(random_program(seed)) == str(random_program(seed))
    assert len({random_program(seed).source for seed in range(10)}) == 10


def test_programs_differ_in_what_they_use() -> None:
    """Each option of a call, and several numbers of states, occur among 60 programs."""
    programs = list(map(random_program, range(60)))
    for name in vars(Call()):
        assert len({repr(getattr(program.call, name)) for program in programs}) > 1, name
    assert {len(program.states) for program in programs} == {1, 2, 3}


def program_of(*lines: str, result: str, **call: Any) -> Program:
    """Return a program whose lines define ``v0``, ``v1``…"""
    steps = tuple(Line(f"v{k}", text) for k, text in enumerate(lines))
    params: dict[str, tuple[int, ...]] = {"weight": (4, 3)}
    return Program(0, 3, 4, {"s": 4}, params, steps, (result,), Call(**call))


LONG = program_of(
    "linear(x, self.weight) + s",
    "torch.sigmoid(v0) * v0",
    "torch.tanh(v1) + v0.abs() * torch.cos(s)",
    "torch.where(v2 > 0, v2, 0.5 * v1)",
    result="torch.tanh(v3) + 0.1 * v2",
    dtype="float32",
    time=4,
    batch=5,
    layout="strided",
    initial_state="given",
)


WRONG_ABS = FunctionCall("absolute", (Operand(0),)) * Splat("1.001f")


def check_all(programs: Sequence[Program]) -> list[Outcome]:
    return [check(program) for program in programs]


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step whose compiled abs is 0.1 % too large."""
    assert check(LONG) == Outcome("passed")
    monkeypatch.setitem(OPERATIONS, torch.ops.aten.abs.default, WRONG_ABS)
    outcome = check(LONG)
    assert outcome.status == "wrong"
    assert outcome.message.startswith("inference: result 0 is off by ")


@NEEDS_COMPILER
@pytest.mark.slow
def test_a_cell_with_a_wrong_number_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, torch.ops.aten.abs.default, WRONG_ABS)
    shorter, outcome = shrink(LONG, check(LONG), check_all)
    assert outcome.status == "wrong"
    assert ".abs()" in shorter.body
    assert len(shorter.lines) <= 1
    assert (shorter.call.layout, shorter.call.initial_state) == ("dense", "zeros")


def test_a_failing_cell_is_shortened() -> None:
    """The cell fails whenever the sine of a state meets a product and there are several time steps."""

    def fails(programs: Sequence[Program]) -> list[Outcome]:
        return [
            Outcome("wrong", "result 0 is off by 1")
            if re.search(r"sin\(.*s.*linear\(x, self.weight\)", program.body, re.DOTALL)
            and program.call.time > 1
            else Outcome("passed")
            for program in programs
        ]

    line = "torch.where(v2 > 0, torch.tanh(v2) * torch.sin(s + 1) + linear(x, self.weight), v1)"
    program = replace(LONG, lines=(*LONG.lines[:3], Line("v3", line)))
    shorter, outcome = shrink(program, Outcome("wrong", "result 0 is off by 2"), fails, max_checks=1000)
    assert outcome == Outcome("wrong", "result 0 is off by 1")
    assert shorter.body == "return torch.sin(s) + linear(x, self.weight)"
    assert str(shorter.call) == "Call()"


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_crash_ends_only_its_worker() -> None:
    crashing = program_of("__import__('os').abort()", result="v0 + x")
    refused = program_of("torch.poisson(x.abs())", result="s + v0.sum()")
    with Worker() as worker:
        outcomes = worker.check_all([refused, crashing, program_of(result="torch.sin(s)")])
    assert [outcome.status for outcome in outcomes] == ["refused", "crashed", "passed"]
    assert "code -6" in outcomes[1].message


@NEEDS_COMPILER
def test_the_command_continues_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    records = [{"seed": seed, "commit": "1234567", "status": "passed", "message": ""} for seed in range(4)]
    results.write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"seed": 4, "comm')
    assert run.main(["--seeds", "1:4", "--results", str(results)]) == 0
    assert "3 tried: 3 passed" in capsys.readouterr().out
    assert results.read_text().count("\n") == 4


VALUES = torch.tensor([[1.0, 2.0, 4.0], [1e-3, 2e-3, 4e-3]])


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (VALUES * (1 + 1e-6), ""),
        (VALUES + torch.tensor([[0.0], [1e-6]]), "result is off by 1.00e-06 of 4.00e-03"),
        (torch.where(VALUES == 2, float("nan"), VALUES), "result has nan, expected 2"),
        (torch.where(VALUES == 2, float("inf"), VALUES), "result has inf, expected 2"),
        (VALUES.double(), "result is a float64 tensor"),
        (VALUES[:1], "result is a float32 tensor of shape (1, 3), expected a float32 tensor of shape (2, 3)"),
        (None, "result is None, expected a float32 tensor"),
    ],
)
def test_differences(actual: torch.Tensor | None, message: str) -> None:
    found = difference([actual], [VALUES], ["result"], lambda: [[VALUES.double()], [VALUES]])
    assert found.startswith(message)
    assert bool(found) == bool(message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_a_rounding_error(dtype: torch.dtype) -> None:
    x = torch.rand(1000, dtype=dtype) + 1
    with Noise():
        change = (x.exp().log() - x).abs()
        assert torch.equal(x * 0 + 0.5, torch.full_like(x, 0.5))  # short numbers stay exact
        large = x * 0.3e30
    assert 0 < change.max() < 8 * torch.finfo(dtype).eps
    assert 0 < (large - x * 0.3e30).abs().max() < 0.3e30 * 8 * torch.finfo(dtype).eps


def test_noise_reaches_differences_from_the_mean() -> None:
    """The normalized values of equal numbers are 0, or what rounding leaves of x * scale - mean * scale."""
    x = torch.tensor([[1.5, 1.5, 2.5, 2.5]])
    found = set()
    for _ in range(8):
        with Noise():
            normalized = torch.nn.functional.group_norm(x, 2, eps=0.1)
        assert normalized.abs().max() < 2e-6
        found.update(normalized.sign().flatten().tolist())
    assert {-1.0, 1.0} <= found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_explains_a_difference(dtype: torch.dtype) -> None:
    """Cancellation, and a jump: they turn rounding errors into large ones, in one row only."""
    x = torch.tensor([[0.1], [3.0]], dtype=dtype)

    def jumps(x: torch.Tensor) -> list[torch.Tensor | None]:
        return [torch.sign(x * 3 - 0.3) + x]

    def others() -> list[list[torch.Tensor | None]]:
        with Noise():
            return [jumps(x) for _ in range(SAMPLES)]

    def compare(change: list[list[float]]) -> str:
        [expected] = jumps(x)
        assert expected is not None
        return difference([expected + torch.tensor(change)], [expected], ["result"], others)

    assert compare([[1.0], [0.0]]) == ""
    assert compare([[0.0], [1.0]]).startswith("result is off by 1.00e+00 of 4.00e+00")
