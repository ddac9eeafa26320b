"""What every server process does at its start and end: bind ports, end in order at a signal, exit with a message."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import NoReturn

import grpc.aio

from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal import hosts, rpc
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The exit code of a process that cannot serve with its settings: starting it again would change nothing.
CANNOT_SERVE = 2


def bind(server: grpc.aio.Server, listen: str, *, tls: rpc.Tls | None) -> str:
    """Binds a gRPC server to host:port, where port 0 takes a free one. Returns host:port with the port bound.

    FailedPreconditionError, reason PORT_TAKEN, where it cannot be bound.
    """
    host, wanted = hosts.split(listen)
    where = hosts.join(host, wanted)
    try:
        port = (
            server.add_insecure_port(where) if tls is None else server.add_secure_port(where, tls.server_credentials())
        )
    except RuntimeError as error:
        raise port_taken(listen, error) from None
    if not port:
        raise port_taken(listen, "gRPC could not bind it")
    return hosts.join(host, port)


def serve_metrics(metrics: Instruments, listen: str) -> int:
    """Serves /metrics on host:port, where port 0 takes a free one. Returns the port.

    FailedPreconditionError, reason PORT_TAKEN, where it cannot be bound.
    """
    host, port = hosts.split(listen)
    try:
        return metrics.serve(host=hosts.bindable(host), port=port)
    except OSError as error:
        raise port_taken(listen, error.strerror or error) from None


def port_taken(listen: str, problem: object) -> FailedPreconditionError:
    """The error of an address that a server cannot listen on."""
    return FailedPreconditionError(
        f"The server cannot listen on {listen}: {problem}. Another process may use the port: stop it, or choose "
        "another address.",
        reason=Reason.PORT_TAKEN,
    )


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set, from now on until the event loop ends."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signum in SIGNALS:
        loop.add_signal_handler(signum, stop.set)
    return stop


def run(program: str, work: Coroutine[object, object, None]) -> None:
    """Runs a server's main coroutine. A LatentflowError becomes a line on stderr and the exit code CANNOT_SERVE."""
    try:
        asyncio.run(work)
    except LatentflowError as error:
        exit_with(program, error)


def exit_with(program: str, error: LatentflowError, *, code: int = CANNOT_SERVE) -> NoReturn:
    """Ends the process with an error's message as a line on stderr."""
    print(f"{program}: {error.message}", file=sys.stderr)
    raise SystemExit(code) from error
