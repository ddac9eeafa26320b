"""What surrounds every call to a model server: who may call, drain, log context, errors as statuses, metrics.

Servicer methods are decorated with `unary` or `streaming` and then hold only decode, call, encode.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from latentflow.errors import CancelledError, LatentflowError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.internal.metrics import Instruments

_log = structlog.get_logger()


class Calls:
    """The calls that run in this server.

    Stage calls are refused while draining; `drained` returns when the last of them has ended.
    """

    def __init__(self, metrics: Instruments) -> None:
        self._metrics = metrics
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def drained(self) -> None:
        """Takes no new Stage call from now on and waits for the running ones."""
        self.draining = True
        await self._idle.wait()

    def begin(self, name: str) -> float:
        if self.draining:
            raise UnavailableError(
                "This server drains and takes nothing new; try another replica.", reason="DRAINING", retry_after=0.2
            )
        self._metrics.of("latentflow_requests_started_total", call=name).inc()
        self._running += 1
        self._idle.clear()
        return time.perf_counter()

    def end(self, name: str, started: float, code: grpc.StatusCode) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()
        self._metrics.of("latentflow_requests_total", call=name, code=code.name).inc()
        self._metrics.of("latentflow_service_seconds", call=name).observe(time.perf_counter() - started)


def unary(method: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any, Any], Awaitable[Any]]:
    """A servicer method of one answer: `async def Name(self, request)`; the servicer has `calls`."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        # Read to its end, so that what surrounds the call sees it end well.
        answers = [one async for one in _served(self.calls, method.__name__, _once(method(self, request)), context)]
        return answers[0]

    return call


def streaming(method: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any, Any], AsyncIterator[Any]]:
    """A servicer method of many answers: `async def Name(self, request)` that yields."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async for response in _served(self.calls, method.__name__, method(self, request), context):
            yield response

    return call


async def _once(answer: Awaitable[Any]) -> AsyncIterator[Any]:
    yield await answer


async def _served(
    calls: Calls | None, name: str, answers: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[Any]:
    """Passes answers on. `calls` counts and drains; None for calls that stay open while the server drains."""
    sent: dict[str, Any] = dict(context.invocation_metadata() or ())
    trace = rpc.Trace.parse(sent.get(rpc.TRACEPARENT))
    bound = {
        "request_id": sent.get(rpc.REQUEST_ID),
        "trace_id": trace and trace.trace_id,
        "traceparent": trace and trace.header(),
    }
    structlog.contextvars.bind_contextvars(**{key: value for key, value in bound.items() if value})
    code, started, failure = grpc.StatusCode.OK, None, None
    try:
        if calls is not None:
            started = calls.begin(name)
        async for answer in answers:
            yield answer
    except (asyncio.CancelledError, GeneratorExit):
        code = CancelledError.code
        _log.info("call cancelled", call=name)
        raise
    except grpc.aio.BaseError:
        code = grpc.StatusCode.UNKNOWN
        raise
    except Exception as error:
        failure = status.as_error(error, where=name)
        code = failure.code
        if not isinstance(error, LatentflowError):
            _log.exception("call failed unexpectedly", call=name)
        else:
            _log.info("call refused", call=name, reason=failure.reason, message=failure.message)
    finally:
        if calls is not None and started is not None:
            calls.end(name, started, code)
    if failure is not None:
        await status.abort_with(context, failure)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers without the shared token; health checks, which kubelets make, need none."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"

        async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "This server talks only to peers that send its token; set LATENTFLOW_TOKEN alike on every server.",
            )

        self._refusal: Any = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        sent = dict(details.invocation_metadata).get(rpc.AUTHORIZATION, "")
        if details.method.startswith("/grpc.health.v1.") or hmac.compare_digest(str(sent), self._expected):
            return await continuation(details)
        return self._refusal
