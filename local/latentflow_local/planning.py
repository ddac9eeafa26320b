"""The processes that a set of workflows needs: one for each replica of a distinct model, one for the gateway. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

from latentflow.api import DiffusionWorkflow, Model, distinct_models, identity
from latentflow.api.types import Engine, problems
from latentflow.errors import InvalidRequestError, UnimplementedError
from latentflow.internal.rpc import Tls
from latentflow_scheduler.policy import Bounds
from pydantic import ValidationError

GATEWAY = "gateway"
_SERVED_SCHEMES = ("", "file", "hf", "s3")
# Of the largest image, the sides in default sides, and the pixels.
_SIDES, _LARGEST = 4, 2048 * 2048


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """A process that the supervisor keeps running.

    Attributes:
        name: The model's identity, with a number after it for all but the first of its replicas; or "gateway".
        model: The model's identity, or "gateway".
        role: The model's role, or "Gateway".
        uses: "workflow:name" of every use of the model.
        address: host:port of its gRPC server; the same after a restart.
        metrics: host:port of its `/metrics`; the same after a restart.
        options: Arguments of its `main`, except the engine and the two addresses.
        engine: How its model is run; None: it runs no model.
        gpu: Number of the GPU that its device "cuda" means; None: the first GPU.
        ranks: Number of its ranks, each of which uses a GPU: `gpu` and those after it.
    """

    name: str
    model: str
    role: str
    uses: tuple[str, ...]
    address: str
    metrics: str
    options: tuple[str, ...]
    engine: Engine | None = None
    gpu: int | None = None
    ranks: int = 1

    @property
    def device(self) -> str | None:
        """The device of its model; None: it runs no model."""
        return self.engine.device if self.engine else None

    @property
    def argv(self) -> tuple[str, ...]:
        """Arguments of its `main`."""
        engine = self.engine.options() if self.engine else {}
        if self.gpu is not None:
            engine["device"] = f"cuda:{self.gpu}"
        run = (f"--engine={json.dumps(engine)}",) if engine else ()
        return (*self.options, *run, f"--listen={self.address}", f"--metrics={self.metrics}")

    def another(self, number: int, *, address: str, metrics: str, gpu: int | None = None) -> ProcessSpec:
        """Another replica of the model. Only its name, addresses and GPU differ, so that it produces the same pixels.

        Args:
            number: Of the replica; the first has 1.
        """
        name = self.model if number == 1 else f"{self.model}-{number}"
        return replace(self, name=name, address=address, metrics=metrics, gpu=gpu)


def models_of(workflows: list[DiffusionWorkflow]) -> dict[str, Model]:
    """The distinct models. Raises an error for a model that the embedded runtime cannot serve."""
    duplicates = {w.full_name for w in workflows if sum(o.full_name == w.full_name for o in workflows) > 1}
    if duplicates:
        raise InvalidRequestError(f"Two workflows have the name {sorted(duplicates)[0]}; give them different names.")
    for workflow in workflows:
        where = f"Workflow {workflow.full_name}"
        for model in workflow.spec.models:
            if model.source is None:
                raise UnimplementedError(
                    f"{where}: model {model.name!r} is a modelRef, which names an object in a cluster; give it a source instead."
                )
            for source in model.sources().values():
                scheme = urlparse(source.uri).scheme
                if scheme not in _SERVED_SCHEMES:
                    raise UnimplementedError(
                        f"{where}: model {model.name!r} comes from {source.uri}; the embedded runtime reads folders, "
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
    gpus: int,
    compute_lock: Path,
    shared_memory: Path | None,
    log_format: str,
) -> list[ProcessSpec]:
    """The first replica of each distinct model.

    Args:
        addresses: host:port for gRPC and host:port for `/metrics`, by identity.
        threads, device: Override the workflows' values for every model; None: no override.
        cores: Cores of this machine that the models may use.
        gpus: GPUs of this machine; models on "cuda" are spread over them.
        compute_lock: File of the lock that servers share if they would compete for the cores.
        shared_memory: Folder of the shared memory through which servers transfer tensors; None: they use gRPC.
    """
    overrides = {key: value for key, value in (("threads", threads), ("device", device)) if value is not None}
    specs: list[ProcessSpec] = []
    for name, model in models_of(workflows).items():
        uses = tuple(f"{w.name}:{m.name}" for w in workflows for m in w.spec.models if identity(m) == name)
        options = _options(name, model, model_root, log_format)
        engine = _overridden(model, overrides)
        options["shared-memory"] = shared_memory
        ranks = model.parallelism.tensor_degree
        used = _cores(model, threads=threads, cores=cores)
        if used > 1 and capacity(model, threads=threads, device=device, cores=cores) == 1:
            options["compute-lock"] = compute_lock
        specs.append(
            ProcessSpec(
                name=name,
                model=name,
                role=model.role.value,
                uses=uses,
                address=addresses[name][0],
                metrics=addresses[name][1],
                options=_argv(options),
                engine=engine,
                gpu=next_gpu(engine.device, specs, gpus=gpus, ranks=ranks),
                ranks=ranks,
            )
        )
    return specs


def next_gpu(device: str | None, others: Iterable[ProcessSpec], *, gpus: int, ranks: int = 1) -> int | None:
    """The GPU with the fewest of the other processes; None if the device is not "cuda" or there is only one GPU.

    Args:
        ranks: Number of GPUs that the process uses; the first of them is returned. InvalidRequestError for more than there are.
    """
    if device != "cuda" or (gpus < 2 and ranks == 1):
        return None
    if ranks > gpus:
        raise InvalidRequestError(
            f"parallelism.tensor {ranks} needs as many GPUs, and this machine has {gpus}; lower it, or use --device cpu."
        )
    taken = Counter(spec.gpu + rank for spec in others if spec.gpu is not None for rank in range(spec.ranks))
    return min(range(gpus - ranks + 1), key=lambda first: sum(taken[first + rank] for rank in range(ranks)))


def plan_gateway(
    *,
    directory: Path,
    listen: str,
    http: str | None,
    cors_origins: Sequence[str],
    api_keys: Path | None,
    tls: Tls | None,
    limits: Mapping[str, float | None],
    metrics: str,
    log_format: str,
) -> ProcessSpec:
    """The gateway's process.

    Args:
        http: host:port of the HTTP API; None: it is not served.
        cors_origins: Origins of web pages that may use the HTTP API.
        api_keys: Folder of the clients' API keys; None: clients need no key.
        tls: Certificate and key for gRPC and HTTP; None: without TLS.
        limits: The largest values of a request by the gateway's options for them, such as "max-pixels"; None: its default.
    """
    return ProcessSpec(
        name=GATEWAY,
        model=GATEWAY,
        role="Gateway",
        uses=(),
        address=listen,
        metrics=metrics,
        options=(
            f"--directory={directory}",
            f"--http-listen={http or 'none'}",
            *(f"--http-cors-origin={origin}" for origin in cors_origins),
            *_argv({"api-keys": api_keys} | dict(limits)),
            *(_argv({"tls-cert": tls.certificate, "tls-key": tls.key}) if tls else ()),
            f"--log-format={log_format}",
        ),
    )


def max_pixels(workflows: Iterable[DiffusionWorkflow]) -> int:
    """Most pixels of an image by default: 4 times the default width and height of any of the workflows, at most 2048x2048.

    A default size itself is always accepted. A forward pass takes time and memory that grow faster than the pixels, so a size far
    above the default is a mistake: a network that is made for 64x64 pixels takes minutes for an image of 1024x1024.
    """
    sizes = (workflow.spec.defaults.width * workflow.spec.defaults.height for workflow in workflows)
    return max(max(size, min(_SIDES**2 * size, _LARGEST)) for size in sizes)


def capacity(model: Model, *, threads: int | None, device: str | None, cores: int) -> int | None:
    """How many replicas of a model can compute at the same time on cores of their own, at least 1;

    None if cores do not limit it.

    The arguments are those of `plan_models`.
    """
    if on_gpu(model, device=device):
        return None
    return max(1, cores // _cores(model, threads=threads, cores=cores))


def _cores(model: Model, *, threads: int | None, cores: int) -> int:
    """How many cores a replica uses on the CPU: each of its ranks has at least one thread."""
    return max(threads or model.engine.threads or cores, model.parallelism.tensor_degree)


def on_gpu(model: Model, *, device: str | None) -> bool:
    """Whether a model runs on a GPU. The arguments are those of `plan_models`."""
    return (device or model.engine.device) != "cpu"


def initial(model: Model) -> int:
    """How many replicas a model starts with: at least one, so that it can serve."""
    return max(1, model.scaling.min_replicas)


def bounds(model: Model, *, capacity: int | None) -> Bounds:
    """The bounds between which a model is scaled on this machine; both are equal if it is not scaled.

    Replicas above the capacity would compete for the cores and complete no request sooner. `minReplicas` are started in
    any case. An External model keeps its initial replicas, because nothing else scales processes.

    Args:
        capacity: The result of `capacity`.
    """
    scaling = model.scaling
    if scaling.mode == "External":
        return Bounds(minimum=initial(model), maximum=initial(model))
    maximum = scaling.max_replicas if capacity is None else min(scaling.max_replicas, capacity)
    return Bounds(minimum=scaling.min_replicas, maximum=max(maximum, initial(model)))


def _options(name: str, model: Model, root: Path, log_format: str) -> dict[str, str | int | Path | None]:
    source = model.source
    if source is None:
        raise InvalidRequestError(f"Model {name} has no source.")
    return {
        "role": model.role.value,
        "uri": source.uri,
        "subfolder": source.subfolder,
        "revision": source.revision,
        "variant": source.variant,
        "nets": model.nets_option(),
        "model-root": root,
        "identity": name,
        "dtype": model.dtype,
        "tensor": degree if (degree := model.parallelism.tensor_degree) > 1 else None,
        "log-format": log_format,
    }


def _overridden(model: Model, overrides: Mapping[str, object]) -> Engine:
    try:
        return model.engine.override(model.role, overrides)
    except ValidationError as error:
        raise InvalidRequestError(
            f"Model {model.name!r} cannot run with the options given: {problems(error)}."
        ) from None


def _argv(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(f"--{key}={value}" for key, value in options.items() if value is not None)
