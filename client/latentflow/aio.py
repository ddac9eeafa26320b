"""The asyncio client: `latentflow.client.Client` with awaitable methods."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Unpack

from latentflow import requests, results
from latentflow.client import chosen_key, chosen_timeout, default_target, remaining
from latentflow.errors import LatentflowError
from latentflow.internal import rpc
from latentflow.results import Collector, Event, Progress, Result, Workflow
from latentflow.retries import Retries
from latentflow.transport import AsyncGrpcTransport, AsyncTransport, Metadata
from latentflow.v1 import generation_pb2


class AsyncClient:
    """A connection to a gateway; an async context manager.

    Args:
        target: host:port, or another target of gRPC such as dns:///host:port; None: LATENTFLOW_TARGET, or 127.0.0.1:8400.
            On another machine, it is reached through the HTTP proxy of the environment by gRPC's rules (`no_proxy`).
        timeout: Seconds for a whole call, including its retries, where the call does not set its own; None: no limit.
        tls: TLS files; None: a connection without TLS.
        api_key: Sent as bearer token, also without TLS; None: LATENTFLOW_API_KEY, or no key.
        metadata: gRPC metadata for every call.
        retries: When to send a failed request again; `NO_RETRIES` for never.
        transport: Carries the calls; a `AsyncMockTransport` in tests.
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
        transport: AsyncTransport | None = None,
    ) -> None:
        self._transport: AsyncTransport = transport or AsyncGrpcTransport(target or default_target(), tls=tls)
        self._timeout = timeout
        self._api_key = chosen_key(api_key)
        self._metadata = list(metadata or [])
        self._retries = retries or Retries()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections and ends their running calls with InvalidRequestError, in all event loops.

        It does not wait for the calls of other event loops; these end as soon as their loops run.
        """
        await self._transport.close()

    async def generate(
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
        async for one in self.stream(prompt, timeout=timeout, **arguments):
            collector.take(one)
            if on_progress is not None and isinstance(one, Progress):
                on_progress(one)
        return collector.result()

    def stream(
        self, prompt: str, *, timeout: float | None = None, **arguments: Unpack[requests.Arguments]
    ) -> AsyncIterator[Event]:
        """The events of a request as they arrive: Accepted, Progress as steps end, ImageReady for each image, Done.

        Takes the arguments of `generate`. Closing the iterator early cancels the request.
        """
        return self.send(requests.build(prompt, **arguments), timeout=timeout)

    async def describe(self, workflow: str | None = None, *, timeout: float | None = None) -> Workflow:
        """A workflow's inputs and models; None: the only workflow that the gateway serves."""
        request = generation_pb2.DescribeWorkflowRequest(workflow=workflow or "")
        return results.workflow(
            await self._transport.describe(
                request, timeout=chosen_timeout(timeout, default=self._timeout), metadata=self._call_metadata()
            )
        )

    async def workflows(self, *, timeout: float | None = None) -> list[str]:
        """Names of the workflows that the gateway serves, as "namespace/name"."""
        response = await self._transport.workflows(
            timeout=chosen_timeout(timeout, default=self._timeout), metadata=self._call_metadata()
        )
        return list(response.workflows)

    async def send(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None = None
    ) -> AsyncIterator[Event]:
        """As `stream`, for a request of `latentflow.requests.build`."""
        seconds = chosen_timeout(timeout, default=self._timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        metadata, collector, failures = self._call_metadata(), Collector(), 0
        while True:
            try:
                responses = self._transport.generate(request, timeout=remaining(deadline), metadata=metadata)
                async with contextlib.aclosing(responses):  # type: ignore[type-var]
                    async for response in responses:
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
                await asyncio.sleep(pause)

    def _call_metadata(self) -> Metadata:
        return [*self._metadata, *rpc.metadata(token=self._api_key, trace=rpc.Trace.new(), request_id=None)]
