"""The native engine's vector functions, compared with libm in higher precision by a C++ program.

By default, the arguments are every 1009th float32 bit pattern, special values and random numbers.
``pytest -m exhaustive`` compares all bit patterns, which takes some minutes per function.
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

from unrolled.engines.native.cpp_ops import CPP
from unrolled.engines.native.operations import OPERATIONS
from unrolled.engines.native.toolchain.compiler import FLAGS, NATIVE, NoCompilerError, compilers
from unrolled.engines.native.toolchain.cpp_files import INCLUDE

PROGRAM = Path(__file__).with_name("vector_math.cpp")
NOT_COMPARED = ("absolute", "round_to_float")  # covered by the tests of steps, as are other expressions
TEXTS = {target: CPP.spell(one, ["{0}", "{1}", "{2}"]) for target, one in OPERATIONS.items()}
FUNCTIONS = {
    match[1]: text
    for text in TEXTS.values()
    if (match := re.fullmatch(r"(\w+)\(\{0\}(, \{1\})?\)", text)) and match[1] not in NOT_COMPARED
}
FUNCTIONS |= {name: TEXTS[getattr(torch.ops.aten, name).default] for name in ("rsqrt", "reciprocal")}
UNARY = [name for name, text in FUNCTIONS.items() if "{1}" not in text]
BINARY = [name for name, text in FUNCTIONS.items() if "{1}" in text]
MACROS = [  # compiler arguments
    f"-D{macro}=" + " ".join(f"X({name}, {FUNCTIONS[name].format('a', 'b')})" for name in names)
    for macro, names in {"UNARY": UNARY, "BINARY": BINARY}.items()
]
EXACT = {"sqrt", "relu", "sign", "floor", "ceil", "round", "trunc", "reciprocal", "fmod", "remainder"}
EXACT |= {"maximum", "minimum"}
IN_FLOAT64 = ("exp", "expm1", "sigmoid", "tanh")  # the other functions call libm in float64


def instruction_sets() -> dict[str, list[str]]:
    """Return the instruction sets that this machine supports, and the compiler flags that select them."""
    archs, compiler = {"native": NATIVE}, next(compilers())
    if platform.machine() in ("x86_64", "AMD64"):
        archs["baseline"] = "x86-64"
        if torch.cpu._is_avx2_supported():
            archs["avx2"] = "x86-64-v3"
    return {name: [compiler.arch_flag(arch)] for name, arch in archs.items()}


@dataclass
class Comparison:
    """The result for one function and one instruction set.

    Attributes:
        function: Name of the function.
        instruction_set: Name of the instruction set.
        error: The largest error, in units in the last place.
        error_at: Its arguments.
        wrong: Number of wrong special results: NaN, infinity or the sign of a zero.
        wrong_at: The arguments of the first of these.
        lane_dependent: Number of arguments whose result has other bits in another lane.
    """

    function: str
    instruction_set: str
    error: float
    error_at: tuple[float, float]
    wrong: int
    wrong_at: tuple[float, float]
    lane_dependent: int


@dataclass
class Programs:
    """The compiled comparison programs, in a folder."""

    folder: Path

    def build(self, scalar: str) -> Path:
        """Return the program for a scalar type. It is compiled at the first call."""
        program = self.folder / scalar
        if not program.exists():
            objects = []
            for name, flags in instruction_sets().items():
                objects.append(str(self.folder / f"{scalar}-{name}.o"))
                self._run(f"-DKERNEL={name}", f"-DTYPE={scalar}", *flags, "-c", "-o", objects[-1])
            kernels = " ".join(f"X({name})" for name in instruction_sets())
            self._run(f"-DKERNELS={kernels}", f"-DTYPE={scalar}", *objects, "-o", str(program))
        return program

    def library(self) -> ctypes.CDLL:
        """Return the float32 functions for this machine's own instruction set."""
        path = self.folder / "kernel.so"
        self._run("-DKERNEL=kernel", "-shared", *instruction_sets()["native"], "-o", str(path))
        return ctypes.CDLL(str(path))

    def _run(self, *arguments: str) -> None:
        line = [*next(compilers()).command, *FLAGS]
        done = subprocess.run(
            [*line, "-I", str(INCLUDE), *MACROS, str(PROGRAM), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def compare(self, scalar: str, function: str, stride: int, random: int) -> list[Comparison]:
        """Compare a function for every ``stride``-th bit pattern and for ``random`` random arguments."""
        command = [str(self.build(scalar)), function, "0", "1", str(stride), str(random)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        comparisons = []
        for name, instruction_set, error, *rest in map(str.split, text.splitlines()):
            x, y, wrong_x, wrong_y = (float.fromhex(rest[k]) for k in (0, 1, 3, 4))
            wrong, lane_dependent = int(rest[2]), int(rest[5])
            comparisons.append(
                Comparison(
                    name, instruction_set, float(error), (x, y), wrong, (wrong_x, wrong_y), lane_dependent
                )
            )
        assert {comparison.instruction_set for comparison in comparisons} == set(instruction_sets())
        return comparisons


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    try:
        next(compilers())
    except NoCompilerError as error:
        pytest.skip(str(error))
    return Programs(tmp_path_factory.mktemp("functions"))


def check(comparisons: list[Comparison]) -> None:
    for comparison in comparisons:
        assert comparison.wrong == 0, f"NaN, infinity or the sign of a zero differs from libm: {comparison}"
        assert comparison.error <= (0.5 if comparison.function in EXACT else 2), comparison
        assert comparison.lane_dependent == 0, f"bits depend on the lane: {comparison}"


@pytest.mark.slow
@pytest.mark.parametrize("function", [*UNARY, *BINARY])
def test_float32_is_within_two_units(programs: Programs, function: str) -> None:
    check(programs.compare("float", function, stride=1009, random=200_000))


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", UNARY)
def test_every_float32_is_within_two_units(programs: Programs, function: str) -> None:
    comparisons = programs.compare("float", function, stride=1, random=0)
    print("\n", "; ".join(f"{c.instruction_set} {c.error}" for c in comparisons), end=" ")
    check(comparisons)


@pytest.mark.slow
@pytest.mark.parametrize("function", [*IN_FLOAT64, *sorted(EXACT)])
def test_float64_is_within_two_units(programs: Programs, function: str) -> None:
    """Compared with ``long double``, if it is more precise."""
    if torch.finfo(torch.float64).bits == 8 * ctypes.sizeof(ctypes.c_longdouble):
        pytest.skip("long double is float64 on this machine")
    check(programs.compare("double", function, stride=2**44 + 1, random=400_000))


@pytest.mark.slow
def test_special_values_are_those_of_torch(programs: Programs) -> None:
    numbers = [0.0, 1e-45, 1e-40, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 100.0, 3e38, torch.inf]
    specials = torch.tensor([*numbers, *(-n for n in numbers), torch.nan])
    kernel = programs.library().kernel
    for number, function in enumerate([*UNARY, *BINARY]):
        x = specials
        if function in BINARY:
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
            known &= (x != 0) | (y != 0)  # for two zeros, the sign of torch's result depends on the lane
        assert torch.equal(actual.signbit()[known], truth.signbit()[known]), function
        torch.testing.assert_close(actual, truth, rtol=3e-7, atol=0, equal_nan=True, msg=function)
