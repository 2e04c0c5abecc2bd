"""Programs in processes of their own that find torch loaded: two seconds each that tests need not wait.

A server that has imported torch and other libraries, and nothing of unrolled, forks for each program, which
sees what ``subprocess`` would give it: arguments, folder, environment, module search path and warnings.
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

LOADED = (
    "torch", "torch._dynamo", "torch._decomp", "torch.export", "torch.fx.experimental.proxy_tensor",
    "numpy", "matplotlib.figure", "rich.progress", "safetensors.torch", "sklearn.linear_model",
)  # fmt: skip
READ_WHEN_LOADED = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TORCH", "MPL", "LD_")


class Started:
    """A program that has begun; its output goes to files."""

    def __init__(self, arguments: list[str], folder: Path | None, environment: Mapping[str, str]) -> None:
        given = {name for name, _ in {*environment.items()} - {*os.environ.items()}}
        late = sorted(name for name in given if name.startswith(READ_WHEN_LOADED))
        assert not late, f"libraries are loaded that would have read {late}: use subprocess"
        self._kept = tempfile.TemporaryDirectory()
        self._files = [Path(self._kept.name) / name for name in ("out", "err")]
        self.arguments, self.returncode = arguments, None
        order = [arguments, str(folder or Path.cwd()), dict(environment), *map(str, self._files)]
        self.pid: int = _asked("start", order)

    def poll(self) -> int | None:
        """The exit code, negative that of a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _asked("poll", self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 100) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        out, err = (file.read_text(encoding="utf-8") for file in self._files)
        self._kept.cleanup()
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return out, err


def start(*arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Started:
    """Begin ``python`` with arguments: ``-c code``, ``-m module`` or a file, and ``-W`` before those."""
    return Started([str(argument) for argument in arguments], cwd, os.environ if env is None else env)


def run(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run ``python`` with arguments to its end; see :func:`start`."""
    process = start(*arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)


# --- the server ---


@functools.cache
def _server() -> subprocess.Popen[str]:
    line = [sys.executable, __file__]
    server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # whose end is that of its input
    return server


def _asked(*request: Any) -> Any:
    """The server's answer."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{json.dumps(request)}\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> None:
    """Answer requests until there are no more: start a program, and how one has ended."""
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who ask
    given, state = list(sys.path[1:]), [*warnings.filters]
    while line := sys.stdin.readline():
        what, value = json.loads(line)
        if what == "start":
            answer = os.fork()
            if answer == 0:
                sys.path[:], warnings.filters[:] = given, state
                _become(*value)
        else:
            ended, status = os.waitpid(value, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


def _become(arguments: list[str], folder: str, environment: dict[str, str], *files: str) -> None:
    """Be the program, and end with it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.closerange(3, 64)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 0
    try:
        _program(arguments)
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


def _program(arguments: list[str]) -> None:
    filters = [line for line in os.environ.get("PYTHONWARNINGS", "").split(",") if line]
    while arguments[0] == "-W":
        _, one, *arguments = arguments
        filters.append(one)
    warnings._processoptions(filters)  # type: ignore[attr-defined]
    kind, *rest = arguments
    first = {"-c": "", "-m": os.getcwd()}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:0] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
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
