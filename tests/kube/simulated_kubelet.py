"""Workflows for tests, and the pod statuses of scheduler and kubelet, which tests write because there is no node."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

from latentflow.api import API_VERSION
from support.kubectl import Body, Namespace, is_ready

KINDS = ("DiffusionModel", "Deployment", "Service", "PodDisruptionBudget")


def workflow(name: str = "shapes", **base: Any) -> Body:
    models = [
        {"name": "text", "role": "TextEncoder", "source": {"uri": "shapes"}},
        {k: v for k, v in ({"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}} | base).items() if v},
        {
            "name": "edges",
            "role": "ControlNet",
            "attachTo": "base",
            "source": {"uri": "shapes", "subfolder": "controlnet-edges"},
        },
        {"name": "pixels", "role": "VAE", "source": {"uri": "shapes"}},
    ]
    return {
        "apiVersion": API_VERSION,
        "kind": "DiffusionWorkflow",
        "metadata": {"name": name},
        "spec": {"models": models},
    }


def serve(namespace: Namespace, models: Collection[str] | None = None) -> None:
    """Writes that every pod (of the given models) runs and is ready."""
    wanted = set(models or ())
    found = namespace.until("DiffusionModel", lambda found: bool(found) and wanted <= found.keys())
    for model in found if models is None else models:
        pods = namespace.until("Pod", functools.partial(_any_of, model=model))
        for name, pod in pods.items():
            if _of(pod, model):
                report(namespace, name, ready=True)


def report(namespace: Namespace, pod: str, *, ready: bool, **status: Any) -> None:
    """Writes a pod's status in the form of the kubelet."""
    is_ready_word = "True" if ready else "False"
    conditions = [
        {"type": kind, "status": state}
        for kind, state in (("PodScheduled", "True"), ("ContainersReady", is_ready_word), ("Ready", is_ready_word))
    ]
    namespace.patch(
        "Pod", pod, {"status": {"phase": "Running", "conditions": conditions} | status}, subresource="status"
    )


def _of(pod: Body, model: str) -> bool:
    return bool(pod["metadata"]["labels"]["latentflow.io/model"] == model)


def _any_of(pods: Mapping[str, Body], *, model: str) -> bool:
    return any(_of(pod, model) for pod in pods.values())


def ready(namespace: Namespace, name: str = "shapes") -> Body:
    return namespace.until("DiffusionWorkflow", lambda found: is_ready(found[name]))[name]


def bound(body: Body) -> dict[str, str]:
    return {entry["name"]: entry["model"] for entry in body["status"]["models"]}
