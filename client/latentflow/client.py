"""The synchronous client: `Client(...).generate(prompt)` returns images, `stream` yields events as they arrive."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Unpack

from latentflow import requests, results
from latentflow.errors import DeadlineError, InvalidRequestError, LatentflowError
from latentflow.internal import rpc
from latentflow.results import Collector, Event, Progress, Result, Workflow
from latentflow.retries import Retries
from latentflow.transport import GrpcTransport, Metadata, Transport
from latentflow.v1 import generation_pb2

DEFAULT_TARGET = "127.0.0.1:8400"


def default_target() -> str:
    """LATENTFLOW_TARGET of the environment, or the address that `latentflow up` serves on by default."""
    return os.environ.get("LATENTFLOW_TARGET") or DEFAULT_TARGET


def chosen_key(api_key: str | None) -> str | None:
    """The API key to send: the argument, or LATENTFLOW_API_KEY of the environment, without white space around it.

    InvalidRequestError where it has characters that gRPC metadata cannot carry.
    """
    key = (os.environ.get("LATENTFLOW_API_KEY", "") if api_key is None else api_key).strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequestError(
            "The API key has characters other than printable ASCII. Pass the key itself, as text."
        )
    return key or None


class Client:
    """A connection to a gateway; a context manager.

    Args:
        target: host:port, or another target of gRPC such as dns:///host:port; None: LATENTFLOW_TARGET, or 127.0.0.1:8400.
            On another machine, it is reached through the HTTP proxy of the environment by gRPC's rules (`no_proxy`).
        timeout: Seconds for a whole call, including its retries, where the call does not set its own; None: no limit.
        tls: TLS files; None: a connection without TLS.
        api_key: Sent as bearer token, also without TLS; None: LATENTFLOW_API_KEY, or no key.
        metadata: gRPC metadata for every call.
        retries: When to send a failed request again; `NO_RETRIES` for never.
        transport: Carries the calls; a `MockTransport` in tests.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        tls: rpc.Tls | None = None,
        api_key: str | None = None,
        metadata: Metadata | None = None,
        retries: Retries | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._transport: Transport = transport or GrpcTransport(target or default_target(), tls=tls)
        self._timeout = timeout
        self._api_key = chosen_key(api_key)
        self._metadata = list(metadata or [])
        self._retries = retries or Retries()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and cancels its running calls."""
        self._transport.close()

    def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **arguments: Unpack[requests.Arguments],
    ) -> Result:
        """Generates images.

        Args:
            prompt: Text that describes the image.
            timeout: Seconds for this call; None: the client's.
            on_progress: Called as steps end, at most about four times a second.
            **arguments: See `latentflow.requests.Arguments`.

        Raises:
            LatentflowError: One of the classes of `latentflow.errors`.
            TypeError: An argument is unknown.
        """
        collector = Collector()
        for one in self.stream(prompt, timeout=timeout, **arguments):
            collector.take(one)
            if on_progress is not None and isinstance(one, Progress):
                on_progress(one)
        return collector.result()

    def stream(
        self, prompt: str, *, timeout: float | None = None, **arguments: Unpack[requests.Arguments]
    ) -> Iterator[Event]:
        """The events of a request as they arrive: Accepted, Progress as steps end, ImageReady for each image, Done.

        Takes the arguments of `generate`. Closing the iterator early cancels the request.
        """
        return self.send(requests.build(prompt, **arguments), timeout=timeout)

    def describe(self, workflow: str | None = None, *, timeout: float | None = None) -> Workflow:
        """A workflow's inputs and models; None: the only workflow that the gateway serves."""
        request = generation_pb2.DescribeWorkflowRequest(workflow=workflow or "")
        return results.workflow(
            self._transport.describe(
                request, timeout=chosen_timeout(timeout, default=self._timeout), metadata=self._call_metadata()
            )
        )

    def workflows(self, *, timeout: float | None = None) -> list[str]:
        """Names of the workflows that the gateway serves, as "namespace/name"."""
        response = self._transport.workflows(
            timeout=chosen_timeout(timeout, default=self._timeout), metadata=self._call_metadata()
        )
        return list(response.workflows)

    def send(self, request: generation_pb2.GenerateRequest, *, timeout: float | None = None) -> Iterator[Event]:
        """As `stream`, for a request of `latentflow.requests.build`."""
        seconds = chosen_timeout(timeout, default=self._timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        metadata, collector, failures = self._call_metadata(), Collector(), 0
        while True:
            try:
                for response in self._transport.generate(request, timeout=remaining(deadline), metadata=metadata):
                    one = results.event(response)
                    if one is not None and collector.take(one):
                        yield one
                if not collector.complete:
                    collector.result()
                return
            except LatentflowError as error:
                failures += 1
                pause = self._retries.pause(error, failures=failures, remaining=remaining(deadline))
                if pause is None:
                    raise
                time.sleep(pause)

    def _call_metadata(self) -> Metadata:
        return [*self._metadata, *rpc.metadata(token=self._api_key, trace=rpc.Trace.new(), request_id=None)]


def chosen_timeout(timeout: float | None, *, default: float | None) -> float | None:
    """Seconds for a call; None: no limit. DeadlineError where none are left."""
    seconds = default if timeout is None else timeout
    if seconds is not None and seconds <= 0:
        raise DeadlineError("The request's timeout has passed; use a longer one.")
    return seconds


def remaining(deadline: float | None) -> float | None:
    """Seconds until a deadline of `time.monotonic`; None without a deadline. DeadlineError when it has passed."""
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError("The request's timeout has passed; use a longer one.")
    return left
