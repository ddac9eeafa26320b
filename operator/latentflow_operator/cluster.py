"""Writes to the API server, one call each, without any decision.

Reconciliation and the scheduler write with different field managers, so that `managedFields` shows which of them wrote
a field.
"""

from __future__ import annotations

import json

from kubernetes import client as kube
from kubernetes.client.exceptions import ApiException

from latentflow_operator.manifests import Manifest
from latentflow_operator.objects import KubeObject, ObjectKey, key_of

MANAGER = "latentflow-operator"
_TIMEOUT_SECONDS = 30
_PATHS = {
    "DiffusionWorkflow": ("/apis/latentflow.io/v1alpha1", "diffusionworkflows"),
    "DiffusionModel": ("/apis/latentflow.io/v1alpha1", "diffusionmodels"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Service": ("/api/v1", "services"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}


class Cluster:
    """Writes to the API server. Calls block and raise `kubernetes.client.ApiException`.

    Args:
        manager: The field manager of the writes.
    """

    def __init__(self, api: kube.ApiClient, *, manager: str = MANAGER) -> None:
        self._api = api
        self._manager = manager

    def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply of an object except its status. Returns the object that the server has then."""
        return self._call(
            "PATCH",
            _path(manifest["kind"], key_of(manifest)),
            manifest,
            query=[("fieldManager", self._manager), ("force", "true")],
        )

    def apply_status(self, manifest: Manifest) -> Manifest:
        """Server-side apply of an object's status. Returns the object that the server has then."""
        path = _path(manifest["kind"], key_of(manifest)) + "/status"
        return self._call("PATCH", path, manifest, query=[("fieldManager", self._manager), ("force", "true")])

    def delete(self, target: KubeObject) -> None:
        """Deletes an object in exactly this state; ApiException with status 409 if it has changed since."""
        preconditions = {"uid": target.uid, "resourceVersion": str(target.resource_version)}
        options = {"preconditions": preconditions, "propagationPolicy": "Background"}
        self._call("DELETE", _path(target.kind, target.key), options, query=[])

    def scale(self, target: KubeObject, replicas: int) -> None:
        """Sets an object's replicas through its scale subresource."""
        # The scale of a custom resource does not support server-side apply, and managedFields do not record its
        # patches.
        query, change = [("fieldManager", self._manager)], {"spec": {"replicas": replicas}}
        self._call(
            "PATCH", f"{_path(target.kind, target.key)}/scale", change, query, kind="application/merge-patch+json"
        )

    def create(self, manifest: Manifest) -> Manifest:
        """Creates an object, such as an Event."""
        path = _path(manifest["kind"], key_of(manifest)).rpartition("/")[0]
        return self._call("POST", path, manifest, query=[("fieldManager", self._manager)])

    def _call(
        self, method: str, path: str, body: Manifest, query: list[tuple[str, str]], *, kind: str | None = None
    ) -> Manifest:
        kind = kind or ("application/apply-patch+yaml" if method == "PATCH" else "application/json")
        request = self._api.param_serialize(
            method=method,
            resource_path=path,
            query_params=query,
            header_params={"Content-Type": kind, "Accept": "application/json"},
            # The client serializes JSON but not YAML. Every JSON document is a YAML document.
            body=json.dumps(body) if kind.endswith("yaml") else body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request, _request_timeout=_TIMEOUT_SECONDS)
        text = response.read().decode()
        if not 200 <= response.status <= 299:
            raise ApiException.from_response(http_resp=response, body=text, data=None)
        return dict(json.loads(text))


def _path(kind: str, key: ObjectKey) -> str:
    prefix, plural = _PATHS[kind]
    namespace, name = key
    return f"{prefix}/namespaces/{namespace}/{plural}/{name}"
