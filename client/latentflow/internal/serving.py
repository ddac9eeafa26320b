"""What every server process does at its start and end: bind ports, end in order at a signal, exit with a message."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine
from typing import NoReturn

import grpc.aio
import structlog

from latentflow.errors import FailedPreconditionError, LatentflowError
from latentflow.internal import hosts, rpc
from latentflow.internal.metrics import Instruments
from latentflow.reasons import Reason

_log = structlog.get_logger()
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The exit code of a process that cannot serve with its settings: starting it again would change nothing.
CANNOT_SERVE = 2


def bind(server: grpc.aio.Server, listen: str, *, tls: rpc.Tls | None) -> str:
    """Binds a gRPC server to host:port, where port 0 takes a free one. Returns host:port with the port bound.

    FailedPreconditionError, reason PORT_TAKEN, where it cannot be bound.
    """
    if tls is not None and (refusal := tls.refusal()):
        _log.warning("clients refuse the TLS certificate", certificate=str(tls.certificate), problem=refusal)
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


def exit_at_signals() -> None:
    """Ends the process at once, with exit code 0, at SIGTERM and SIGINT, until `stop_signal` takes them over.

    Only the main thread runs Python's signal handlers, and only between two instructions: a signal that arrives just before
    it waits for another thread is handled after the wait. Python writes to a pipe as soon as a signal arrives, whatever
    its threads do, so a thread that reads the pipe misses none.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def exit_at_first() -> None:
        os.read(reading, 1)
        os._exit(0)

    threading.Thread(target=exit_at_first, name="exit-at-signals", daemon=True).start()
    signal.set_wakeup_fd(writing)
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)


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
