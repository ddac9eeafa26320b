"""Conversion between `latentflow.errors` and gRPC statuses with `google.rpc` details.

Servers end calls by `abort_with`; callers convert a `grpc.RpcError` by `error_from`.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from latentflow.errors import CancelledError, InternalError, LatentflowError, UnavailableError, error_for
from latentflow.reasons import Reason

DOMAIN = "latentflow.io"
# A message is sent in a header; gRPC's default limit for all headers is 8 KiB.
_MAX_MESSAGE = 2000
# What gRPC's asyncio client reports of such a write.
_WRITE_FAILED = "Internal error from Core"


class _Context(Protocol):
    async def abort(self, code: Any, details: str = ..., trailing_metadata: Any = ...) -> NoReturn: ...


def to_status(error: LatentflowError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error: ErrorInfo always, RetryInfo where the error has a retry delay."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details)
    status = status_pb2.Status(code=error.code.value[0], message=error.message[:_MAX_MESSAGE])
    status.details.append(_pack(info))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


async def abort_with(context: _Context, error: LatentflowError) -> NoReturn:
    """Ends a call of an asyncio servicer with an error."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def error_from(rpc_error: grpc.RpcError) -> LatentflowError:
    """The error of a failed call; from its status code alone where the server sent no details."""
    call = cast("grpc.Call", rpc_error)
    code = call.code()
    message = call.details() or code.name
    error = error_for(code)(message)
    for detail in _details(rpc_error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            error.reason, error.details = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            error.retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    return error


def error_of_peer(rpc_error: grpc.RpcError) -> LatentflowError:
    """As `error_from`, for a call between servers that this side has not cancelled.

    CANCELLED then means that the other side ended during the call: UnavailableError. So does a write that failed because
    the other side had ended the call; gRPC's asyncio client then reports the failed write and not the other side's status.
    """
    error = error_from(rpc_error)
    if isinstance(error, CancelledError) or error.message == _WRITE_FAILED:
        return UnavailableError("The server ended during the call.", reason=Reason.STAGE_BROKEN_OFF)
    return error


def as_error(exception: BaseException, *, where: str) -> LatentflowError:
    """Any exception as a LatentflowError; an unexpected one becomes InternalError with the place where it was raised."""
    if isinstance(exception, LatentflowError):
        return exception
    if isinstance(exception, grpc.RpcError):
        return error_from(exception)
    return InternalError(f"{where} failed unexpectedly: {type(exception).__name__}: {exception}. See the server's log.")


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _details(rpc_error: grpc.RpcError) -> list[any_pb2.Any]:
    metadata = cast("grpc.Call", rpc_error).trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            status = status_pb2.Status()
            status.ParseFromString(value if isinstance(value, bytes) else value.encode())
            return list(status.details)
    return []
