"""Running a compiler: without input, without a terminal, and with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from unrolled.engines.fork_safety import delay_forks


def run(
    command: Sequence[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it prints. Bytes that aren't UTF-8 are replaced.

    The command can't wait for a user: its input is empty, and it has no terminal to ask.

    Raises:
        subprocess.TimeoutExpired: If it takes too long. It and the processes that it started are ended.
        OSError: If it can't be started.
    """
    executable = shutil.which(command[0])  # not the next one of this name, if this one can't be started
    # A child that forked now would keep the pipes open, and this thread would wait for its end.
    with delay_forks():
        process = subprocess.Popen(
            command,
            executable=executable,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # Windows: don't open a console window
        )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:  # also Ctrl-C, which a process without a terminal doesn't get
        _end(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def describe_exit(done: subprocess.CompletedProcess[str]) -> str:
    """Return how a command failed: its signal or exit code, and the first line that it printed."""
    try:
        reason = f"was ended by {signal.Signals(-done.returncode).name}"
    except ValueError:
        reason = f"ended with exit code {done.returncode}"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return f"{reason} ({lines[0][:200]})" if lines else reason


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process with all processes that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        line = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    process.kill()
    process.communicate()
