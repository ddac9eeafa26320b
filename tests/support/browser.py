"""A page in a real browser, headless Chromium."""

from __future__ import annotations

import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

_PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_SECONDS = 120


def program() -> str | None:
    """The path of the browser; None where none is installed."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


def report(page: Path, folder: Path, **query: str) -> Any:
    """What a page, opened with a query, posts to /result of the server that it comes from.

    Args:
        folder: For the browser's profile.
    """
    reports: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page.read_bytes())

        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    found = program()
    if found is None:
        raise RuntimeError("no browser is installed; on Debian: tools/debian")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/?{urlencode(query)}"
        # Containers and root have no sandbox.
        command = [found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder}", "--remote-debugging-port=0", url]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True) as browser:
            try:
                return reports.get(timeout=_SECONDS)
            finally:
                # The program may be a script that starts the browser, which starts processes of its own.
                os.killpg(browser.pid, signal.SIGKILL)
                server.shutdown()
