"""Worker processes that check programs, so that a crash ends only a worker."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(TESTS)

from fuzz.builder import Line  # noqa: E402
from fuzz.check import MAX_SECONDS, Check, Outcome  # noqa: E402
from fuzz.program import Call, Program  # noqa: E402
from helpers.step_batch import BatchCompiler  # noqa: E402

TIMEOUT = 180  # seconds for one program
TIMEOUT_OF_ALL = 900  # seconds for the compilation of all kernels, also on a busy machine
USUAL_SECONDS = 6  # to compile the kernels of a program
LIFETIME = 400  # programs that a worker checks before a new one replaces it


class Worker:
    """A worker process.

    Args:
        optimize: Optimization flag of the C++ compiler.
        environment: Environment variables of the process.
    """

    def __init__(self, optimize: str = "-O0", environment: dict[str, str] | None = None) -> None:
        self._optimize = optimize
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._checked = 0
        self._output = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_all(self, programs: Sequence[Program]) -> list[Outcome]:
        """Check programs. One that ends the process is ``crashed``, and one that takes too long ``slow``."""
        outcomes: dict[int, Outcome] = {}
        while left := [k for k in range(len(programs)) if k not in outcomes]:
            try:
                self._check(programs, left, outcomes)
            except _EndedError as error:
                self.close()
                if error.program is not None:
                    outcomes[error.program] = error.outcome
                elif len(left) == 1:
                    outcomes[left[0]] = error.outcome
                else:  # while the kernels of all of them were compiled
                    for k in left:
                        [outcomes[k]] = self.check_all([programs[k]])
        return [outcomes[k] for k in range(len(programs))]

    def _check(self, programs: Sequence[Program], left: list[int], outcomes: dict[int, Outcome]) -> None:
        """Check the programs that are left."""
        process = self._start()
        assert process.stdin is not None
        process.stdin.write(f"{json.dumps([repr(programs[k]) for k in left])}\n".encode())
        process.stdin.flush()
        current: int | None = None
        while (message := self._read(current)) != "end":
            current = None if message["program"] is None else left[message["program"]]
            if current is not None and "status" in message:
                del message["program"]
                outcomes[current] = Outcome(**message)
        self._checked += len(left)
        if self._checked > LIFETIME:
            self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, __file__, self._optimize]
            self._log = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=self._environment,
            )
            self._checked, self._output = 0, b""
        return self._process

    def _read(self, program: int | None) -> Any:
        """Return the next message of the process.

        Raises:
            _EndedError: If the process ended or takes too long.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        while b"\n" not in self._output:
            timeout = TIMEOUT_OF_ALL if program is None else TIMEOUT
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                raise _EndedError(program, Outcome("slow", f"no result after {timeout} s"))
            text = os.read(self._process.stdout.fileno(), 65536)
            if not text:
                raise _EndedError(program, Outcome("crashed", self._why()))
            self._output += text
        line, self._output = self._output.split(b"\n", 1)
        return json.loads(line)

    def _why(self) -> str:
        """Return how the process ended."""
        assert self._process is not None
        code = self._process.wait()
        self._log.seek(0)
        errors = self._log.read().decode(errors="replace").strip()
        report = next(
            (line for line in errors.splitlines() if "ERROR: " in line or "runtime error" in line), ""
        )
        return f"the process ended with code {code}. {report or errors[-300:]}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._log.close()
            self._process = None


class _EndedError(Exception):
    """The process ended, or was too slow, while it ran a program (None: while it compiled kernels)."""

    def __init__(self, program: int | None, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.program, self.outcome = program, outcome


def _seconds_of_compilers() -> float:
    """Return the processor time of all compilers so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _serve(optimize: str) -> None:
    """Check the programs of each line of stdin, and print a message before and after each."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may print to stdout

    def send(message: Any) -> None:
        print(json.dumps(message), file=output, flush=True)

    for line in sys.stdin:
        programs: list[Program] = [
            eval(text, {"Program": Program, "Line": Line, "Call": Call}) for text in json.loads(line)
        ]
        with BatchCompiler(optimize) as batch:
            checks: dict[int, Check] = {}
            lengths: dict[int, int] = {}
            for k, program in enumerate(programs):
                send({"program": k})
                check = Check(program)
                known = len(batch.sources)
                outcome = check.collect()
                lengths[k] = max(map(len, list(batch.sources)[known:]), default=0)
                if outcome is None:
                    checks[k] = check
                else:
                    send({"program": k, **vars(outcome)})
            send({"program": None})
            began = _seconds_of_compilers()
            batch.finish()
            seconds = _seconds_of_compilers() - began
            if len(programs) > 1 and seconds > MAX_SECONDS + USUAL_SECONDS * len(checks):
                sys.exit(f"the kernels took {seconds:.0f} s")  # they are now compiled one by one
            for k, check in checks.items():
                send({"program": k})
                outcome = check.compare()
                if len(programs) == 1 and seconds > MAX_SECONDS:
                    outcome = Outcome("slow", f"the kernels were compiled in {seconds:.0f} s")
                measured = replace(
                    outcome, capture_seconds=round(check.capture_seconds, 2), kernel_length=lengths[k]
                )
                send({"program": k, **vars(measured)})
        send("end")


if __name__ == "__main__":
    _serve(sys.argv[1])
