"""The exception tree of the project: servers raise these classes, and the client raises the same class again.

A message names what failed, where, and what to do. Each class maps to one gRPC status code; an error's `reason` is a
constant word that programs may test.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from latentflow.reasons import Reason

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

    Attributes:
        message: What failed, where, and what to do, in one or two sentences.
        reason: A member of `Reason`, or the word that a server of another version sent; by default the class's own.
        details: Names, limits and addresses for programs, as strings.
        retry_after: Seconds after which to send the request again, where the server knows.
        retryable: Whether the same request may be sent again.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[Reason] = Reason.UNKNOWN
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        details: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason: str = reason or self.default_reason
        self.details = dict(details or {})
        self.retry_after = retry_after


class InvalidRequestError(LatentflowError):
    """An argument or a file is impossible; the same request fails again."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = Reason.INVALID_REQUEST


class NotFoundError(LatentflowError):
    """No workflow, model or LoRA has this name."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = Reason.NOT_FOUND


class OwnerLostError(LatentflowError):
    """The server that held a tensor has restarted or is gone; the stage that made the tensor has to run again."""

    code = grpc.StatusCode.ABORTED
    default_reason = Reason.OWNER_LOST
    retryable = True


class FailedPreconditionError(LatentflowError):
    """Something has to be corrected first: weights that do not load, models that do not fit together."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = Reason.FAILED_PRECONDITION


class ConflictError(LatentflowError):
    """The idempotency key belongs to another request."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = Reason.IDEMPOTENCY_CONFLICT


class OverloadedError(LatentflowError):
    """A bounded queue or a device is full; `retry_after` is when to send the request again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = Reason.QUEUE_FULL
    retryable = True


class UnavailableError(LatentflowError):
    """A server is starting, asleep, draining or gone."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = Reason.UNAVAILABLE
    retryable = True


class DeadlineError(LatentflowError):
    """The deadline passed before the request was finished."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = Reason.DEADLINE_EXCEEDED


class CancelledError(LatentflowError):
    """The caller cancelled the request."""

    code = grpc.StatusCode.CANCELLED
    default_reason = Reason.CANCELLED


class AuthenticationError(LatentflowError):
    """The token or certificate is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = Reason.UNAUTHENTICATED


class DataLossError(LatentflowError):
    """Data is damaged: a truncated weights file, a checkpoint that cannot be parsed."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = Reason.DATA_LOSS


class UnimplementedError(LatentflowError):
    """The server does not serve this call: it has another role or version."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = Reason.UNIMPLEMENTED


class InternalError(LatentflowError):
    """A defect; the server's log has the traceback."""

    code = grpc.StatusCode.INTERNAL
    default_reason = Reason.INTERNAL


# All classes, in the order of the documentation.
CLASSES: tuple[type[LatentflowError], ...] = (
    InvalidRequestError,
    NotFoundError,
    ConflictError,
    AuthenticationError,
    FailedPreconditionError,
    DataLossError,
    UnimplementedError,
    OverloadedError,
    UnavailableError,
    OwnerLostError,
    DeadlineError,
    CancelledError,
    InternalError,
)
_BY_CODE = {cls.code: cls for cls in CLASSES}


def error_for(code: grpc.StatusCode) -> type[LatentflowError]:
    """The class of a gRPC status code; `InternalError` for a code that no class maps to."""
    return _BY_CODE.get(code, InternalError)
