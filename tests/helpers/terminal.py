"""A command in a pseudo-terminal, with its screen and keyboard input."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyte

TIMEOUT = 300.0  # seconds; long enough for a busy machine
# The command runs in a new session with the pseudo-terminal as its controlling one, so that Ctrl-C works.
# Signals that a parent ignores, as nohup does, get their default action again.
LAUNCH = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
# Environment variables of the user that would change the output.
OUTPUT_VARIABLES = ("COLORTERM", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR")
ALTERNATE = 1049 << 5  # the mode number of the alternate screen in pyte


class Terminal:
    """A command in its own terminal. The end of the ``with`` block kills it.

    Args:
        command: The program and its arguments.
        columns, rows: Size of the terminal.
        folder: Working directory of the command.
        environment: Environment variables to add to those of the tests.
    """

    def __init__(
        self,
        command: Iterable[object],
        columns: int = 80,
        rows: int = 24,
        folder: Path | None = None,
        **environment: str,
    ) -> None:
        self._master, self._slave = pty.openpty()
        termios.tcsetwinsize(self._slave, (rows, columns))
        self._initial_settings = termios.tcgetattr(self._slave)
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        inherited = {name: value for name, value in os.environ.items() if name not in OUTPUT_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, command)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**inherited, "TERM": "xterm-256color", **environment},
            cwd=folder,
            start_new_session=True,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen, without trailing spaces."""
        return [line.rstrip() for line in self.screen.display]

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        termios.tcsetwinsize(self._slave, (rows, columns))

    def until(self, condition: Callable[[list[str]], object]) -> list[str]:
        """Wait until the lines of the screen fulfill a condition, and return them."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(self.lines):
            shown = "\n".join(self.lines)
            assert time.monotonic() < deadline, f"timeout; the screen shows:\n{shown}"
            self._read(0.5)
        return self.lines

    def exit_code(self) -> int:
        """Wait for the command to end, check that it restored the terminal, and return its exit code."""
        deadline = time.monotonic() + TIMEOUT
        while self._process.poll() is None:
            assert time.monotonic() < deadline, "timeout: the command doesn't end"
            self._read(0.1)
        while self._read(0):
            pass
        assert termios.tcgetattr(self._slave) == self._initial_settings
        assert ALTERNATE not in self.screen.mode
        assert not self.screen.cursor.hidden
        return self._process.returncode

    def _read(self, timeout: float) -> bool:
        """Read some output, if any comes within the timeout, and return whether there was any."""
        ready = bool(select.select([self._master], [], [], timeout)[0])
        if ready:
            self._stream.feed(os.read(self._master, 2**16))
        return ready
