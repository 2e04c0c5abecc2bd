"""A real browser for the tests of the page: Chromium, as the system has it or as Playwright brings it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LACK = "no Chromium here, so the page is not tested in a browser: install it, or run make test with a network"


def find() -> str | None:
    """The program to run; None where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@contextmanager
def launched() -> Iterator[Any]:
    """A running browser, without the network."""
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find(), args=[*quiet, *root])
        yield browser
        browser.close()


def main() -> None:
    """Have a browser: find it, or install it by the system's packages or by Playwright."""
    if find():
        return
    steps = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        steps = [["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "--yes", "chromium"], *steps]
    for step in steps:
        subprocess.run(step, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if find():
            return
    print(LACK)


if __name__ == "__main__":
    main()
