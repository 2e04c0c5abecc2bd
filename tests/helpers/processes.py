"""Run Python programs in new processes that have torch already imported, which saves two seconds each.

A server process imports torch and other libraries, but not unrolled. It forks for each program. The program
has the arguments, folder, environment, module search path and warning filters that ``subprocess`` would set.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch", "torch._dynamo", "torch._decomp", "torch.export", "torch.fx.experimental.proxy_tensor",
    "numpy", "matplotlib.figure", "rich.progress", "safetensors.torch", "sklearn.linear_model",
)  # fmt: skip
# Prefixes of variables that the preloaded libraries read when they are imported.
READ_AT_IMPORT = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "MPL", "LD_")


class Process:
    """A running program. Its output goes to temporary files.

    Args:
        arguments: The arguments of ``python``.
        folder: The working directory. The current one if None.
        environment: The environment.
    """

    def __init__(self, arguments: list[str], folder: Path | None, environment: Mapping[str, str]) -> None:
        changed = {name for name, _ in {*environment.items()} - {*os.environ.items()}}
        too_late = sorted(name for name in changed if name.startswith(READ_AT_IMPORT))
        assert not too_late, f"preloaded libraries have already read {too_late}: use subprocess instead"
        self._output_folder = tempfile.TemporaryDirectory()
        self._output_files = [Path(self._output_folder.name) / name for name in ("out", "err")]
        self.arguments, self.returncode = arguments, None
        output_paths = map(str, self._output_files)
        start_arguments = [arguments, str(folder or Path.cwd()), dict(environment), *output_paths]
        self.pid: int = _request("start", start_arguments)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the program runs."""
        if self.returncode is None:
            self.returncode = _request("poll", self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Wait for the program to end, and return its stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: If it doesn't end in time. It is killed.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        out, err = (file.read_text(encoding="utf-8") for file in self._output_files)
        self._output_folder.cleanup()
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return out, err


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Process:
    """Start ``python`` with ``-c code``, ``-m module`` or a file, preceded by ``-W`` options if any."""
    return Process([str(argument) for argument in arguments], cwd, os.environ if env is None else env)


def run(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run ``python`` with some arguments and wait for it to end; see :func:`start`."""
    process = start(*arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)


# --- the server ---


@functools.cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its stdin, which ends it
    return server


def _request(*request: Any) -> Any:
    """Send a request to the server and return its answer."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> None:
    """Answer requests until stdin is closed: start a program, or poll one for its exit code."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the test process
    search_path, filters = list(sys.path[1:]), [*warnings.filters]
    while line := sys.stdin.readline():
        request, value = json.loads(line)
        if request == "start":
            answer = os.fork()
            if answer == 0:
                sys.path[:], warnings.filters[:] = search_path, filters
                _run_and_exit(*value)
        else:
            pid, status = os.waitpid(value, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def _run_and_exit(arguments: list[str], folder: str, environment: dict[str, str], *output_files: str) -> None:
    """Run a program in this forked process, and end the process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(output_files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.closerange(3, 64)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        _run_program(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _run_program(arguments: list[str]) -> None:
    """Run a program as ``python`` would with these arguments."""
    filters = [line for line in os.environ.get("PYTHONWARNINGS", "").split(",") if line]
    while arguments[0] == "-W":
        _, warning_filter, *arguments = arguments
        filters.append(warning_filter)
    warnings._processoptions(filters)  # type: ignore[attr-defined]
    kind, *rest = arguments
    script_folder = {"-c": "", "-m": os.getcwd()}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:0] = [script_folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve()
