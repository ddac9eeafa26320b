"""The manifests of the objects that serve one model: pure, from a DiffusionModel.

The reconciler applies them by server-side apply. Pods comply with the restricted Pod Security Standard. A colocated
model has only a Service; its container is in the pods of its host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlparse

from latentflow.api import API_VERSION, Role
from latentflow.api.types import MODEL_LABEL, ROLE_LABEL, ColocatedModel, ModelSpec, Pod

from latentflow_operator.settings import OperatorSettings

Manifest = dict[str, Any]


class OwnerReference(NamedTuple):
    """A workflow that owns a model."""

    name: str
    uid: str


class ContainerPorts(NamedTuple):
    """The container of a model's server in its pod, its ports by name and number, and whether it shares memory."""

    container: str
    grpc: str
    grpc_port: int
    metrics: str
    metrics_port: int
    shares_memory: bool


MANAGED = {"app.kubernetes.io/managed-by": "latentflow-operator"}

GRPC_PORT, METRICS_PORT = 8500, 8501
# A colocated model's ports are these plus its index; no other port is in these ranges, so that network policies can
# name them.
_COLOCATED_GRPC, _COLOCATED_METRICS = 8510, 8610
_MODEL_ROOT, _CACHE, _SOURCE, _NETS, _MEMORY = "/models", "/cache", "/source", "/nets", "/memory"
# Seconds after the drain in which peers fetch the remaining tensors and the process ends.
_GRACE_BEYOND_DRAIN = 30
# With Surge a new replica is ready before an old one is removed, so that a new image interrupts no request.
_ROLLOUTS = {"Surge": {"maxSurge": 1, "maxUnavailable": 0}, "Replace": {"maxSurge": 0, "maxUnavailable": 1}}
# A start may download weights, so it gets a day, in periods of ten seconds.
_START_PROBES, _PROBE_SECONDS = 8640, 10


def model_manifest(*, name: str, namespace: str, spec: ModelSpec, owners: Sequence[OwnerReference]) -> Manifest:
    """A DiffusionModel that workflows own together, without its replicas, which autoscalers write."""
    return {
        "apiVersion": API_VERSION,
        "kind": "DiffusionModel",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels(name, spec.role),
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": "DiffusionWorkflow",
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": False,
                    "blockOwnerDeletion": False,
                }
                for owner in owners
            ],
        },
        "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"replicas"}),
    }


def manifests(
    *, name: str, namespace: str, uid: str, spec: ModelSpec, settings: OperatorSettings
) -> tuple[Manifest, ...]:
    """Deployment, Service and PodDisruptionBudget of a DiffusionModel, owned by it; for a colocated model the Service only.

    Args:
        name, namespace, uid: Of the DiffusionModel.
    """
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": labels(name, spec.role),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": "DiffusionModel",
                "name": name,
                "uid": uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }
    host = pods_of(name, spec)
    ports = _container_ports(name, spec.host.index if spec.host else 0)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            # Headless, because gateways choose the replica themselves.
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector(host),
            "ports": [
                {"name": "grpc", "port": ports.grpc_port, "targetPort": ports.grpc, "appProtocol": "grpc"},
                {"name": "metrics", "port": ports.metrics_port, "targetPort": ports.metrics},
            ],
        },
    }
    if spec.host is not None:
        return (service,)
    return (
        _deployment(name, metadata, spec, settings),
        service,
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata,
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector(name)}},
        },
    )


def selector(name: str) -> dict[str, str]:
    """The labels that select a model's pods."""
    return {MODEL_LABEL: name}


def pods_of(name: str, spec: ModelSpec) -> str:
    """The model in whose pods a model runs: its host, or itself."""
    return spec.host.model if spec.host is not None else name


def is_own_container(name: str, spec: ModelSpec) -> Callable[[str], bool]:
    """Whether a container of the model's pods, by name, belongs to it and not to a model that shares the pods."""
    if spec.host is not None:
        return lambda container: container == name
    others = {one.model for one in spec.colocated or ()}
    return lambda container: container not in others


def labels(name: str, role: Role) -> dict[str, str]:
    """The labels of every object that serves a model."""
    return selector(name) | {
        ROLE_LABEL: role.value,
        "app.kubernetes.io/name": "latentflow",
        "app.kubernetes.io/component": "node",
        **MANAGED,
    }


def replicas(spec: ModelSpec) -> int:
    """The desired number of pods: the number that was scaled to, or initially enough to serve."""
    return spec.replicas if spec.replicas is not None else max(1, spec.scaling.min_replicas)


def _deployment(name: str, metadata: Manifest, spec: ModelSpec, settings: OperatorSettings) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": replicas(spec),
            "revisionHistoryLimit": 3,
            "selector": {"matchLabels": selector(name)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": _ROLLOUTS[spec.rollout]},
            "template": {
                "metadata": {
                    "labels": (spec.pod.labels or {}) | labels(name, spec.role),
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(METRICS_PORT),
                        "prometheus.io/path": "/metrics",
                    }
                    | (spec.pod.annotations or {}),
                },
                "spec": _pod(name, spec, settings),
            },
        },
    }


def metrics_port(index: int) -> int:
    """The `/metrics` port of a server in a pod: of the host with index 0, of its colocated models from 1."""
    return _COLOCATED_METRICS + index if index else METRICS_PORT


def _container_ports(name: str, index: int, *, memory: bool = True) -> ContainerPorts:
    """The container of the host with index 0, of its colocated models from 1."""
    if index == 0:
        return ContainerPorts("node", "grpc", GRPC_PORT, "metrics", METRICS_PORT, memory)
    return ContainerPorts(
        name, f"grpc-{index}", _COLOCATED_GRPC + index, f"metrics-{index}", metrics_port(index), memory
    )


def _pod(name: str, spec: ModelSpec, settings: OperatorSettings) -> Manifest:
    own = spec.pod
    elsewhere = {"labels", "annotations", "env", "volumes", "volume_mounts"}
    passed_through = own.model_dump(by_alias=True, exclude_none=True, exclude=elsewhere)
    volumes: list[Manifest] = []
    containers = []
    models = [(name, spec), *((one.model, _spec_of(one, own)) for one in spec.colocated or ())]
    for index, (model, served) in enumerate(models):
        needed, mounts, inside = _weights(served, settings)
        mounts = _add_volumes(volumes, needed, mounts, index=index)
        if spec.colocated:
            mounts.append({"name": "memory", "mountPath": _MEMORY})
        mounts += own.volume_mounts or []
        ports = _container_ports(model, index, memory=bool(spec.colocated))
        containers.append(_container(model, inside, settings, mounts, ports))
    if spec.colocated:
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.drain_seconds + _GRACE_BEYOND_DRAIN,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": volumes + (own.volumes or []),
        **({"affinity": _affinity_to(spec.preferred_host)} if spec.preferred_host is not None else {}),
        **passed_through,
    }


def _spec_of(colocated: ColocatedModel, pod: Pod) -> ModelSpec:
    """The spec from which a colocated model's container is made; it gets what the host passes through to its pods."""
    return ModelSpec(pod=pod, **colocated.served())


def _add_volumes(
    volumes: list[Manifest], needed: list[Manifest], mounts: list[Manifest], *, index: int
) -> list[Manifest]:
    """Adds a model's volumes to those of its pod, renamed if their name is taken.

    Returns the mounts with the new names.
    """
    renamed = {}
    for volume in needed:
        same_name = next((one for one in volumes if one["name"] == volume["name"]), None)
        if same_name == volume:
            continue
        if same_name is not None:
            renamed[volume["name"]] = f"{volume['name']}-{index}"
        volumes.append(volume | {"name": renamed.get(volume["name"], volume["name"])})
    return [mount | {"name": renamed.get(mount["name"], mount["name"])} for mount in mounts]


def _affinity_to(model: str) -> Manifest:
    term = {"labelSelector": {"matchLabels": selector(model)}, "topologyKey": "kubernetes.io/hostname"}
    return {
        "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
    }


def _container(
    name: str, spec: ModelSpec, settings: OperatorSettings, mounts: list[Manifest], ports: ContainerPorts
) -> Manifest:
    """The container of a model whose sources are as in its pod."""
    probe = {"grpc": {"port": ports.grpc_port}, "timeoutSeconds": 5, "periodSeconds": _PROBE_SECONDS}
    return {
        "name": ports.container,
        "image": settings.node_image,
        "imagePullPolicy": settings.pull_policy,
        "command": ["latentflow-node"],
        "args": _arguments(name, spec, settings, ports),
        "env": _environment(spec, settings),
        **_environment_of_secret(spec, settings),
        "ports": [
            {"name": ports.grpc, "containerPort": ports.grpc_port},
            {"name": ports.metrics, "containerPort": ports.metrics_port},
        ],
        # The server listens once its model is warm, so a successful probe means that it is ready. The last line of a
        # server that cannot load its model states the reason. This policy puts it into the pod's status.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": probe | {"periodSeconds": 1, "failureThreshold": _START_PROBES * _PROBE_SECONDS},
        "readinessProbe": probe | {"periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {"tcpSocket": {"port": ports.metrics}, "timeoutSeconds": 5, "periodSeconds": _PROBE_SECONDS},
        "resources": spec.resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _arguments(name: str, spec: ModelSpec, settings: OperatorSettings, ports: ContainerPorts) -> list[str]:
    options = {
        "role": spec.role.value,
        "uri": spec.source.uri,
        "subfolder": spec.source.subfolder,
        "revision": spec.source.revision,
        "variant": spec.source.variant,
        "nets": spec.nets_option(),
        "model-root": _MODEL_ROOT,
        "cache": f"{_CACHE}/latentflow",
        "identity": name,
        "listen": f"[::]:{ports.grpc_port}",
        "advertise": f"$(POD_IP):{ports.grpc_port}",
        "metrics": f"[::]:{ports.metrics_port}",
        "shared-memory": _MEMORY if ports.shares_memory else None,
        "dtype": spec.dtype,
        "engine": json.dumps(engine) if (engine := spec.engine.options()) else None,
        "tensor": degree if (degree := spec.parallelism.tensor_degree) > 1 else None,
        "drain": settings.drain_seconds,
        "log-format": "json",
    }
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def _environment(spec: ModelSpec, settings: OperatorSettings) -> list[Manifest]:
    variables: list[Manifest] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HF_HOME", "value": f"{_CACHE}/huggingface"},
        # The root file system is read-only. Any other file that torch and transformers write goes to the cache volume.
        {"name": "HOME", "value": _CACHE},
        {"name": "TMPDIR", "value": _CACHE},
    ]
    from_hub = "hf" in _schemes(spec)
    if from_hub and settings.hub_endpoint is not None:
        variables.append({"name": "HF_ENDPOINT", "value": settings.hub_endpoint})
    secrets = {"LATENTFLOW_TOKEN": settings.token_secret, "HF_TOKEN": settings.hub_secret if from_hub else None}
    for variable, secret in secrets.items():
        if secret is not None:
            variables.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": "token"}}})
    return variables + (spec.pod.env or [])


def _environment_of_secret(spec: ModelSpec, settings: OperatorSettings) -> Manifest:
    if settings.s3_secret is None or "s3" not in _schemes(spec):
        return {}
    return {"envFrom": [{"secretRef": {"name": settings.s3_secret}}]}


def _schemes(spec: ModelSpec) -> set[str]:
    return {urlparse(source.uri).scheme for source in spec.sources().values()}


def _weights(spec: ModelSpec, settings: OperatorSettings) -> tuple[list[Manifest], list[Manifest], ModelSpec]:
    """The volumes and mounts of a model's sources, and the model with these sources as they are inside the pod."""
    volumes: list[Manifest] = [{"name": "cache", **settings.cache}]
    mounts: list[Manifest] = [{"name": "cache", "mountPath": _CACHE}]
    if "" in _schemes(spec) and settings.model_root is not None:
        volumes.append({"name": "models", **settings.model_root})
        mounts.append({"name": "models", "mountPath": _MODEL_ROOT, "readOnly": True})
    inside = {}
    for index, (name, source) in enumerate(spec.sources().items()):
        parsed, uri = urlparse(source.uri), source.uri
        # The first is that of the model itself.
        volume, path = (f"net-{index}", f"{_NETS}/{index}") if index else ("source", _SOURCE)
        if parsed.scheme == "pvc":
            volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": parsed.netloc, "readOnly": True}})
            uri = f"file://{path}{parsed.path}"
        if parsed.scheme == "oci":
            image = {"reference": source.uri.removeprefix("oci://"), "pullPolicy": "IfNotPresent"}
            volumes.append({"name": volume, "image": image})
            uri = f"file://{path}"
        if parsed.scheme in ("pvc", "oci"):
            mounts.append({"name": volume, "mountPath": path, "readOnly": True})
        inside[name] = source.model_copy(update={"uri": uri})
    return volumes, mounts, spec.with_sources(inside)
