"""Chromium for the tests of the page: the one of the system, or the one that Playwright installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOT_FOUND = (
    "Chromium not found: the browser tests of the page are skipped. "
    "Install Chromium, or run make test with network access."
)


def find_browser() -> str | None:
    """Return the path of the executable, or None if there is none."""
    for name in EXECUTABLES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@contextmanager
def running_browser() -> Iterator[Any]:
    """Run a headless browser that makes no network requests of its own."""
    from playwright.sync_api import sync_playwright

    arguments = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_playwright() as playwright:
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
