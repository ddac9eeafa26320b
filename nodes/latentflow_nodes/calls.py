"""Calls to a model server: servicer methods without the handling around them, metrics of Stage calls, the shared token.

Servicer methods are decorated with `unary` or `streaming` and then hold only decode, call, encode.
"""

from __future__ import annotations

import functools
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
from latentflow.errors import AuthenticationError
from latentflow.internal import rpc
from latentflow.internal.calls import (
    NO_ACCOUNTING,
    Accounting,
    Call,
    Context,
    Outcome,
    Running,
    answered,
    refusing,
    served,
)
from latentflow.internal.metrics import Instruments


class Calls:
    """The Stage calls of this server: which are running, and their metrics."""

    def __init__(self, metrics: Instruments) -> None:
        self._metrics = metrics
        self.running = Running()

    def accounting(self, call: Call) -> Accounting:
        """The metrics of one call."""

        def started() -> None:
            self._metrics.of("latentflow_requests_started_total", call=call.name).inc()

        def ended(outcome: Outcome) -> None:
            self._metrics.of("latentflow_requests_total", call=call.name, code=outcome.code.name).inc()
            self._metrics.of("latentflow_service_seconds", call=call.name).observe(outcome.seconds)

        return Accounting(running=self.running, started=started, ended=ended)


def unary(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, Context], Awaitable[Any]]:
    """A servicer method with one response: `async def Name(self, request)`.

    The servicer has `calls`; None where its calls are neither counted nor refused while the server drains.
    """

    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Context) -> Any:
        call = Call.of(method.__name__, context)
        return await answered(call, lambda: method(self, request), context, _accounting(self, call))

    return handle


def streaming(
    method: Callable[[Any, Any], AsyncIterator[Any]],
) -> Callable[[Any, Any, Context], AsyncIterator[Any]]:
    """As `unary`, for a method with many responses: `async def Name(self, request)` that yields."""

    # An async generator function itself, by which gRPC knows that the method streams.
    @functools.wraps(method)
    async def handle(self: Any, request: Any, context: Context) -> AsyncIterator[Any]:
        call = Call.of(method.__name__, context)
        async for response in served(call, method(self, request), context, _accounting(self, call)):
            yield response

    return handle


def _accounting(servicer: Any, call: Call) -> Accounting:
    calls: Calls | None = servicer.calls
    return NO_ACCOUNTING if calls is None else calls.accounting(call)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers without the shared token; health checks, which kubelets make, need none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"
        self._refusal = refusing(
            AuthenticationError(
                "The call does not carry this server's token. Set LATENTFLOW_TOKEN to the same value on every server."
            )
        )

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        sent = dict(details.invocation_metadata).get(rpc.AUTHORIZATION, "")
        if details.method.startswith("/grpc.health.v1.") or hmac.compare_digest(str(sent), self._expected):
            return await continuation(details)
        return self._refusal
