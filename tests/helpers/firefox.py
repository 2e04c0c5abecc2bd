"""Firefox for Playwright: start it, and answer the one command of WebDriver BiDi that its releases lack.

Playwright starts this file in place of the executable. It sends the color scheme of the page to Firefox
whenever it opens a window, with a command that Firefox does not know yet, and fails if that is not answered.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, WebSocketHandler, websocket_connect

EXECUTABLES = ("firefox-esr", "firefox")
MISSING = "emulation.setMediaFeaturesOverride"
LISTENING = re.compile(rb"WebDriver BiDi listening on (ws://\S+)")
MAX_MESSAGE = 2**28  # bytes


def find_firefox() -> str | None:
    """Return the path of Firefox, or None if there is none."""
    return next(filter(None, map(shutil.which, EXECUTABLES)), None)


class _Session(WebSocketHandler):
    """Pass messages on between Playwright and Firefox."""

    def initialize(self, url: str) -> None:
        self._url = url
        self._firefox: WebSocketClientConnection | None = None
        self._sending = asyncio.Lock()  # messages keep their order

    async def open(self, *_args: str, **_kwargs: str) -> None:
        async with self._sending:
            self._firefox = await websocket_connect(
                self._url + "/session", on_message_callback=self._reply, max_message_size=MAX_MESSAGE
            )

    async def on_message(self, message: str | bytes) -> None:
        command = json.loads(message)
        if command["method"] == MISSING:
            await self.write_message(json.dumps({"type": "success", "id": command["id"], "result": {}}))
            return
        async with self._sending:
            assert self._firefox is not None
            await self._firefox.write_message(message)

    def _reply(self, message: str | bytes | None) -> None:
        if message is None:
            self.close()
        else:
            self.write_message(message)


async def run(arguments: list[str]) -> int:
    """Run Firefox with the arguments that Playwright passes, and return its exit status."""
    executable = find_firefox()
    assert executable is not None
    firefox = await asyncio.create_subprocess_exec(executable, *arguments, stderr=asyncio.subprocess.PIPE)
    assert firefox.stderr is not None
    while line := await firefox.stderr.readline():
        if found := LISTENING.search(line):
            options = {"url": found[1].decode()}
            application = Application(
                [("/session", _Session, options)], websocket_max_message_size=MAX_MESSAGE
            )
            sockets = bind_sockets(0, "127.0.0.1")
            HTTPServer(application).add_sockets(sockets)
            port = sockets[0].getsockname()[1]
            print(f"WebDriver BiDi listening on ws://127.0.0.1:{port}", file=sys.stderr, flush=True)
    return await firefox.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))
