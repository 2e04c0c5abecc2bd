from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_helpers import OpenPage

import unrolled as ur
from helpers.browser import FIREFOX_NOT_FOUND, running_browser
from helpers.firefox import find_firefox

needs_firefox = pytest.mark.skipif(find_firefox() is None, reason=FIREFOX_NOT_FOUND)


@pytest.fixture(
    scope="session",
    params=["chromium", pytest.param("firefox", marks=[pytest.mark.slow, needs_firefox])],
)
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    with running_browser(request.param) as browser:
        yield browser


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long tests in Firefox to ``pytest -m exhaustive``: Chromium runs them, too."""
    for item in items:
        # In Firefox, all tests are slow.
        is_slow_in_both = len(list(item.iter_markers("slow"))) > 1
        if isinstance(item, pytest.Function) and _browser(item) == "firefox" and is_slow_in_both:
            item.add_marker(pytest.mark.exhaustive)


def _browser(item: pytest.Function) -> object:
    return item.callspec.params.get("browser") if hasattr(item, "callspec") else None


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[OpenPage]:
    """Opens the page of a trace. Fails if the page writes to the console or makes a network request."""
    messages: list[str] = []
    requests: list[str] = []
    contexts = []
    is_firefox = browser.browser_type.name == "firefox"

    def open_trace(
        trace: ur.Trace,
        scheme: str = "light",
        width: int = 1366,
        height: int = 768,
        address: str = "",
        **options: Any,
    ) -> Any:
        path = trace.to_html(tmp_path / "layer.html", **options)
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": width, "height": height},
            reduced_motion="reduce",
        )
        context.set_default_timeout(300_000)  # ms; long enough for a busy machine
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri() + address)
        tab.wait_for_selector(".arithmetic .value")
        if is_firefox and scheme == "dark":  # it can't emulate the preference
            tab.get_by_role("button", name="Dark / light").click()
        return tab

    yield open_trace
    for context in contexts:
        context.close()
    assert not messages
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
