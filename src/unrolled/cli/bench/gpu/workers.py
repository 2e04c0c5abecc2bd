"""Run tasks in several processes: after an invalid memory access, a process can't use the GPU any more."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Task = dict[str, Any]
_POLL = 0.05  # seconds


@dataclass
class _Worker:
    """A process with its tasks, and the files with its output."""

    tasks: list[Task]
    process: subprocess.Popen[str]
    output: Any
    errors: Any
    results: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, command: Sequence[str], tasks: list[Task]) -> _Worker:
        output, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=errors, text=True, encoding="utf-8"
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(tasks))
            process.stdin.close()
        except BrokenPipeError:  # it has crashed: finish() returns its exit code
            pass
        return cls(tasks, process, output, errors)

    def finish(self) -> tuple[list[Any], str]:
        """Return the results of its tasks, in order, and the last line of its error output."""
        self.process.wait()
        self.output.seek(0)
        self.errors.seek(0)
        printed = [line for line in self.output if line.startswith("{") and line.endswith("}\n")]
        results = [json.loads(line) for line in printed]
        lines = self.errors.read().strip().splitlines()
        self.output.close()
        self.errors.close()
        return results, lines[-1] if lines else f"exit code {self.process.returncode}"


def run_tasks(
    tasks: Sequence[Task], processes: int, seconds: float, command: Sequence[str] = ()
) -> list[Any]:
    """Run tasks in several processes. Each process runs a list of tasks, one after another.

    If a process ends early, the task that it was running has failed, and a new process runs the rest.

    Args:
        tasks: The tasks, as data for JSON.
        processes: Maximum number of processes at a time.
        seconds: Time limit of all tasks together.
        command: A program that reads a list of tasks from its input, and prints a line with a JSON object for
            each. By default, ``worker.py`` in this folder.

    Returns:
        The results of each task, as a dictionary. If the task failed, ``problem`` is the reason.
    """
    command = command or [sys.executable, "-m", "unrolled.cli.bench.gpu.worker"]
    deadline, results = time.monotonic() + seconds, list[Any]([None] * len(tasks))
    shares = [list(range(first, len(tasks), processes)) for first in range(min(processes, len(tasks)))]
    running = [(share, _Worker.start(command, [tasks[k] for k in share])) for share in shares]
    while running:
        share, worker = running.pop(0)
        if worker.process.poll() is None and time.monotonic() < deadline:
            running.append((share, worker))
            time.sleep(_POLL)
            continue
        is_late = worker.process.poll() is None
        if is_late:
            worker.process.kill()
        done, message = worker.finish()
        for index, result in zip(share, done, strict=False):
            results[index] = result
        rest = share[len(done) :]
        if rest and is_late:
            for index in rest:
                results[index] = {"problem": f"no result within {seconds:.0f} s"}
        elif rest:
            results[rest[0]] = {"problem": message}
            if rest[1:]:
                running.append((rest[1:], _Worker.start(command, [tasks[k] for k in rest[1:]])))
    return results
