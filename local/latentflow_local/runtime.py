"""A set of workflows, served on this machine while it is entered: model servers, gateway, and the file between them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from latentflow.api import DiffusionWorkflow
from latentflow.directory import Directory, Replicas
from latentflow.errors import FailedPreconditionError
from latentflow.metrics import LOCAL, Instruments
from latentflow_nodes.memory import private_folder
from latentflow_nodes.settings import usable_cores

from latentflow_local import processes
from latentflow_local.pinning import pinned
from latentflow_local.planning import models_of, plan_gateway, plan_models
from latentflow_local.supervisor import Supervised, Supervisor


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What is running. `target` is the gateway's host:port, `metrics` that of the runtime's own /metrics."""

    target: str
    metrics: str
    supervisor: Supervisor

    @property
    def supervised(self) -> dict[str, Supervised]:
        """The processes, by the model's identity or "gateway"."""
        return self.supervisor.supervised


@contextlib.asynccontextmanager
async def run(
    workflows: list[DiffusionWorkflow],
    *,
    model_root: Path = Path("models"),
    listen: str = "127.0.0.1:8400",
    metrics: str = "127.0.0.1:0",
    threads: int | None = None,
    device: str | None = None,
    drain: float = 10.0,
    log_format: str = "console",
    log_level: str = "INFO",
    changed: Callable[[Supervised], None] = lambda _: None,
) -> AsyncIterator[Runtime]:
    """Starts everything; not yet ready when entered (see `Supervisor.ready`). Ends everything when left.

    Args:
        listen: The gateway's host:port; port 0 takes a free one.
        metrics: host:port for this process's own /metrics; port 0 takes a free one.
        threads, device: For every model, over what the workflows say.
        drain: Seconds that running requests get at the end.
        log_level: Least level that the processes log.
    """
    processes.prepare()
    workflows = await asyncio.to_thread(pinned, workflows)
    models = models_of(workflows)
    target, metrics = _check_free(listen), _check_free(metrics)
    host, _, port = metrics.rpartition(":")
    instruments = Instruments(LOCAL)
    instruments.serve(host=host, port=int(port))
    with (
        contextlib.closing(instruments),
        tempfile.TemporaryDirectory(prefix="latentflow-") as folder,
        private_folder() as shared_memory,
    ):
        free = _free_addresses(2 * len(models) + 1)
        addresses = {name: (free[2 * i], free[2 * i + 1]) for i, name in enumerate(models)}
        specs = plan_models(
            workflows,
            model_root=model_root.absolute(),
            addresses=addresses,
            threads=threads,
            device=device,
            cores=usable_cores(),
            turn_file=Path(folder) / "turn",
            shared_memory=shared_memory,
            log_format=log_format,
        )
        directory = Path(folder) / "directory.json"
        Directory(
            workflows=tuple(workflows),
            models={spec.name: Replicas(role=models[spec.name].role, replicas=(spec.address,)) for spec in specs},
        ).write(directory)
        gateway = plan_gateway(directory=directory, listen=target, metrics=free[-1], log_format=log_format)
        supervisor = Supervisor(
            [*specs, gateway],
            environment={"LATENTFLOW_TOKEN": secrets.token_hex(16), "LATENTFLOW_LOG_LEVEL": log_level},
            drain=drain,
            changed=changed,
            metrics=instruments,
        )
        async with supervisor:
            yield Runtime(target=target, metrics=metrics, supervisor=supervisor)


def _free_addresses(count: int) -> list[str]:
    """Ports that are free now, all different; a server that finds its own taken says so."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def _check_free(listen: str) -> str:
    """The address, its port chosen; FailedPreconditionError where it is taken."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise FailedPreconditionError(
            f"{listen!r} is no address to listen on; write host:port, such as 127.0.0.1:8400."
        )
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
            return f"{host}:{probe.getsockname()[1]}"
    except OSError as error:
        raise FailedPreconditionError(
            f"{listen} cannot be listened on ({error.strerror}): is another gateway running? Stop it, or choose another "
            "address.",
            reason="PORT_TAKEN",
        ) from None
