"""A set of workflows, served on this machine while it is entered: model servers, gateway, and what scales the models."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from latentflow.api import DiffusionWorkflow, Model
from latentflow.internal import serving
from latentflow.internal.metrics import LOCAL, SCHEDULER, Instruments
from latentflow_nodes.settings import usable_cores
from latentflow_nodes.tensors.shared_memory import private_folder
from latentflow_scheduler.policy import Bounds

from latentflow_local import addresses, processes
from latentflow_local.pinning import pinned
from latentflow_local.planning import ProcessSpec, bounds, initial, models_of, plan_gateway, plan_models, room
from latentflow_local.replicas import Replicas
from latentflow_local.scaling import PACE, Pace, Scaler
from latentflow_local.supervisor import Supervised, Supervisor

_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What is running. `target` is the gateway's host:port, `metrics` that of the runtime's own /metrics."""

    target: str
    metrics: str
    supervisor: Supervisor

    @property
    def supervised(self) -> dict[str, Supervised]:
        """The processes, by `ProcessSpec.name`: the gateway and every replica of every model."""
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
    cores: int | None = None,
    pace: Pace = PACE,
    log_format: str = "console",
    log_level: str = "INFO",
    changed: Callable[[Supervised], None] = lambda _: None,
) -> AsyncIterator[Runtime]:
    """Starts everything; not yet ready when entered (see `Supervisor.ready`). Ends everything when left.

    Args:
        listen: The gateway's host:port; port 0 takes a free one.
        metrics: host:port for this process's own /metrics; port 0 takes a free one.
        threads, device: For every model, over what the workflows say.
        drain: Seconds that running requests get at the end of a process.
        cores: Of this machine, for the models; None: those that this process may use.
        pace: How fast models are scaled.
        log_level: Least level that the processes log.
    """
    processes.prepare()
    workflows = await asyncio.to_thread(pinned, workflows)
    models = models_of(workflows)
    target, metrics = addresses.check_free(listen), addresses.check_free(metrics)
    cores = cores or usable_cores()
    instruments = Instruments((*LOCAL, *SCHEDULER))
    serving.serve_metrics(instruments, metrics)
    with (
        contextlib.closing(instruments),
        tempfile.TemporaryDirectory(prefix="latentflow-") as folder,
        private_folder() as shared_memory,
    ):
        free = addresses.free(2 * sum(map(initial, models.values())) + 1)
        firsts = plan_models(
            workflows,
            model_root=model_root.absolute(),
            addresses={name: (free[2 * i], free[2 * i + 1]) for i, name in enumerate(models)},
            threads=threads,
            device=device,
            cores=cores,
            turn_file=Path(folder) / "turn",
            shared_memory=shared_memory,
            log_format=log_format,
        )
        specs = [*firsts, *_others(firsts, models, free[2 * len(models) :])]
        directory = Path(folder) / "directory.json"
        gateway = plan_gateway(directory=directory, listen=target, metrics=free[-1], log_format=log_format)
        supervisor = Supervisor(
            [*specs, gateway],
            environment={"LATENTFLOW_TOKEN": secrets.token_hex(16), "LATENTFLOW_LOG_LEVEL": log_level},
            drain=drain,
            changed=changed,
            metrics=instruments,
        )
        rooms = {name: room(model, threads=threads, device=device, cores=cores) for name, model in models.items()}
        scaler = Scaler(
            Replicas(specs, workflows=workflows, path=directory, supervisor=supervisor),
            bounds={name: _bounds(name, model, room=rooms[name]) for name, model in models.items()},
            gateway=gateway.metrics,
            pace=pace,
            metrics=instruments,
        )
        async with supervisor:
            scaling = asyncio.create_task(scaler.run())
            try:
                yield Runtime(target=target, metrics=metrics, supervisor=supervisor)
            finally:
                scaling.cancel()
                await asyncio.gather(scaling, return_exceptions=True)


def _bounds(name: str, model: Model, *, room: int | None) -> Bounds:
    found, asked = bounds(model, room=room), model.scaling.max_replicas
    if model.scaling.mode == "Managed" and found.most < asked:
        _log.warning(
            "fewer replicas than maxReplicas allows: each takes its threads (--threads) of the cores",
            model=name,
            most=found.most,
            max_replicas=asked,
        )
    return found


def _others(firsts: list[ProcessSpec], models: Mapping[str, Model], free: list[str]) -> list[ProcessSpec]:
    """The replicas that models start with beside their first."""
    wanted = [(first, number) for first in firsts for number in range(2, initial(models[first.model]) + 1)]
    return [
        first.another(number, address=free[2 * i], metrics=free[2 * i + 1]) for i, (first, number) in enumerate(wanted)
    ]
