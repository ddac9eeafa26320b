"""An S3 store on this machine: moto's server, with counted requests and with downloads that a test can pause."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "weights"


class Store:
    """A store with one bucket.

    Attributes:
        url: The value for AWS_ENDPOINT_URL.
        requests: Count of "GET path" for each object.
        denied: Whether every request is refused, as with an unknown access key.
        flowing: While cleared, downloads pause in the middle.
        paused: Set when a download has paused.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.denied = False
        self.flowing = threading.Event()
        self.flowing.set()
        self.paused = threading.Event()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def client(self) -> Any:
        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, **keys)

    def upload(self, folder: Path, prefix: str) -> None:
        """Uploads a folder's files under a prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client().upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")

    @contextlib.contextmanager
    def running(self) -> Iterator[Store]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            self.client().create_bucket(Bucket=BUCKET)
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """Stops the server; later requests cannot connect."""
        self.flowing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if self.denied:
            body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key is not known.</Message></Error>"
            start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer: Iterable[bytes] = self._app(environ, start)
        _, _, key = environ["PATH_INFO"].removeprefix("/").partition("/")
        if environ["REQUEST_METHOD"] == "GET" and key:
            self.requests[f"GET {key}"] += 1
            return self._pour(b"".join(answer))
        return answer

    def _pour(self, data: bytes) -> Iterator[bytes]:
        yield data[: len(data) // 2]
        if not self.flowing.is_set():
            self.paused.set()
            self.flowing.wait()
        yield data[len(data) // 2 :]
