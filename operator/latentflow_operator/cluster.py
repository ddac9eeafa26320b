"""Writes to the API server, one call each; nothing here decides.

Every object has one field manager for what reconciling writes of it and another for what the scheduler does, so that
`managedFields` shows who said what.
"""

from __future__ import annotations

import json

from kubernetes import client as kube
from kubernetes.client.exceptions import ApiException

from latentflow_operator.manifests import Manifest

MANAGER = "latentflow-operator"
_SECONDS = 30
_PATHS = {
    "DiffusionWorkflow": ("/apis/latentflow.io/v1alpha1", "diffusionworkflows"),
    "DiffusionModel": ("/apis/latentflow.io/v1alpha1", "diffusionmodels"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Service": ("/api/v1", "services"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}


class Cluster:
    """The API server, for writing. Calls block; raises `kubernetes.client.ApiException`.

    Args:
        manager: The field manager of what is written.
    """

    def __init__(self, api: kube.ApiClient, *, manager: str = MANAGER) -> None:
        self._api = api
        self._manager = manager

    def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply of a whole object, except its status; what the server has then."""
        return self._call(
            "PATCH", _path(manifest), manifest, query=[("fieldManager", self._manager), ("force", "true")]
        )

    def apply_status(self, manifest: Manifest) -> Manifest:
        """Server-side apply of an object's status."""
        path = f"{_path(manifest)}/status"
        return self._call("PATCH", path, manifest, query=[("fieldManager", self._manager), ("force", "true")])

    def delete(self, body: Manifest) -> None:
        """Deletes exactly the object that `body` is, in the state that `body` has; 409 where it has changed since."""
        metadata = body["metadata"]
        preconditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        options = {"preconditions": preconditions, "propagationPolicy": "Background"}
        self._call("DELETE", _path(body), options, query=[])

    def scale(self, body: Manifest, replicas: int) -> None:
        """Sets an object's replicas by its scale subresource."""
        # A custom resource's scale takes no server-side apply, and who patched it stands in no managedFields.
        query, change = [("fieldManager", self._manager)], {"spec": {"replicas": replicas}}
        self._call("PATCH", f"{_path(body)}/scale", change, query, kind="application/merge-patch+json")

    def create(self, manifest: Manifest) -> Manifest:
        """Creates an object, such as an Event."""
        path = _path(manifest).rpartition("/")[0]
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
            # The client writes JSON itself but no YAML; every JSON document is a YAML document.
            body=json.dumps(body) if kind.endswith("yaml") else body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request, _request_timeout=_SECONDS)
        text = response.read().decode()
        if not 200 <= response.status <= 299:
            raise ApiException.from_response(http_resp=response, body=text, data=None)
        return dict(json.loads(text))


def _path(manifest: Manifest) -> str:
    prefix, plural = _PATHS[manifest["kind"]]
    metadata = manifest["metadata"]
    return f"{prefix}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"
