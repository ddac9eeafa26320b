"""The errors of the HTTP API: the status of each class of error, and the body in OpenAI's form. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from latentflow.errors import (
    AuthenticationError,
    CancelledError,
    ConflictError,
    DataLossError,
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    InvalidRequestError,
    LatentflowError,
    NotFoundError,
    OverloadedError,
    OwnerLostError,
    UnavailableError,
    UnimplementedError,
)
from latentflow.reasons import Reason
from pydantic import BaseModel, Field

from latentflow_gateway.fields import FIELD

STATUS: Mapping[type[LatentflowError], int] = {
    InvalidRequestError: 400,
    NotFoundError: 404,
    ConflictError: 409,
    AuthenticationError: 401,
    FailedPreconditionError: 400,
    DataLossError: 500,
    UnimplementedError: 501,
    OverloadedError: 429,
    UnavailableError: 503,
    OwnerLostError: 503,
    DeadlineError: 504,
    CancelledError: 499,
    InternalError: 500,
}
# The fields of the HTTP API whose gRPC names differ.
_NAMES = {"workflow": "model", "images": "n", "width": "size", "height": "size"}
# The fields that name what cannot be used, by the reasons of errors that gateways and model servers raise alike.
_FIELDS: Mapping[str, str] = {
    Reason.ADAPTER_MISMATCH: "loras",
    Reason.ADAPTER_UNREADABLE: "loras",
    Reason.CONTROLNET_MISMATCH: "control_images",
}


class Problem(BaseModel):
    """What went wrong."""

    message: str = Field(description="What failed, where, and what to do.")
    type: str = Field(
        description="invalid_request_error, authentication_error, rate_limit_error or server_error; by the status."
    )
    param: str | None = Field(description="The field of the request that is wrong, where it is a single one.")
    code: str = Field(description="The reason, a constant word. The page on errors lists all of them.")


class ErrorBody(BaseModel):
    """The body of every response with a status from 400 on."""

    error: Problem


def status_of(error: LatentflowError) -> int:
    """The HTTP status of an error."""
    return STATUS.get(type(error), 500)


def body(error: LatentflowError, status: int) -> bytes:
    """The JSON of an error."""
    problem = Problem(message=error.message, type=_type(status), param=_param(error), code=str(error.reason))
    return ErrorBody(error=problem).model_dump_json().encode()


def headers(error: LatentflowError) -> dict[str, str]:
    """When to send the request again, if at all: `x-should-retry` and `retry-after-ms` are what OpenAI's clients read."""
    found = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, AuthenticationError):
        found["www-authenticate"] = "Bearer"
    if error.retry_after is not None:
        found["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        found["retry-after-ms"] = str(max(1, math.ceil(error.retry_after * 1000)))
    return found


def _param(error: LatentflowError) -> str | None:
    field = error.details.get(FIELD) or _FIELDS.get(error.reason)
    return _NAMES.get(field, field) if field else None


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
