"""The HTTP API as an ASGI application: its routes, and what surrounds every request to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog
from latentflow import results
from latentflow.api import Role
from latentflow.errors import DeadlineError, InvalidRequestError, LatentflowError, NotFoundError, UnavailableError
from latentflow.internal import rpc, status
from latentflow.internal.calls import Call, accounted
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason
from latentflow.results import Collector, Result
from latentflow.v1 import generation_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from latentflow_gateway.api_keys import ApiKeys
from latentflow_gateway.generation import Generation
from latentflow_gateway.http import errors, openapi, requests, responses
from latentflow_gateway.settings import GatewaySettings

_log = structlog.get_logger()
_JSON = "application/json"
# Room for the prompts and numbers of a request; control images come on top.
_TEXT_BYTES = 1 << 20
# The status that is recorded where the client has closed the connection before the response.
_GONE = 499
_REQUEST_ID = "x-request-id"

T = TypeVar("T")
Handler = Callable[[Request, Call], Awaitable[Response]]


class HttpApi:
    """The routes of the HTTP API.

    Args:
        keys: None: clients need no key.
    """

    def __init__(
        self, generation: Generation, *, settings: GatewaySettings, keys: ApiKeys | None, metrics: Instruments
    ) -> None:
        self._generation = generation
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._ending = asyncio.Event()
        self._document = json.dumps(openapi.document(keyed=keys is not None)).encode()
        routes = [
            self._route("/v1/images/generations", self._images, "POST"),
            self._route("/v1/models", self._models, "GET"),
            # A name has a slash, which some clients encode.
            self._route("/v1/models/{model:path}", self._model, "GET"),
            self._route("/healthz", self._health, "GET", keyed=False),
            self._route("/openapi.json", self._openapi, "GET", keyed=False),
        ]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[_REQUEST_ID, "retry-after", "retry-after-ms", "x-should-retry"],
        )
        self.asgi = Starlette(
            routes=routes,
            middleware=[cors] if settings.cors_origins else [],
            exception_handlers={HTTPException: self._refused},
        )
        self.asgi.router.redirect_slashes = False

    def end(self) -> None:
        """Ends the running requests with UNAVAILABLE."""
        self._ending.set()

    def _route(self, path: str, handler: Handler, method: str, *, keyed: bool = True) -> Route:
        name = path.replace(":path", "")

        async def endpoint(request: Request) -> Response:
            call = _identified(request, f"{method} {name}")
            try:
                if keyed and self._keys is not None:
                    self._keys.admit(request.headers.get(rpc.AUTHORIZATION, ""))
                response = await _first(handler(request, call), self._ended())
            except HTTPException as error:
                response = _problem(error)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception as error:
                failure = status.as_error(error, where=call.name)
                if isinstance(error, LatentflowError):
                    _log.info("HTTP request refused", route=name, reason=failure.reason, message=failure.message)
                else:
                    _log.exception("HTTP request failed unexpectedly", route=name)
                response = _failed(failure)
            response.headers[_REQUEST_ID] = call.request_id
            self._count(name, response)
            return response

        return Route(path, endpoint, methods=[method])

    async def _images(self, request: Request, call: Call) -> Response:
        body = await self._body(request)
        key = request.headers.get("idempotency-key", "")
        # A control image has megabytes, which take long to decode.
        parsed, wire = await asyncio.to_thread(_read, body, key)
        events = accounted(call, self._generation.events(call, wire), self._generation.accounting(wire))
        try:
            result = await _first(_collected(events), _disconnected(request))
        except LatentflowError as error:
            return _failed(error)
        if result is None:
            return Response(status_code=_GONE)
        encode = partial(responses.images, parsed, wire, result, created=int(time.time()))
        return Response(await asyncio.to_thread(encode), media_type=_JSON)

    async def _models(self, _request: Request, _call: Call) -> Response:
        names = [workflow.full_name for workflow in self._generation.workflows]
        listed = responses.ModelList(data=[responses.model(self._generation.describe(name)) for name in names])
        return Response(listed.model_dump_json(), media_type=_JSON)

    async def _model(self, request: Request, _call: Call) -> Response:
        name = request.path_params["model"]
        if not name:
            raise NotFoundError("The path names no model; GET /v1/models lists them.")
        return Response(responses.model(self._generation.describe(name)).model_dump_json(), media_type=_JSON)

    async def _health(self, _request: Request, _call: Call) -> Response:
        draining = self._generation.running.draining
        health = responses.Health(status="draining" if draining else "serving")
        return Response(health.model_dump_json(), status_code=503 if draining else 200, media_type=_JSON)

    async def _openapi(self, _request: Request, _call: Call) -> Response:
        return Response(self._document, media_type=_JSON)

    async def _body(self, request: Request) -> bytes:
        """The body of a request. HTTPException where its type is wrong or it is too large, which is found while it arrives."""
        # Pages of other origins can send other types without a preflight request, by which CORS refuses them.
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != _JSON:
            raise HTTPException(415, f"The body must have the content type {_JSON}, not {media_type or 'none'}.")
        limit = self._longest_body()
        too_large = HTTPException(413, f"The body has more than {limit} bytes, the most that this gateway accepts.")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise DeadlineError("The body of the request did not arrive within the gateway's longest time.") from None
        return bytes(body)

    def _longest_body(self) -> int:
        """Bytes of the longest body that can be a request: all nets of a workflow's ControlNets have an image, as base64."""
        nets = (sum(1 + len(m.nets or ()) for m in w.of_role(Role.CONTROL_NET)) for w in self._generation.workflows)
        return _TEXT_BYTES + max(nets, default=0) * self._settings.limits.max_control_image_bytes * 3 // 2

    async def _ended(self) -> Response:
        """The response to requests that still run when the gateway ends."""
        await self._ending.wait()
        raise UnavailableError("The gateway ended before the request had; send it again.", reason=Reason.DRAINING)

    async def _refused(self, request: Request, error: Exception) -> Response:
        """The response where there is no such route, or not for the method."""
        assert isinstance(error, HTTPException)
        call = _identified(request, f"{request.method} ?")
        _log.info("HTTP request refused", route="?", status=error.status_code)
        response = _problem(error)
        response.headers[_REQUEST_ID] = call.request_id
        self._count("?", response)
        return response

    def _count(self, route: str, response: Response) -> None:
        self._metrics.of("latentflow_gateway_http_responses_total", route=route, status=str(response.status_code)).inc()


def _identified(request: Request, name: str) -> Call:
    """The call of an HTTP request, with a new id, which the log has from now on."""
    call = Call(
        name=name,
        arrived=time.perf_counter(),
        deadline=math.inf,
        request_id="",
        trace=rpc.Trace.parse(request.headers.get(rpc.TRACEPARENT)) or rpc.Trace.new(),
    ).identified()
    structlog.contextvars.bind_contextvars(request_id=call.request_id)
    return call


def _read(body: bytes, idempotency_key: str) -> tuple[requests.ImageRequest, generation_pb2.GenerateRequest]:
    parsed = requests.parse(body)
    return parsed, requests.to_wire(parsed, idempotency_key=idempotency_key)


async def _collected(events: AsyncGenerator[generation_pb2.GenerateResponse, None]) -> Result:
    collector = Collector()
    async with contextlib.aclosing(events):
        async for message in events:
            one = results.event(message)
            if one is not None:
                collector.take(one)
    return collector.result()


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(work: Awaitable[T], other: Awaitable[T]) -> T:
    """The result of the one that ends first. The other is cancelled, and has ended on return."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done()).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failed(error: LatentflowError) -> Response:
    code = errors.status_of(error)
    return Response(errors.body(error, code), status_code=code, headers=errors.headers(error), media_type=_JSON)


def _problem(error: HTTPException) -> Response:
    """The response to what is no request of the API."""
    if error.status_code == 404:
        failure: LatentflowError = NotFoundError("There is nothing at this path; GET /openapi.json lists the paths.")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        failure = InvalidRequestError(f"This path does not accept the method of the request; use {allowed}.")
    else:
        failure = InvalidRequestError(error.detail)
    headers = errors.headers(failure) | {name.lower(): value for name, value in (error.headers or {}).items()}
    return Response(
        errors.body(failure, error.status_code), status_code=error.status_code, headers=headers, media_type=_JSON
    )
