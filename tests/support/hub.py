"""A hub of models on this machine: what huggingface_hub asks of one, over folders, with failures to order."""

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
        url: What HF_ENDPOINT has to be.
        asked: How often what was asked: "revision", "tree", "HEAD", and "GET path" for each file.
        token: Who has it may read; None: everybody may.
        down: Every answer is 503.
        going: Cleared, files stop in the middle, once `halted` says so.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.token: str | None = None
        self.gated = False
        self.down = False
        self.going = threading.Event()
        self.going.set()
        self.halted = threading.Event()
        self._commits: dict[str, dict[str, Path]] = {}
        self._branches: dict[str, dict[str, str]] = {}
        hub = self

        class Handler(_Handler):
            of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def push(self, repository: str, folder: Path, *, branch: str = "main") -> str:
        """Makes a folder's state the head of a branch; its commit. The folder itself has to stay as it is."""
        known = self._commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{folder}{len(known)}".encode()).hexdigest()
        known[commit] = folder
        self._branches.setdefault(repository, {})[branch] = commit
        return commit

    def found(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision."""
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
            self.going.set()
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.of.down:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "")
        elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._told(asked[1], asked[2] or "revision", asked[3] or "main")
        elif asked := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(asked[1], asked[2], asked[3])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")

    def log_message(self, *_: Any) -> None:
        """Tests count what is asked instead."""

    def _told(self, repository: str, what: str, revision: str) -> None:
        self.of.asked[what] += 1
        found = self._known(repository, revision)
        if found is None:
            return
        commit, folder = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "revision":
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self._json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
        else:
            self._json([_entry(path, folder) for path in files])

    def _file(self, repository: str, revision: str, name: str) -> None:
        found = self._known(repository, revision)
        if found is None:
            return
        commit, folder = found
        self.of.asked[f"GET {name}" if self.command == "GET" else "HEAD"] += 1
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
        self._head(status, headers | {"Content-Length": str(len(data))})
        if self.command == "GET":
            self._pour(data)

    def _pour(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), _CHUNK):
                if at > 0 and not self.of.going.is_set():
                    self.wfile.flush()
                    self.of.halted.set()
                    self.of.going.wait()
                self.wfile.write(data[at : at + _CHUNK])

    def _known(self, repository: str, revision: str) -> tuple[str, Path] | None:
        if self.of.token is not None and self.headers.get("Authorization") != f"Bearer {self.of.token}":
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        elif not self.of.has(repository):
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        elif self.of.gated:
            self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif (found := self.of.found(repository, revision)) is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        else:
            return found
        return None

    def _refuse(self, status: HTTPStatus, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "Content-Length": "0"})

    def _json(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self._head(HTTPStatus.OK, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command == "GET":
            self.wfile.write(data)

    def _head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    return {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _oid(path)}


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
