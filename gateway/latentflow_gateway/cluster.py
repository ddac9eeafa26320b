"""The directory of a cluster: its DiffusionWorkflows and the EndpointSlices of their models' Services.

Watches follow both, so that a workflow, a binding or a replica is known as soon as the API server has it. While the API
server is unreachable, the last directory stays in force. Whether a replica is ready is not read here: the gateway watches
the health of every server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import structlog
from kubernetes import client as kube
from kubernetes import config
from kubernetes.informer import ADDED, DELETED, ERROR, MODIFIED, SharedInformer
from latentflow.api import API_VERSION, DiffusionWorkflow, placed
from latentflow.api.types import MODEL_LABEL, ROLE_LABEL, Role
from latentflow.errors import FailedPreconditionError
from latentflow.internal import hosts
from latentflow.internal.directory import Directory, Replicas
from pydantic import ValidationError

Body = dict[str, Any]

_log = structlog.get_logger()
# The informer logs a traceback whenever a watch ends; `_failed` logs one line instead.
logging.getLogger("kubernetes.informer").setLevel(logging.CRITICAL)
# A watch is renewed so often, so that one whose connection is lost without notice ends.
_RENEW_SECONDS = 300
_RETRY_SECONDS = 1.0


def directory(workflows: Iterable[Body], slices: Iterable[Body]) -> Directory:
    """The directory that a cluster's objects describe. Pure.

    A workflow's models are replaced by references to the DiffusionModels that its status binds, so that a changed model gets
    requests only once the binding has switched to it. A reference includes the namespace, because the same URI may mean
    different weights in another namespace.
    """
    read = [found for body in workflows if (found := _workflow(body)) is not None]
    replicas: dict[str, set[str]] = {}
    roles: dict[str, Role] = {}
    for body in slices:
        labels = body["metadata"].get("labels", {})
        if MODEL_LABEL not in labels or labels.get(ROLE_LABEL) not in set(Role):
            continue
        model = f"{body['metadata']['namespace']}/{labels[MODEL_LABEL]}"
        roles[model] = Role(labels[ROLE_LABEL])
        replicas.setdefault(model, set()).update(_addresses(body))
    return Directory(
        workflows=tuple(sorted(read, key=lambda workflow: workflow.full_name)),
        models={model: Replicas(role=roles[model], replicas=tuple(sorted(found))) for model, found in replicas.items()},
    )


async def follow(namespaces: tuple[str, ...]) -> AsyncGenerator[Directory, None]:
    """The directory, once everything has been listed and at every change. FailedPreconditionError without a cluster.

    Args:
        namespaces: Namespaces to watch; empty: all.
    """
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
    except config.ConfigException as error:
        raise FailedPreconditionError(
            f"There is no Kubernetes configuration: {error} Run in a pod with a ServiceAccount, or set KUBECONFIG."
        ) from None
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(changed.set)

    def followers(kind: _Kind) -> list[_Follower]:
        return [_Follower(kind, namespace, notify) for namespace in namespaces or ("",)]

    workflows = followers(_Kind(f"/apis/{API_VERSION}", "diffusionworkflows", None))
    slices = followers(_Kind("/apis/discovery.k8s.io/v1", "endpointslices", MODEL_LABEL))
    try:
        for one in (*workflows, *slices):
            one.start()
        while True:
            await changed.wait()
            changed.clear()
            if all(one.listed.is_set() for one in (*workflows, *slices)):
                yield directory(_bodies(workflows), _bodies(slices))
    finally:
        await asyncio.gather(*(asyncio.to_thread(one.end) for one in (*workflows, *slices)))


def _bodies(followers: Iterable[_Follower]) -> list[Body]:
    return [body for one in followers for body in one.cache.list()]


@dataclass(frozen=True)
class _Kind:
    prefix: str
    plural: str
    label: str | None


class _Follower(SharedInformer):
    """Watches one kind in one namespace ("" for all), with bodies as dicts. `listed` is set after the first list."""

    def __init__(self, kind: _Kind, namespace: str, changed: Callable[[], None]) -> None:
        super().__init__(self._call, resync_period=_RENEW_SECONDS, key_func=_key)
        self.listed = threading.Event()
        self._kind, self._changed = kind, changed
        self._scope = f"/namespaces/{namespace}" if namespace else ""
        self._api = kube.ApiClient()
        self._stopping = threading.Event()
        for event in (ADDED, MODIFIED, DELETED):
            self.add_event_handler(event, lambda _: changed())
        self.add_event_handler(ERROR, self._failed)

    def end(self) -> None:
        """Ends the watch; blocks until it has ended."""
        self._stopping.set()
        self.stop()

    def _initial_list(self) -> None:
        super()._initial_list()
        self.listed.set()
        self._changed()

    def _failed(self, error: object) -> None:
        _log.warning("watch failed; the last known objects stay in force", kind=self._kind.plural, error=str(error))
        # The informer retries at once, which would be a busy loop while the server is unreachable.
        self._stopping.wait(_RETRY_SECONDS)

    def _call(
        self,
        *,
        watch: bool = False,
        resource_version: str | None = None,
        timeout_seconds: int | None = None,
        _preload_content: bool = True,
    ) -> object:
        """Has the signature of the generated list calls, which the informer expects."""
        wanted = {
            "watch": "true" if watch else None,
            "resourceVersion": resource_version,
            "timeoutSeconds": timeout_seconds,
            "labelSelector": self._kind.label,
        }
        request = self._api.param_serialize(
            method="GET",
            resource_path=f"{self._kind.prefix}{self._scope}/{self._kind.plural}",
            query_params=[(key, str(value)) for key, value in wanted.items() if value is not None],
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request, _request_timeout=(10, _RENEW_SECONDS + 30))
        if not 200 <= response.status <= 299:
            raise kube.ApiException(status=response.status, reason=response.reason)
        if watch:
            return response.response
        body = json.loads(response.read())
        return SimpleNamespace(
            items=body["items"],
            metadata=SimpleNamespace(resource_version=body["metadata"]["resourceVersion"]),
        )


def _key(body: Body) -> str:
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


def _workflow(body: Body) -> DiffusionWorkflow | None:
    metadata = body["metadata"]
    if "deletionTimestamp" in metadata:
        return None
    try:
        read = DiffusionWorkflow.of_object(body)
    except (ValidationError, KeyError) as error:
        _log.warning("workflow is invalid and is not served", workflow=_key(body), error=str(error))
        return None
    bound = {entry["name"]: entry["model"] for entry in body.get("status", {}).get("models", ())}
    serves = placed(read) | bound
    models = [
        model.model_copy(update={"source": None, "model_ref": f"{metadata['namespace']}/{serves[model.name]}"})
        for model in read.spec.models
    ]
    return read.model_copy(update={"spec": read.spec.model_copy(update={"models": models})})


def _addresses(body: Body) -> set[str]:
    ports = [port["port"] for port in body.get("ports") or () if port.get("name") == "grpc"]
    found = [address for endpoint in body.get("endpoints") or () for address in endpoint["addresses"]]
    return {hosts.join(host, port) for host in found for port in ports}
