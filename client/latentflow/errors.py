"""The one tree of errors, from a model server's depths to the client's `except`.

Every error says what went wrong, where, and what to do. Each class maps to one gRPC status code and carries a `reason`,
a constant word that programs may test; servers raise these classes, `latentflow.status` carries them over the wire,
and the client raises the same class again.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

__all__ = [
    "AuthenticationError",
    "CancelledError",
    "ConflictError",
    "DataLossError",
    "DeadlineError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidRequestError",
    "LatentflowError",
    "NotFoundError",
    "OverloadedError",
    "OwnerLostError",
    "UnavailableError",
    "UnimplementedError",
    "error_for",
]


class LatentflowError(Exception):
    """Base of every error of this project.

    Args:
        message: What, where and what to do, in one or two sentences.
        reason: A constant in UPPER_SNAKE_CASE; the class's own where not given.
        details: What a program may want to read of it (names, limits, addresses), as strings.
        retry_after: Seconds after which trying again makes sense, where the server knows.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"
    # Whether the same request may simply be sent again.
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        details: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.details = dict(details or {})
        self.retry_after = retry_after


class InvalidRequestError(LatentflowError):
    """The request or the file says something impossible; sending it again changes nothing."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"


class NotFoundError(LatentflowError):
    """A workflow, model or adapter of that name is not here."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class OwnerLostError(LatentflowError):
    """The server that held a tensor restarted or went away; the stage that made the tensor has to run again."""

    code = grpc.StatusCode.ABORTED
    default_reason = "OWNER_LOST"
    retryable = True


class FailedPreconditionError(LatentflowError):
    """Something has to be put right first: weights that do not load, parts that do not fit together."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class ConflictError(LatentflowError):
    """An idempotency key was used for another request."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "IDEMPOTENCY_CONFLICT"


class OverloadedError(LatentflowError):
    """A bounded queue is full; `retry_after` says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"
    retryable = True


class UnavailableError(LatentflowError):
    """A server is starting, draining or gone."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"
    retryable = True


class DeadlineError(LatentflowError):
    """The request's time ran out."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class CancelledError(LatentflowError):
    """The caller gave up."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class AuthenticationError(LatentflowError):
    """The token or certificate is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class DataLossError(LatentflowError):
    """Bytes are damaged: a truncated weights file, a checkpoint that does not parse."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = "DATA_LOSS"


class UnimplementedError(LatentflowError):
    """This server does not serve that call: it has another role."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class InternalError(LatentflowError):
    """A defect of ours; the server's log has more."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


_BY_CODE: dict[grpc.StatusCode, type[LatentflowError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        NotFoundError,
        OwnerLostError,
        FailedPreconditionError,
        ConflictError,
        OverloadedError,
        UnavailableError,
        DeadlineError,
        CancelledError,
        AuthenticationError,
        DataLossError,
        UnimplementedError,
        InternalError,
    )
}


def error_for(code: grpc.StatusCode) -> type[LatentflowError]:
    """The class for a gRPC status code; codes that nothing here maps to give `InternalError`."""
    return _BY_CODE.get(code, InternalError)
