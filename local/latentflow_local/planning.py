"""Which processes a set of workflows needs: pure. One for each replica of a distinct model, one for the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

from latentflow.api import DiffusionWorkflow, Model, distinct_models, identity
from latentflow.errors import InvalidRequestError, UnimplementedError
from latentflow_scheduler.policy import Bounds

GATEWAY = "gateway"
_SERVED_SCHEMES = ("", "file", "hf", "s3")


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """A process to keep running.

    Attributes:
        name: The model's identity, with a number after it for all but the first of its replicas; or "gateway".
        model: The model's identity, or "gateway".
        role: The model's role, or "Gateway".
        uses: "workflow:name" of every use.
        address: host:port it serves on, the same after a restart.
        metrics: host:port of its /metrics, likewise.
        options: Arguments of its `main`, beside the two addresses.
    """

    name: str
    model: str
    role: str
    uses: tuple[str, ...]
    address: str
    metrics: str
    options: tuple[str, ...]

    @property
    def argv(self) -> tuple[str, ...]:
        """Arguments of its `main`."""
        return (*self.options, f"--listen={self.address}", f"--metrics={self.metrics}")

    def another(self, number: int, *, address: str, metrics: str) -> ProcessSpec:
        """Another replica of the model. Only its name and addresses differ, so that it makes the same pixels.

        Args:
            number: From 1, which is the first.
        """
        name = self.model if number == 1 else f"{self.model}-{number}"
        return replace(self, name=name, address=address, metrics=metrics)


def models_of(workflows: list[DiffusionWorkflow]) -> dict[str, Model]:
    """The distinct models, refused where the embedded runtime cannot serve one."""
    doubled = {w.full_name for w in workflows if sum(o.full_name == w.full_name for o in workflows) > 1}
    if doubled:
        raise InvalidRequestError(f"Two workflows are named {sorted(doubled)[0]}; give them different names.")
    for workflow in workflows:
        where = f"Workflow {workflow.full_name}"
        if workflow.spec.task != "TextToImage":
            raise UnimplementedError(f"{where} has the task {workflow.spec.task}; this version serves TextToImage.")
        for model in workflow.spec.models:
            if model.source is None:
                raise UnimplementedError(
                    f"{where}: model {model.name!r} is a modelRef, which names an object in a cluster; give it a source here."
                )
            scheme = urlparse(model.source.uri).scheme
            if scheme not in _SERVED_SCHEMES:
                raise UnimplementedError(
                    f"{where}: model {model.name!r} comes from {model.source.uri}; the embedded runtime reads folders, "
                    f"file://, hf:// and s3:// only; {scheme}:// needs a cluster."
                )
    return distinct_models(workflows)


def plan_models(
    workflows: list[DiffusionWorkflow],
    *,
    model_root: Path,
    addresses: dict[str, tuple[str, str]],
    threads: int | None,
    device: str | None,
    cores: int,
    turn_file: Path,
    shared_memory: Path | None,
    log_format: str,
) -> list[ProcessSpec]:
    """A model server for each distinct model: its first replica.

    Args:
        addresses: By identity host:port for gRPC and for /metrics.
        threads, device: For every model, over what the workflow says; None: as it says.
        cores: How many this machine has for them.
        turn_file: What servers share that would be in each other's way, computing at the same time.
        shared_memory: The folder through which tensors go between them; None: over gRPC.
    """
    over = {key: value for key, value in (("threads", threads), ("device", device)) if value is not None}
    specs = []
    for name, model in models_of(workflows).items():
        uses = tuple(f"{w.name}:{m.name}" for w in workflows for m in w.spec.models if identity(m) == name)
        options = _options(name, model, model_root, log_format) | over
        options["shared-memory"] = shared_memory
        own_threads = threads or model.engine.threads or cores
        if own_threads > 1 and room(model, threads=threads, device=device, cores=cores) == 1:
            options["turn-file"] = turn_file
        specs.append(
            ProcessSpec(
                name=name,
                model=name,
                role=model.role.value,
                uses=uses,
                address=addresses[name][0],
                metrics=addresses[name][1],
                options=_argv(options),
            )
        )
    return specs


def plan_gateway(*, directory: Path, listen: str, metrics: str, log_format: str) -> ProcessSpec:
    """The gateway."""
    return ProcessSpec(
        name=GATEWAY,
        model=GATEWAY,
        role="Gateway",
        uses=(),
        address=listen,
        metrics=metrics,
        options=(f"--directory={directory}", f"--log-format={log_format}"),
    )


def room(model: Model, *, threads: int | None, device: str | None, cores: int) -> int | None:
    """How many replicas of a model can compute at a time without being in each other's way, at least one; None where
    cores do not limit it. Arguments as those of `plan_models`."""
    if (device or model.engine.device) != "cpu":
        return None
    return max(1, cores // (threads or model.engine.threads or cores))


def initial(model: Model) -> int:
    """How many replicas a model starts with: enough to serve."""
    return max(1, model.scaling.min_replicas)


def bounds(model: Model, *, room: int | None) -> Bounds:
    """Between how many replicas a model is scaled on this machine; equal where it is not.

    More than there is room for would compute in turns, and no request would be done sooner; `minReplicas` there are in
    any case. An External model stays as it starts, as nobody else scales processes.

    Args:
        room: As `room` says.
    """
    scaling = model.scaling
    if scaling.mode == "External":
        return Bounds(fewest=initial(model), most=initial(model))
    most = scaling.max_replicas if room is None else min(scaling.max_replicas, room)
    return Bounds(fewest=scaling.min_replicas, most=max(most, initial(model)))


def _options(name: str, model: Model, root: Path, log_format: str) -> dict[str, str | int | Path | None]:
    source, engine = model.source, model.engine
    if source is None:
        raise InvalidRequestError(f"Model {name} has no source.")
    return {
        "role": model.role.value,
        "uri": source.uri,
        "subfolder": source.subfolder,
        "revision": source.revision,
        "model-root": root,
        "identity": name,
        "threads": engine.threads,
        "device": engine.device,
        "dtype": model.dtype,
        "max-running": engine.max_running,
        "max-waiting": engine.max_waiting,
        "log-format": log_format,
    }


def _argv(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(f"--{key}={value}" for key, value in options.items() if value is not None)
