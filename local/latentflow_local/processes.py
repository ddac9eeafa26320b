"""Starting processes fast: a fork server that has the model servers' libraries imported already.

Importing torch and diffusers takes seconds and would be paid once for every model; the fork server pays it once for all,
and a restart after a crash does not pay it at all. The gateway needs none of it and is an ordinary new process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess, SpawnProcess

from latentflow_local.planning import GATEWAY, ProcessSpec

_PR_SET_PDEATHSIG = 1
Process = ForkServerProcess | SpawnProcess


def prepare() -> None:
    """Starts the fork server and its imports, so that they go on while other things are done."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latentflow_nodes.server"])
    forkserver.ensure_running()


def start(spec: ProcessSpec, *, environment: dict[str, str]) -> Process:
    """A running process; it dies with its parent, and that with this one."""
    if spec.name == GATEWAY:
        spawned = multiprocessing.get_context("spawn").Process(
            target=_gateway, args=(spec.argv, environment, os.getpid()), name=spec.name
        )
        spawned.start()
        return spawned
    forked = multiprocessing.get_context("forkserver").Process(
        target=_node, args=(spec.argv, environment, os.getpid()), name=spec.name
    )
    forked.start()
    return forked


def _node(argv: tuple[str, ...], environment: dict[str, str], supervisor: int) -> None:
    _settle(environment, supervisor)
    from latentflow_nodes.server import main

    main(list(argv))


def _gateway(argv: tuple[str, ...], environment: dict[str, str], supervisor: int) -> None:
    _settle(environment, supervisor)
    from latentflow_gateway.server import main

    main(list(argv))


def _settle(environment: dict[str, str], supervisor: int) -> None:
    """Death with the parent, no Ctrl-C from the terminal (the supervisor passes the end on), the environment."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(supervisor, 0)
    except ProcessLookupError:
        sys.exit(1)
    os.setpgid(0, 0)
    os.environ.update(environment)
