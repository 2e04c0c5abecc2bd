"""A command in a real pseudo-terminal, its screen as a person would see it, and keys for it."""

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

WAIT = 60.0  # seconds at most, on a busy machine, for what should come at once
# A session leader takes its terminal as the controlling one, from which Ctrl-C comes, here never ignored.
LAUNCH = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
SETTINGS = ("COLORTERM", "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR")  # of who runs the tests
ALTERNATE = 1049 << 5  # as pyte keeps this private mode


class Terminal:
    """A command in a terminal of its own, until the ``with`` block ends.

    Args:
        command: the program and its arguments.
        columns, rows: of the terminal.
        folder: where it runs.
        environment: beside that of the tests, without what says how to print.
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
        self._before = termios.tcgetattr(self._slave)
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, command)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**kept, "TERM": "xterm-256color", **environment},
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
        """What stands on the screen, without the spaces at the ends of lines."""
        return [line.rstrip() for line in self.screen.display]

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        termios.tcsetwinsize(self._slave, (rows, columns))

    def until(self, seen: Callable[[list[str]], object]) -> list[str]:
        """The lines of the screen, as soon as they are as expected."""
        end = time.monotonic() + WAIT
        while not seen(self.lines):
            shown = "\n".join(self.lines)
            assert time.monotonic() < end, f"the screen didn't become as expected:\n{shown}"
            self._read(0.5)
        return self.lines

    def end(self) -> int:
        """The exit code, once the command has ended; asserts that the terminal is as it was."""
        end = time.monotonic() + WAIT
        while self._process.poll() is None:
            assert time.monotonic() < end, "the command doesn't end"
            self._read(0.1)
        while self._read(0):
            pass
        assert termios.tcgetattr(self._slave) == self._before
        assert ALTERNATE not in self.screen.mode
        assert not self.screen.cursor.hidden
        return self._process.returncode

    def _read(self, timeout: float) -> bool:
        ready = bool(select.select([self._master], [], [], timeout)[0])
        if ready:
            self._stream.feed(os.read(self._master, 2**16))
        return ready
