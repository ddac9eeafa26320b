"""What surrounds every call to a server: log context, refusal while the server drains, the error that the call ends with.

Model servers and gateways pass each gRPC call through `served` or `answered`, and the gateway each HTTP request for images
through `accounted`, so that an error, a cancellation or a defect has the same outcome everywhere. What they count of a call
differs; they pass that as `Accounting`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog

from latentflow.errors import CancelledError, LatentflowError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.reasons import Reason

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_log = structlog.get_logger()
_END = object()
# Of the call that the present task serves.
_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline", default=math.inf)


def remaining() -> float | None:
    """Seconds until the deadline of the call that the present task serves, at least 0; None where it has none."""
    deadline = _deadline.get()
    return None if deadline == math.inf else max(0.0, deadline - asyncio.get_running_loop().time())


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that has arrived.

    Attributes:
        name: The method's name, such as "Denoise".
        arrived: When, by `time.perf_counter`.
        deadline: The caller's, in the event loop's time; infinite where the caller set none.
        request_id: From the call's metadata; empty where the caller sent none.
        trace: From the call's metadata; a new one where the caller sent none.
    """

    name: str
    arrived: float
    deadline: float
    request_id: str
    trace: rpc.Trace

    @classmethod
    def of(cls, name: str, context: Context) -> Call:
        """The call that a servicer method was given. Runs in the event loop that serves it."""
        sent: dict[str, Any] = dict(context.invocation_metadata() or ())
        remaining = context.time_remaining()
        return cls(
            name=name,
            arrived=time.perf_counter(),
            deadline=asyncio.get_running_loop().time() + (math.inf if remaining is None else remaining),
            request_id=sent.get(rpc.REQUEST_ID, ""),
            trace=rpc.Trace.parse(sent.get(rpc.TRACEPARENT)) or rpc.Trace.new(),
        )

    def identified(self) -> Call:
        """The call as a request of its own: with a new request id and a new span.

        The id is the gateway's, so that clients cannot make two requests look like one in the logs.
        """
        return replace(self, request_id=secrets.token_hex(8), trace=self.trace.child())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended: its status code, the error's reason (empty without an error), seconds since it arrived."""

    code: grpc.StatusCode
    reason: str
    seconds: float


class Running:
    """The calls that a server has admitted and not ended. A server that drains or is paused admits no more."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        # Makes the error of calls while the server is paused; None: it is not.
        self._refusal: Callable[[], UnavailableError] | None = None
        self._interrupted = False
        # Those of the admitted calls that await their next response.
        self._limits: set[asyncio.Timeout] = set()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a call while entered. UnavailableError, reason DRAINING, where the server drains; the refusal of a pause."""
        if self.draining:
            raise UnavailableError(
                "This server is draining and admits no new calls; try another replica.",
                reason=Reason.DRAINING,
                retry_after=0.2,
            )
        if self._refusal is not None:
            raise self._refusal()
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def drained(self) -> None:
        """Admits no new calls from now on; returns when the admitted ones have ended."""
        self.draining = True
        await self.ended()

    async def ended(self) -> None:
        """Returns when no admitted call is left."""
        await self._idle.wait()

    def pause(self, refusal: Callable[[], UnavailableError]) -> None:
        """Refuses new calls until `resume`; the admitted ones continue."""
        self._refusal = refusal

    def resume(self) -> None:
        """Ends the pause."""
        self._refusal, self._interrupted = None, False

    def interrupt(self) -> None:
        """During a pause: ends the admitted calls with its refusal. They do not wait for their next response any more."""
        self._interrupted = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(now)

    @contextlib.asynccontextmanager
    async def interruptible(self) -> AsyncGenerator[None, None]:
        """Entered by an admitted call while it awaits its next response. Raises the refusal where it is interrupted."""
        if self._interrupted and self._refusal is not None:
            raise self._refusal()
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limits.add(limit)
                yield
        except TimeoutError:
            if limit.expired() and self._refusal is not None:
                raise self._refusal() from None
            raise
        finally:
            self._limits.discard(limit)


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What a server records of a call.

    Attributes:
        running: Counts the call, and refuses it while the server drains; None for calls that are served while it drains.
        started, ended: Called for a call that was admitted, at its start and at its end, whatever ended it.
    """

    running: Running | None = None
    started: Callable[[], None] = lambda: None
    ended: Callable[[Outcome], None] = lambda _: None


NO_ACCOUNTING = Accounting()


async def accounted(
    call: Call, responses: AsyncIterator[Any], accounting: Accounting = NO_ACCOUNTING
) -> AsyncGenerator[Any, None]:
    """Yields a call's responses, and logs and records how it ends. Whatever they raise is raised as a LatentflowError."""
    bound = {"trace_id": call.trace.trace_id, "traceparent": call.trace.header()}
    if call.request_id:
        bound["request_id"] = call.request_id
    structlog.contextvars.bind_contextvars(**bound)
    _deadline.set(call.deadline)
    code, reason, admitted = grpc.StatusCode.OK, "", False
    try:
        running = accounting.running
        with running.admitted() if running is not None else contextlib.nullcontext():
            admitted = True
            accounting.started()
            following = aiter(responses)
            while True:
                async with running.interruptible() if running is not None else contextlib.nullcontext():
                    response = await anext(following, _END)
                if response is _END:
                    break
                yield response
    except (asyncio.CancelledError, GeneratorExit):
        code, reason = CancelledError.code, CancelledError.default_reason
        _log.info("call cancelled", call=call.name)
        raise
    except grpc.aio.BaseError:
        # gRPC's own: the handler has ended the call itself, or the connection is gone.
        code = grpc.StatusCode.UNKNOWN
        raise
    except Exception as error:
        failure = status.as_error(error, where=call.name)
        code, reason = failure.code, failure.reason
        if isinstance(error, LatentflowError):
            _log.info("call failed", call=call.name, reason=failure.reason, message=failure.message)
        else:
            _log.exception("call failed unexpectedly", call=call.name)
        raise failure from None
    finally:
        if admitted:
            accounting.ended(Outcome(code=code, reason=reason, seconds=time.perf_counter() - call.arrived))


async def served(
    call: Call, responses: AsyncIterator[Any], context: Context, accounting: Accounting = NO_ACCOUNTING
) -> AsyncGenerator[Any, None]:
    """As `accounted`, for a gRPC call, which ends with the status of its error."""
    try:
        async with contextlib.aclosing(accounted(call, responses, accounting)) as accepted:
            async for response in accepted:
                yield response
    except LatentflowError as error:
        await status.abort_with(context, error)


async def answered(
    call: Call, respond: Callable[[], Awaitable[Any]], context: Context, accounting: Accounting = NO_ACCOUNTING
) -> Any:
    """As `served`, for a call with one response, which it returns.

    Args:
        respond: Called if the call is admitted.
    """

    async def once() -> AsyncGenerator[Any, None]:
        yield await respond()

    # Read to its end, so that the call counts as ended well.
    found = [one async for one in served(call, once(), context, accounting)]
    return found[0]


def refusing(error: LatentflowError) -> Any:
    """A handler for any method that ends every call with an error; for interceptors."""

    async def refuse(_request: Any, context: Context) -> None:
        await status.abort_with(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)
