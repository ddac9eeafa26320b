"""Starts processes fast, from a fork server that has already imported the model servers' libraries.

To import torch and diffusers takes seconds for every process. The fork server imports them once for all, so that a restart
after a crash is fast too. The gateway needs neither and is an ordinary new process. So is a server on a GPU: diffusers
counts the GPUs when it is imported, and CUDA does not work in a process that is forked after that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess, SpawnProcess

from latentflow.errors import LatentflowError

from latentflow_local.planning import GATEWAY, ProcessSpec

Process = ForkServerProcess | SpawnProcess
# Bytes. The path of a socket has at most 107, and multiprocessing adds a folder and a name.
_LONGEST_FOLDER = 70


def prepare() -> None:
    """Starts the fork server, which imports the libraries in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latentflow_nodes.server"])
    _choose_socket_folder()
    with _shielded():
        forkserver.ensure_running()


def stop_preparing() -> None:
    """Ends the fork server, which may import for many seconds, while it has no child. Starts that wait for it fail with EOFError."""
    # multiprocessing has no public name for it. It starts another fork server when it needs one.
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Processes that are started here never get SIGINT, also while they import: a terminal sends Ctrl-C to all of them.

    The supervisor ends them.
    """
    # Its own start unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _choose_socket_folder() -> None:
    """Makes the fork server's socket fit the kernel's limit for its path, also where TMPDIR is long."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER:
        return
    usual, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        # multiprocessing keeps the folder that it makes at the first call.
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def start(spec: ProcessSpec, *, environment: dict[str, str], failure: Connection) -> Process:
    """Starts a process. It ends when its parent ends, and its parent when this process does.

    Args:
        failure: A pipe's end to write to, which receives the message of the process if it cannot serve. It is closed here.
    """
    target = _gateway if spec.name == GATEWAY else _node
    arguments = (spec.argv, environment, failure)
    process: Process
    if spec.device == "cpu":
        process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments, name=spec.name)
    else:
        process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, name=spec.name)
    with failure, _shielded():
        process.start()
    return process


def message(failure: Connection) -> str | None:
    """The message that an ended process has sent as its failure, from the other end of the pipe; None if it sent none."""
    with failure, contextlib.suppress(EOFError):
        # The end of the pipe counts as something to receive.
        if failure.poll():
            return str(failure.recv())
    return None


def _node(argv: tuple[str, ...], environment: dict[str, str], failure: Connection) -> None:
    _set_up(environment)
    from latentflow_nodes.server import main

    with _sending(failure):
        main(list(argv))


def _gateway(argv: tuple[str, ...], environment: dict[str, str], failure: Connection) -> None:
    _set_up(environment)
    from latentflow_gateway.server import main

    with _sending(failure):
        main(list(argv))


@contextlib.contextmanager
def _sending(failure: Connection) -> Iterator[None]:
    """Sends the error with which a server ends."""
    with failure:
        try:
            yield
        except SystemExit as end:
            if isinstance(end.__cause__, LatentflowError):
                failure.send(end.__cause__.message)
            raise


def _set_up(environment: dict[str, str]) -> None:
    """Sets the environment, ends the process with the supervisor, and shields it from Ctrl-C, which the supervisor handles."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        threading.Thread(target=_end_with, args=(supervisor.sentinel,), name="end-with-supervisor", daemon=True).start()
    os.setpgid(0, 0)
    os.environ.update(environment)


def _end_with(sentinel: int) -> None:
    # The sentinel is ready when the supervisor has ended for any reason. The kernel's parent-death signal does not
    # serve: the parent is the fork server, which lives as long as its children.
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
