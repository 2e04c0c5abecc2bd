"""The vector functions of the native engine against libm in more digits: by a program made of their header.

A strided sweep of the float32 bit patterns, all specials and random arguments runs always; all bit patterns,
some minutes a function, with ``pytest -m exhaustive``.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from unrolled.engines.native.cpp_ops import PLAIN
from unrolled.engines.native.toolchain.compiler import FLAGS, INCLUDE, NATIVE, NoCompilerError, compilers

PROGRAM = Path(__file__).with_name("vector_math.cpp")
ONE, TWO = (
    re.findall(r"X\((\w+)\)", block)
    for block in re.findall(r"#define (?:ONE|TWO)\(X\)((?:.*\\\n)*.*)", PROGRAM.read_text())
)
EXACT = {"sqrt", "relu", "sign", "floor", "ceil", "round", "trunc", "reciprocal", "fmod", "remainder"}
EXACT |= {"maximum", "minimum"}
IN_FLOAT64 = ("exp", "expm1", "sigmoid", "tanh")  # the others are libm's there


def machines() -> dict[str, list[str]]:
    """The instruction sets that this machine runs, and the flags that choose them."""
    found, compiler = {"native": [NATIVE]}, next(compilers())
    if platform.machine() in ("x86_64", "AMD64"):
        found["baseline"] = ["x86-64"]
        if torch.cpu._is_avx2_supported():
            found["avx2"] = ["x86-64-v3"]
    return {name: [compiler.arch_flag(arch)] for name, [arch] in found.items()}


@dataclass
class Line:
    """What the program found of a function on an instruction set."""

    function: str
    machine: str
    error: float
    at: tuple[float, float]
    wrong: int
    wrong_at: tuple[float, float]
    moved: int


@dataclass
class Programs:
    folder: Path

    def compiled(self, scalar: str) -> Path:
        """The comparison for a type, built at its first use."""
        program = self.folder / scalar
        if not program.exists():
            objects = []
            for name, flags in machines().items():
                objects.append(str(self.folder / f"{scalar}-{name}.o"))
                self._run(f"-DKERNEL={name}", f"-DTYPE={scalar}", *flags, "-c", "-o", objects[-1])
            kernels = " ".join(f"X({name})" for name in machines())
            self._run(f"-DKERNELS={kernels}", f"-DTYPE={scalar}", *objects, "-o", str(program))
        return program

    def library(self) -> ctypes.CDLL:
        """The functions of float32 on this machine's own instruction set."""
        path = self.folder / "kernel.so"
        self._run("-DKERNEL=kernel", "-shared", *machines()["native"], "-o", str(path))
        return ctypes.CDLL(str(path))

    def _run(self, *arguments: str) -> None:
        line = [*next(compilers()).command, *FLAGS]
        done = subprocess.run(
            [*line, "-I", str(INCLUDE), str(PROGRAM), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def found(self, scalar: str, function: str, stride: int, random: int) -> list[Line]:
        """Compare one function over all numbers, ``stride`` bit patterns apart, and random arguments."""
        command = [str(self.compiled(scalar)), function, "0", "1", str(stride), str(random)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = []
        for name, machine, error, *rest in map(str.split, text.splitlines()):
            x, y, wrong_x, wrong_y = (float.fromhex(rest[k]) for k in (0, 1, 3, 4))
            wrong, moved = int(rest[2]), int(rest[5])
            lines.append(Line(name, machine, float(error), (x, y), wrong, (wrong_x, wrong_y), moved))
        assert {line.machine for line in lines} == set(machines())
        return lines


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    try:
        next(compilers())
    except NoCompilerError as error:
        pytest.skip(str(error))
    return Programs(tmp_path_factory.mktemp("functions"))


def check(lines: list[Line]) -> None:
    for line in lines:
        assert line.wrong == 0, f"NaN, infinity or a sign of zero is not libm's: {line}"
        assert line.error <= (0.5 if line.function in EXACT else 2), line
        assert line.moved == 0, f"a number has other bits in another lane: {line}"


@pytest.mark.parametrize("function", [*ONE, *TWO])
def test_float32_is_within_two_units(programs: Programs, function: str) -> None:
    check(programs.found("float", function, stride=1009, random=200_000))


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ONE)
def test_every_float32_is_within_two_units(programs: Programs, function: str) -> None:
    lines = programs.found("float", function, stride=1, random=0)
    print("\n", "; ".join(f"{line.machine} {line.error}" for line in lines), end=" ")
    check(lines)


@pytest.mark.parametrize("function", [*IN_FLOAT64, *sorted(EXACT)])
def test_float64_is_within_two_units(programs: Programs, function: str) -> None:
    """Against ``long double``, which must have more digits."""
    if torch.finfo(torch.float64).bits == 8 * ctypes.sizeof(ctypes.c_longdouble):
        pytest.skip("long double is float64 on this machine")
    check(programs.found("double", function, stride=2**44 + 1, random=400_000))


def test_all_functions_of_the_vocabulary_are_compared() -> None:
    called = {name for text in PLAIN.values() for name in re.findall(r"(\w+)\(", text)}
    # no arithmetic: the tests of the steps compare them
    unlike = {"splat", "truth", "where", "absolute", "sign_of"}
    assert called - unlike <= {*ONE, *TWO}


def test_specials_are_torchs(programs: Programs) -> None:
    numbers = [0.0, 1e-45, 1e-40, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 100.0, 3e38, torch.inf]
    specials = torch.tensor([*numbers, *(-n for n in numbers), torch.nan])
    kernel = programs.library().kernel
    for number, function in enumerate([*ONE, *TWO]):
        x = specials
        if function in TWO:
            x, y = (v.flatten().contiguous() for v in torch.meshgrid(x, x, indexing="ij"))
            truth = getattr(torch, function)(x.double(), y.double()).float()
        else:
            y = x
            truth = getattr(torch, function)(x.double()).float()
        actual = torch.empty_like(x)
        pointers = (ctypes.c_void_p(v.data_ptr()) for v in (actual, x, y))
        kernel(ctypes.c_int(number), *pointers, ctypes.c_long(len(x)))
        assert torch.equal(actual.isnan(), truth.isnan()), function
        known = ~truth.isnan()
        if function in ("maximum", "minimum"):
            known &= (x != 0) | (y != 0)  # of two zeros torch's own answer depends on the lane
        assert torch.equal(actual.signbit()[known], truth.signbit()[known]), function
        torch.testing.assert_close(actual, truth, rtol=3e-7, atol=0, equal_nan=True, msg=function)
