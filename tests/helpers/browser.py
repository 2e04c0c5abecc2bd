"""Browsers for the tests of the page: Chromium of the system or of Playwright, and Firefox of the system."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIREFOX_PROGRAM = Path(__file__).with_name("firefox.py")
NOT_FOUND = (
    "Chromium not found: the browser tests of the page are skipped. "
    "Install Chromium, or run make test with network access."
)
FIREFOX_NOT_FOUND = "Firefox not found: install it, on Debian with apt-get install firefox-esr."


def find_browser() -> str | None:
    """Return the path of the executable, or None if there is none."""
    for name in EXECUTABLES:
        if path := shutil.which(name):
            return path
    with _shared_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


class _Playwright:
    """Playwright, and how many use it."""

    instance: Any = None
    users = 0


@contextmanager
def _shared_playwright() -> Iterator[Any]:
    """Start Playwright, or return the one that runs: a thread can't have two."""
    from playwright.sync_api import sync_playwright

    if not _Playwright.users:
        _Playwright.instance = sync_playwright().start()
    _Playwright.users += 1
    try:
        yield _Playwright.instance
    finally:
        _Playwright.users -= 1
        if not _Playwright.users:
            _Playwright.instance.stop()


def _firefox_command(folder: Path) -> Path:
    """Write a command that starts Firefox through helpers/firefox.py."""
    command = folder / "firefox"
    command.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FIREFOX_PROGRAM))} "$@"\n'
    )
    command.chmod(0o700)
    return command


@contextmanager
def running_browser(name: str = "chromium") -> Iterator[Any]:
    """Run a headless browser that makes no network requests of its own.

    Args:
        name: ``"chromium"`` or ``"firefox"``.
    """
    if name == "firefox":
        with _shared_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
            browser = playwright.firefox.launch(
                channel="moz-firefox",  # driven over WebDriver BiDi, so it needn't be Playwright's own build
                executable_path=_firefox_command(Path(folder)),
                firefox_user_prefs={
                    "ui.prefersReducedMotion": 1,
                    "network.captive-portal-service.enabled": False,
                },
            )
            yield browser
            browser.close()
        return
    arguments = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with _shared_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=arguments)
        yield browser
        browser.close()


def main() -> None:
    """Install Chromium with the system's package manager or with Playwright, unless it is there already."""
    if find_browser():
        return
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        install = ["apt-get", "-qq", "install", "--yes", "chromium"]
        commands = [["apt-get", "-qq", "update"], install, *commands]
    for command in commands:
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if find_browser():
            return
    print(NOT_FOUND)


if __name__ == "__main__":
    main()
