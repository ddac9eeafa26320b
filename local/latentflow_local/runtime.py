"""Serves a set of workflows on this machine: starts model servers and the gateway, and scales the models."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import structlog
from latentflow.api import DiffusionWorkflow, Model
from latentflow.internal import serving
from latentflow.internal.metrics import LOCAL, SCHEDULER, Instruments
from latentflow.internal.rpc import Tls
from latentflow_nodes.settings import usable_cores
from latentflow_nodes.tensors.shared_memory import private_folder
from latentflow_scheduler.policy import Bounds

from latentflow_local import devices, processes
from latentflow_local.addresses import Addresses
from latentflow_local.pinning import pinned
from latentflow_local.planning import (
    ProcessSpec,
    bounds,
    capacity,
    initial,
    models_of,
    next_gpu,
    on_gpu,
    plan_gateway,
    plan_models,
)
from latentflow_local.replicas import Replicas
from latentflow_local.scaling import DEFAULT_SCALING, Scaler, ScalingConfig
from latentflow_local.supervisor import Supervised, Supervisor
from latentflow_local.targets import TargetsFile

_log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A running runtime.

    Attributes:
        target: host:port of the gateway.
        http: host:port of the gateway's HTTP API; None: it is not served.
        metrics: host:port of the runtime's own `/metrics`.
    """

    target: str
    http: str | None
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
    http: str | None = None,
    cors_origins: Sequence[str] = (),
    api_keys: Path | None = None,
    tls: Tls | None = None,
    limits: Mapping[str, float | None] = MappingProxyType({}),
    metrics: str = "127.0.0.1:0",
    targets: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    drain: float = 10.0,
    cores: int | None = None,
    scaling: ScalingConfig = DEFAULT_SCALING,
    log_format: str = "console",
    log_level: str = "INFO",
    on_change: Callable[[Supervised], None] = lambda _: None,
) -> AsyncIterator[Runtime]:
    """Starts all processes when entered and ends them when left.

    `Supervisor.wait_ready` waits until they accept requests.

    Args:
        listen: host:port of the gateway; port 0 selects a free port.
        http: host:port of the gateway's HTTP API; port 0 selects a free port. None: it is not served.
        cors_origins: Origins of web pages that may use the HTTP API; "*": all.
        api_keys: Folder with one file for each client, which holds its API key; None: clients need no key.
        tls: Certificate and key of the gateway, for gRPC and HTTP; None: without TLS.
        limits: The largest values of a request by the gateway's options for them, such as "max-pixels"; None: its default.
        metrics: host:port of this process's own `/metrics`; port 0 selects a free port.
        targets: File to write that lists the `/metrics` of all processes for Prometheus (`file_sd_configs`).
        threads, device: Override the workflows' values for every model.
        drain: Seconds that running requests get when a process is ended.
        cores: Cores of this machine that the models may use; None: those that this process may use.
        scaling: How models are scaled.
        log_level: Least level that the processes log.
        on_change: Called after every change of a process's state.
    """
    if tls is not None:
        tls.check()
    instruments = Instruments((*LOCAL, *SCHEDULER))
    with (
        Addresses() as addresses,
        contextlib.closing(instruments),
        tempfile.TemporaryDirectory(prefix="latentflow-") as folder,
        private_folder() as shared_memory,
    ):
        target, metrics = addresses.of(listen), addresses.of(metrics)
        http = addresses.of(http) if http else None
        serving.serve_metrics(instruments, metrics)
        processes.prepare()
        workflows = await asyncio.to_thread(pinned, workflows)
        models = models_of(workflows)
        cores = cores or usable_cores()
        uses_gpus = any(on_gpu(model, device=device) for model in models.values())
        gpus = await asyncio.to_thread(devices.gpus) if uses_gpus else 0
        free = addresses.free(2 * sum(map(initial, models.values())) + 1)
        firsts = plan_models(
            workflows,
            model_root=model_root.absolute(),
            addresses={name: (free[2 * i], free[2 * i + 1]) for i, name in enumerate(models)},
            threads=threads,
            device=device,
            cores=cores,
            gpus=gpus,
            compute_lock=Path(folder) / "compute.lock",
            shared_memory=shared_memory,
            log_format=log_format,
        )
        specs = [*firsts, *_additional(firsts, models, free[2 * len(models) :], gpus=gpus)]
        directory = Path(folder) / "directory.json"
        gateway = plan_gateway(
            directory=directory,
            listen=target,
            http=http,
            cors_origins=cors_origins,
            api_keys=api_keys.absolute() if api_keys else None,
            tls=tls,
            limits=limits,
            metrics=free[-1],
            log_format=log_format,
        )
        supervisor = Supervisor(
            [*specs, gateway],
            environment={"LATENTFLOW_TOKEN": secrets.token_hex(16), "LATENTFLOW_LOG_LEVEL": log_level},
            drain=drain,
            on_change=on_change,
            metrics=instruments,
        )
        capacities = {
            name: capacity(model, threads=threads, device=device, cores=cores) for name, model in models.items()
        }
        scaler = Scaler(
            Replicas(
                specs,
                workflows=workflows,
                gpus=gpus,
                path=directory,
                targets=TargetsFile(targets, always={"up": metrics, gateway.name: gateway.metrics})
                if targets
                else None,
                supervisor=supervisor,
                addresses=addresses,
            ),
            bounds={name: _bounds(name, model, capacity=capacities[name]) for name, model in models.items()},
            gateway=gateway.metrics,
            config=scaling,
            metrics=instruments,
        )
        async with supervisor:
            task = asyncio.create_task(scaler.run())
            try:
                yield Runtime(target=target, http=http, metrics=metrics, supervisor=supervisor)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _bounds(name: str, model: Model, *, capacity: int | None) -> Bounds:
    found, requested = bounds(model, capacity=capacity), model.scaling.max_replicas
    if model.scaling.mode == "Managed" and found.maximum < requested:
        _log.warning(
            "the cores allow fewer replicas than maxReplicas; each replica uses its threads (--threads) of the cores",
            model=name,
            replicas=found.maximum,
            max_replicas=requested,
        )
    return found


def _additional(
    firsts: list[ProcessSpec], models: Mapping[str, Model], free: list[str], *, gpus: int
) -> list[ProcessSpec]:
    """The replicas that models start with in addition to their first."""
    additional: list[ProcessSpec] = []
    for first in firsts:
        for number in range(2, initial(models[first.model]) + 1):
            address, metrics = free[2 * len(additional) : 2 * len(additional) + 2]
            gpu = next_gpu(first.device, [*firsts, *additional], gpus=gpus, ranks=first.ranks)
            additional.append(first.another(number, address=address, metrics=metrics, gpu=gpu))
    return additional
