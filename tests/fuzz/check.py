"""Check the native engine and the torch operators on random cells against the reference engine."""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import unrolled as ur
from fuzz.case import Case
from fuzz.program import Program
from fuzz.rounding import SAMPLES, Noise, Results, difference
from helpers.kernel_interpreter import interpreted
from helpers.layer_pairs import use_threads
from helpers.step_batch import BatchCompiler
from unrolled.engines.compiler.source_location import COMPILER_FAULT

REFUSAL = "can't run on the native engine: "
MAX_SECONDS = 30.0  # to capture a step, and to compile a kernel
TRANSFORMS = ("vmap", "make_fx")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        status: ``passed``, ``refused`` by the compiler, ``wrong`` result, ``error`` of the native
            engine only, ``slow`` to compile, ``crashed``, or ``invalid`` if the reference engine fails, too.
        message: Why.
        capture_seconds: Processor time of the first run on the native engine, apart from the C++ compiler's.
        kernel_length: Number of characters of the longest kernel.
    """

    status: str
    message: str = ""
    capture_seconds: float = field(default=0.0, compare=False)
    kernel_length: int = field(default=0, compare=False)

    @property
    def failed(self) -> bool:
        """Whether this is a fault of the library, or of the generator."""
        return self.status not in ("passed", "refused")


class Check:
    """The comparison of the engines on one program.

    :meth:`collect` runs the program once. Its kernels are then compiled together with those of other
    programs, and :meth:`compare` runs it again.

    Args:
        program: The program.

    Attributes:
        capture_seconds: Processor time of :meth:`collect` on the native engine.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.capture_seconds = 0.0

    def collect(self) -> Outcome | None:
        """Run the program, whose kernels compute nothing yet. Return the outcome if it is decided already."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with ur.engine("reference"):
                    self._case = case = Case(self._program)
                    case.draw_weights(case.run(case.inputs))
                    case.values_and_gradients()
            except Exception as error:
                return Outcome("invalid", f"{type(error).__name__}: {error}")
            began = time.process_time()
            try:
                with ur.engine("native"):
                    self._run()
            except Exception as error:
                message = str(error)
                if isinstance(error, RuntimeError) and REFUSAL in message and COMPILER_FAULT not in message:
                    return Outcome("refused", message.split(REFUSAL)[1])
                return Outcome("error", f"{type(error).__name__}: {message}")
            self.capture_seconds = seconds = time.process_time() - began
            return (
                Outcome("slow", f"the step was captured in {seconds:.0f} s")
                if seconds > MAX_SECONDS
                else None
            )

    def _run(self) -> list[Results]:
        """Run inference, training, the torch operators and the call's transform."""
        case = self._case
        with torch.no_grad():
            inferred = case.run(case.inputs)
        trained = case.values_and_gradients()
        route = case.call.route
        transformed = case.by_route(route) if route in TRANSFORMS else []
        return [[*inferred], trained, [*case.by_operators()], [*transformed]]

    def compare(self) -> Outcome:
        """Compare the engines."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with use_threads(self._case.call.threads), ur.engine("native"):
                    results = self._run()
                message = self._difference(*results)
            except Exception as error:
                return Outcome("error", f"{type(error).__name__}: {error}")
        return Outcome("wrong", f"{message}; {self._blame()}") if message else Outcome("passed")

    def _blame(self) -> str:
        """Return which half of the compiler is wrong: the kernel IR may be right, and the C++ wrong."""
        case = self._case
        count = len(case.weights)
        try:
            with ur.engine("native"), interpreted():
                with torch.no_grad():
                    inferred = case.run(case.inputs)
                trained = case.values_and_gradients()
        except Exception as error:
            return f"the kernel IR raises {type(error).__name__}: {error}"
        names = case.names(len(trained))
        once = Reference(case, Case.values_and_gradients)
        wrong = once.difference([*inferred], names[:count], lambda results: results[:count])
        wrong = wrong or once.difference(trained, names)
        return "the kernel IR is wrong" if wrong else "the kernel IR is right"

    def _difference(
        self, inferred: Results, trained: Results, operated: Results, transformed: Results
    ) -> str:
        """Return how results differ from those of the reference engine, or an empty string."""
        case = self._case
        count, route = len(case.weights), case.call.route
        leaves = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
        names = case.names(len(trained))
        values, gradients = names[:count], names[count : count + len(leaves)]

        def operators(results: Results) -> Results:
            pairs = zip(leaves, results[count : count + len(leaves)], strict=True)
            filled = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in pairs]
            return [*results[:count][case.chosen], *filled]

        once = Reference(case, Case.values_and_gradients)
        message = once.difference(inferred, values, lambda results: results[:count])
        if message:
            return f"inference: {message}"
        message = once.difference(trained, names)
        if message:
            return message
        message = once.difference(operated, [*values[case.chosen], *gradients], operators)
        if message:
            return f"torch operators: {message}"
        if route not in TRANSFORMS:
            return ""
        twice = Reference(case, lambda case: [*case.by_route("none")])
        message = twice.difference(transformed, [*values, *(f"{name} of smaller inputs" for name in values)])
        return f"{route}: {message}" if message else ""


class Reference:
    """Results of the reference engine.

    Args:
        case: The layer and its inputs.
        run: Computes the results.
    """

    def __init__(self, case: Case, run: Callable[[Case], Results]) -> None:
        self._case, self._run = case, run

    @functools.cached_property
    def expected(self) -> Results:
        """The results."""
        with ur.engine("reference"):
            return self._run(self._case)

    @functools.cached_property
    def others(self) -> list[Results]:
        """The results in float64, and with other rounding errors."""
        with ur.engine("reference"):
            exact = self._run(self._case.in_float64())
            with Noise():
                return [exact, *(self._run(self._case) for _ in range(SAMPLES))]

    def difference(
        self, actual: Results, names: list[str], select: Callable[[Results], Results] = list
    ) -> str:
        """Return how results differ from the expected ones, or an empty string.

        Args:
            actual: The results to check.
            names: Their names.
            select: Selects the expected results among those of the reference engine.
        """
        return difference(actual, select(self.expected), names, lambda: list(map(select, self.others)))


def reason(message: str) -> str:
    """Return a refusal without names and numbers, to count the refusals for each reason."""
    message = message.split(" (")[0] if " (torch" in message or " (F." in message else message
    return re.sub(r"\d+", "N", re.sub(r"\(.*?\)", "", message)).strip()[:120]


def check(program: Program) -> Outcome:
    """Check one program."""
    with BatchCompiler() as batch:
        single = Check(program)
        outcome = single.collect()
        if outcome is None:
            batch.finish()
            outcome = single.compare()
        return outcome
