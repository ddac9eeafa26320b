"""The objects that serve one model: pure, from a DiffusionModel to its Deployment, Service and PodDisruptionBudget.

The handlers apply what is made here by server-side apply; nothing here knows the API server. Pods keep to the restricted
Pod Security Standard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlparse

from latentflow.api import API_VERSION, Role, Source
from latentflow.api.types import MODEL_LABEL, ROLE_LABEL, Engine, ModelSpec

from latentflow_operator.settings import OperatorSettings

Manifest = dict[str, Any]


class Owner(NamedTuple):
    """A workflow that owns a model."""

    name: str
    uid: str


MANAGED = {"app.kubernetes.io/managed-by": "latentflow-operator"}

GRPC_PORT, METRICS_PORT = 8500, 8501
_MODEL_ROOT, _CACHE, _SOURCE = "/models", "/cache", "/source"
# After the drain: time for what others still fetch, and for the process to end.
_GRACE_BEYOND_DRAIN = 30
# A start may download weights: a day, asked every ten seconds.
_START_PROBES, _PROBE_SECONDS = 8640, 10


def model_manifest(*, name: str, namespace: str, spec: ModelSpec, owners: Sequence[Owner]) -> Manifest:
    """A DiffusionModel that workflows own together; without its replicas, which others write."""
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
) -> tuple[Manifest, Manifest, Manifest]:
    """Deployment, headless Service and PodDisruptionBudget of a DiffusionModel, owned by it.

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
    return (
        _deployment(name, metadata, spec, settings),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                # Headless: gateways and peers choose a replica, they do not want one chosen for them.
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": selector(name),
                "ports": [
                    {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "appProtocol": "grpc"},
                    {"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"},
                ],
            },
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata,
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector(name)}},
        },
    )


def selector(name: str) -> dict[str, str]:
    """The labels by which a model's pods are found."""
    return {MODEL_LABEL: name}


def labels(name: str, role: Role) -> dict[str, str]:
    """The labels of everything that serves a model."""
    return selector(name) | {
        ROLE_LABEL: role.value,
        "app.kubernetes.io/name": "latentflow",
        "app.kubernetes.io/component": "node",
        **MANAGED,
    }


def replicas(spec: ModelSpec) -> int:
    """How many pods there should be: what was scaled to, or at first enough to serve."""
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
            # A new replica is ready before an old one goes, so that a new image interrupts nobody.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {
                    "labels": labels(name, spec.role),
                    "annotations": {
                        "prometheus.io/scrape": "true",
                        "prometheus.io/port": str(METRICS_PORT),
                        "prometheus.io/path": "/metrics",
                    },
                },
                "spec": _pod(name, spec, settings),
            },
        },
    }


def _pod(name: str, spec: ModelSpec, settings: OperatorSettings) -> Manifest:
    own = spec.pod
    volumes, mounts, uri = _weights(spec.source, settings)
    passed = own.model_dump(by_alias=True, exclude_none=True, exclude={"env", "volumes", "volume_mounts"})
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
        "containers": [_container(name, spec, settings, uri, mounts + (own.volume_mounts or []))],
        "volumes": volumes + (own.volumes or []),
        **({"affinity": _beside(spec.near)} if spec.near is not None else {}),
        **passed,
    }


def _beside(model: str) -> Manifest:
    term = {"labelSelector": {"matchLabels": selector(model)}, "topologyKey": "kubernetes.io/hostname"}
    return {
        "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
    }


def _container(name: str, spec: ModelSpec, settings: OperatorSettings, uri: str, mounts: list[Manifest]) -> Manifest:
    probe = {"grpc": {"port": GRPC_PORT}, "timeoutSeconds": 5, "periodSeconds": _PROBE_SECONDS}
    return {
        "name": "node",
        "image": settings.node_image,
        "imagePullPolicy": settings.pull_policy,
        "command": ["latentflow-node"],
        "args": _arguments(name, spec, uri, settings),
        "env": _environment(spec, settings),
        **_environment_of_secret(spec.source, settings),
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        # The server listens when its model is warm, so being reached is being ready.
        # The last line of a server that cannot load its model is why; it stands in the pod's status then.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": probe | {"periodSeconds": 1, "failureThreshold": _START_PROBES * _PROBE_SECONDS},
        "readinessProbe": probe | {"periodSeconds": 2, "failureThreshold": 2},
        "livenessProbe": {"tcpSocket": {"port": "metrics"}, "timeoutSeconds": 5, "periodSeconds": _PROBE_SECONDS},
        "resources": spec.resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _arguments(name: str, spec: ModelSpec, uri: str, settings: OperatorSettings) -> list[str]:
    engine: Engine = spec.engine
    options = {
        "role": spec.role.value,
        "uri": uri,
        "subfolder": spec.source.subfolder,
        "revision": spec.source.revision,
        "model-root": _MODEL_ROOT,
        "cache": f"{_CACHE}/latentflow",
        "identity": name,
        "listen": f"0.0.0.0:{GRPC_PORT}",
        "advertise": f"$(POD_IP):{GRPC_PORT}",
        "metrics": f"0.0.0.0:{METRICS_PORT}",
        "threads": engine.threads,
        "device": engine.device,
        "dtype": spec.dtype,
        "max-running": engine.max_running,
        "max-waiting": engine.max_waiting,
        "drain": settings.drain_seconds,
        "log-format": "json",
    }
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def _environment(spec: ModelSpec, settings: OperatorSettings) -> list[Manifest]:
    variables: list[Manifest] = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HF_HOME", "value": f"{_CACHE}/huggingface"},
        # Torch and transformers write nothing else; what they might, goes to the volume that is there for it.
        {"name": "HOME", "value": _CACHE},
        {"name": "TMPDIR", "value": _CACHE},
    ]
    from_hub = _scheme(spec.source) == "hf"
    if from_hub and settings.hub_endpoint is not None:
        variables.append({"name": "HF_ENDPOINT", "value": settings.hub_endpoint})
    secrets = {"LATENTFLOW_TOKEN": settings.token_secret, "HF_TOKEN": settings.hub_secret if from_hub else None}
    for variable, secret in secrets.items():
        if secret is not None:
            variables.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": "token"}}})
    return variables + (spec.pod.env or [])


def _environment_of_secret(source: Source, settings: OperatorSettings) -> Manifest:
    if settings.s3_secret is None or _scheme(source) != "s3":
        return {}
    return {"envFrom": [{"secretRef": {"name": settings.s3_secret}}]}


def _scheme(source: Source) -> str:
    return urlparse(source.uri).scheme


def _weights(source: Source, settings: OperatorSettings) -> tuple[list[Manifest], list[Manifest], str]:
    """Volumes, mounts, and the source's URI as the server in the pod reads it."""
    volumes: list[Manifest] = [{"name": "cache", **settings.cache}]
    mounts: list[Manifest] = [{"name": "cache", "mountPath": _CACHE}]
    parsed, uri = urlparse(source.uri), source.uri
    if parsed.scheme == "" and settings.model_root is not None:
        volumes.append({"name": "models", **settings.model_root})
        mounts.append({"name": "models", "mountPath": _MODEL_ROOT, "readOnly": True})
    if parsed.scheme == "pvc":
        volumes.append({"name": "source", "persistentVolumeClaim": {"claimName": parsed.netloc, "readOnly": True}})
        mounts.append({"name": "source", "mountPath": _SOURCE, "readOnly": True})
        uri = f"file://{_SOURCE}{parsed.path}"
    if parsed.scheme == "oci":
        image = {"reference": source.uri.removeprefix("oci://"), "pullPolicy": "IfNotPresent"}
        volumes.append({"name": "source", "image": image})
        mounts.append({"name": "source", "mountPath": _SOURCE, "readOnly": True})
        uri = f"file://{_SOURCE}"
    return volumes, mounts, uri
