"""A model hub on this machine, over folders: the endpoints that huggingface_hub calls, with failures on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_CHUNK = 64 << 10


class Hub:
    """Repositories by name, each with commits that are folders, and branches.

    Attributes:
        url: The value for HF_ENDPOINT.
        requests: Count of requests by kind: "revision", "tree", "HEAD", and "GET path" for each file.
        token: Required of clients; None: the repositories are public.
        down: Whether every response is 503.
        flowing: While cleared, downloads pause in the middle.
        paused: Set when a download has paused.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.token: str | None = None
        self.gated = False
        self.down = False
        self.flowing = threading.Event()
        self.flowing.set()
        self.paused = threading.Event()
        self._commits: dict[str, dict[str, Path]] = {}
        self._branches: dict[str, dict[str, str]] = {}
        this = self

        class Handler(_Handler):
            hub = this

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def push(self, repository: str, folder: Path, *, branch: str = "main") -> str:
        """Makes a folder the head of a branch; returns the commit. The folder must not change afterwards."""
        known = self._commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{folder}{len(known)}".encode()).hexdigest()
        known[commit] = folder
        self._branches.setdefault(repository, {})[branch] = commit
        return commit

    def found(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision; None where there is none."""
        commit = self._branches.get(repository, {}).get(revision, revision)
        folder = self._commits.get(repository, {}).get(commit)
        return (commit, folder) if folder else None

    def has(self, repository: str) -> bool:
        return repository in self._commits

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.flowing.set()
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.down:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._send_listing(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(match[1], match[2], match[3])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def log_message(self, *_: Any) -> None:
        """Silent: tests read the counts of requests."""

    def _send_listing(self, repository: str, kind: str, revision: str) -> None:
        self.hub.requests[kind] += 1
        found = self._known(repository, revision)
        if found is None:
            return
        commit, folder = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if kind == "revision":
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self._send_json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
        else:
            self._send_json([_entry(path, folder) for path in files])

    def _send_file(self, repository: str, revision: str, name: str) -> None:
        found = self._known(repository, revision)
        if found is None:
            return
        commit, folder = found
        self.hub.requests[f"GET {name}" if self.command == "GET" else "HEAD"] += 1
        path = folder / name
        if not path.is_file():
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = HTTPStatus.OK
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
            status, data = HTTPStatus.PARTIAL_CONTENT, data[int(start[1]) :]
        self._send_head(status, headers | {"Content-Length": str(len(data))})
        if self.command == "GET":
            self._send_data(data)

    def _send_data(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), _CHUNK):
                if at > 0 and not self.hub.flowing.is_set():
                    self.wfile.flush()
                    self.hub.paused.set()
                    self.hub.flowing.wait()
                self.wfile.write(data[at : at + _CHUNK])

    def _known(self, repository: str, revision: str) -> tuple[str, Path] | None:
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        elif not self.hub.has(repository):
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif self.hub.gated:
            self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif (found := self.hub.found(repository, revision)) is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            return found
        return None

    def _refuse(self, status: HTTPStatus, code: str) -> None:
        self._send_head(status, {"X-Error-Code": code, "Content-Length": "0"})

    def _send_json(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self._send_head(HTTPStatus.OK, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command == "GET":
            self.wfile.write(data)

    def _send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    return {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _oid(path)}


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
