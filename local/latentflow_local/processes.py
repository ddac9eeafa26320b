"""Starting processes fast: a fork server that has the model servers' libraries imported already.

Importing torch and diffusers takes seconds and would be paid once for every model; the fork server pays it once for all,
and a restart after a crash does not pay it at all. The gateway needs none of it and is an ordinary new process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from multiprocessing.context import ForkServerProcess, SpawnProcess

from latentflow_local.planning import GATEWAY, ProcessSpec

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
            target=_gateway, args=(spec.argv, environment), name=spec.name
        )
        spawned.start()
        return spawned
    forked = multiprocessing.get_context("forkserver").Process(
        target=_node, args=(spec.argv, environment), name=spec.name
    )
    forked.start()
    return forked


def _node(argv: tuple[str, ...], environment: dict[str, str]) -> None:
    _settle(environment)
    from latentflow_nodes.server import main

    main(list(argv))


def _gateway(argv: tuple[str, ...], environment: dict[str, str]) -> None:
    _settle(environment)
    from latentflow_gateway.server import main

    main(list(argv))


def _settle(environment: dict[str, str]) -> None:
    """Death with the supervisor, no Ctrl-C from the terminal (the supervisor passes the end on), the environment."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        threading.Thread(target=_follow, args=(supervisor.sentinel,), name="follow", daemon=True).start()
    os.setpgid(0, 0)
    os.environ.update(environment)


def _follow(sentinel: int) -> None:
    # Ready when the supervisor is gone, however it went. A death signal of the kernel would not do: it follows the fork
    # server, which lives as long as its children do.
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
