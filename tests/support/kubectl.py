"""Access to a Kubernetes API for tests: create, read, wait for a state by watching."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from kubernetes import client as kube
from latentflow.api import API_VERSION
from latentflow_operator.cluster import Cluster

from support.apiserver import ApiServer

Body = dict[str, Any]
GROUP, VERSION = API_VERSION.split("/")
PLURALS = {
    "DiffusionWorkflow": "/apis/latentflow.io/v1alpha1/namespaces/{}/diffusionworkflows",
    "DiffusionModel": "/apis/latentflow.io/v1alpha1/namespaces/{}/diffusionmodels",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Service": "/api/v1/namespaces/{}/services",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Namespace": "/api/v1/namespaces",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "Event": "/apis/events.k8s.io/v1/namespaces/{}/events",
}
# Enough on a busy machine; garbage collection retries after half a minute.
SECONDS = 120


class Namespace:
    """One namespace of a real API server, accessed as its administrator."""

    def __init__(self, server: ApiServer, name: str) -> None:
        self.name = name
        self._api = server.client()
        self._cluster = Cluster(self._api, manager="tests")

    def call(self, method: str, path: str, body: Any = None, *, merge: bool = False) -> Body:
        """Sends a request; returns the object of the response. ApiException where it is refused."""
        kind = "application/merge-patch+json" if merge else "application/json"
        request = self._api.param_serialize(
            method=method,
            resource_path=path,
            header_params={"Content-Type": kind, "Accept": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*request)
        text = response.read().decode()
        if not 200 <= response.status <= 299:
            raise kube.ApiException.from_response(http_resp=response, body=text, data=None)
        return dict(json.loads(text))

    def create(self, body: Body) -> Body:
        """Creates an object in this namespace."""
        return self.call("POST", PLURALS[body["kind"]].format(self.name), body)

    def apply(self, body: Body) -> Body:
        """As `kubectl apply --server-side`."""
        return self._cluster.apply(body | {"metadata": body["metadata"] | {"namespace": self.name}})

    def patch(self, kind: str, name: str, change: Body, *, subresource: str = "") -> Body:
        """A merge patch."""
        path = f"{PLURALS[kind].format(self.name)}/{name}{subresource and '/' + subresource}"
        return self.call("PATCH", path, change, merge=True)

    def get(self, kind: str, name: str) -> Body | None:
        """An object; None where there is none."""
        try:
            return self.call("GET", f"{PLURALS[kind].format(self.name)}/{name}") | {"kind": kind}
        except kube.ApiException as error:
            if error.status == 404:
                return None
            raise

    def delete(self, kind: str, name: str) -> None:
        """As `kubectl delete --wait=false`."""
        self.call("DELETE", f"{PLURALS[kind].format(self.name)}/{name}", {"propagationPolicy": "Background"})

    def list(self, kind: str) -> dict[str, Body]:
        """Every object of a kind, by name."""
        listing = self._listing(kind)
        own = {"apiVersion": listing["apiVersion"], "kind": kind}
        return {item["metadata"]["name"]: item | own for item in listing["items"]}

    def until(
        self, kind: str, condition: Callable[[dict[str, Body]], bool], *, seconds: float = SECONDS
    ) -> dict[str, Body]:
        """Watches the objects of a kind, by name, until a condition holds; AssertionError with their state on a timeout."""
        listing = self._listing(kind)
        state = {item["metadata"]["name"]: item for item in listing["items"]}
        if condition(state):
            return state
        deadline = time.monotonic() + seconds
        for event in self._watch(kind, listing["metadata"]["resourceVersion"], seconds):
            name = event["object"]["metadata"]["name"]
            if event["type"] == "DELETED":
                state.pop(name, None)
            else:
                state[name] = event["object"]
            if condition(state):
                return state
            if time.monotonic() > deadline:
                break
        raise AssertionError(f"after {seconds} s: {json.dumps(state, indent=1)[:20000]}")

    def _listing(self, kind: str) -> Body:
        return self.call("GET", PLURALS[kind].format(self.name))

    def _watch(self, kind: str, version: str, seconds: float) -> Iterator[Body]:
        request = self._api.param_serialize(
            method="GET",
            resource_path=PLURALS[kind].format(self.name),
            query_params=[("watch", "true"), ("resourceVersion", version), ("timeoutSeconds", str(int(seconds)))],
            auth_settings=["BearerToken"],
        )
        method, url, headers, *_ = request
        response = self._api.rest_client.pool_manager.request(method, url, headers=headers, preload_content=False)
        buffer = b""
        with contextlib.closing(response):
            for chunk in response.stream(None):
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                yield from (json.loads(line) for line in lines if line)


def condition(body: Body, about: str) -> Body:
    """A condition of an object; empty where the object lacks it."""
    return next((c for c in body.get("status", {}).get("conditions", ()) if c["type"] == about), {})


def is_ready(body: Body) -> bool:
    """Whether an object's condition Ready is True."""
    return condition(body, "Ready").get("status") == "True"


@contextlib.contextmanager
def new_namespace(
    server: ApiServer, purpose: str, *, labels: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Namespace]:
    """A new namespace while entered; its workflows are deleted when left."""
    words = purpose.removeprefix("test_").replace("_", "-")[:45].strip("-")
    place = Namespace(server, f"{words}-{uuid.uuid4().hex[:6]}")
    place.call("POST", "/api/v1/namespaces", {"metadata": {"name": place.name, "labels": dict(labels)}})
    yield place
    for name in place.list("DiffusionWorkflow"):
        place.delete("DiffusionWorkflow", name)
