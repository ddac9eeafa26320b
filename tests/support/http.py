"""Requests to the HTTP API as they are on the wire, without a client library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a response in OpenAI's form, which has nothing else."""
        (error,) = self.json.values()
        assert list(error) == ["message", "type", "param", "code"]
        found: dict[str, Any] = error
        return found


def send(
    address: str,
    path: str,
    *,
    method: str | None = None,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The response to one request, whatever its status.

    Args:
        method: None: POST with a body, GET without.
        body: Sent as JSON; bytes are sent as they are.
    """
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {} if data is None else {"content-type": "application/json"}
    request = urllib.request.Request(
        f"http://{address}{path}", data=data, method=method, headers=sent | dict(headers or {})
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Response(status=response.status, headers=dict(response.headers.items()), body=response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Response(status=error.code, headers=dict(error.headers.items()), body=error.read())
