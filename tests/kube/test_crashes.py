"""The operator may be killed between any two writes: the next one produces the same objects."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from kube.simulated_kubelet import KINDS, report, workflow
from kube.test_colocated import workflow as colocated
from latentflow_operator.cluster import Cluster
from latentflow_operator.reconcile import Reconciler
from latentflow_operator.settings import OperatorSettings
from support.apiserver import ApiServer
from support.kubectl import Body, Namespace, new_namespace

SETTINGS = OperatorSettings(node_image="latentflow-node:test", model_root={"emptyDir": {}}, retire_seconds=0)
WATCHED = ("DiffusionWorkflow", *KINDS, "Pod")


class CrashingCluster(Cluster):
    """Fails at its n-th write: before the write reaches the server, or after it, without the response."""

    def __init__(self, server: ApiServer, *, fails_at: int | None = None, delivered: bool = False) -> None:
        super().__init__(server.client())
        self.writes = 0
        self._fails_at = fails_at
        self._delivered = delivered

    def _call(self, method: str, path: str, body: Any, query: list[tuple[str, str]], **kind: Any) -> Any:
        self.writes += 1
        if self._fails_at is not None and self.writes >= self._fails_at:
            if self._delivered and self.writes == self._fails_at:
                super()._call(method, path, body, query, **kind)
            raise ConnectionError("crashed")
        return super()._call(method, path, body, query, **kind)


def run_operator(
    namespace: Namespace, cluster: CrashingCluster, *, twice: bool = False, settings: OperatorSettings = SETTINGS
) -> int:
    """Runs an operator until its queue is idle, from the objects that exist. Returns the number of writes."""

    async def run() -> None:
        reconciler = Reconciler(cluster=cluster, settings=settings, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
        for kind in WATCHED:
            for body in namespace.list(kind).values():
                for _ in range(2 if twice else 1):
                    reconciler.observe(body)
        async with reconciler.queue.running():
            reconciler.queue.open()
            await reconciler.queue.idle()

    asyncio.run(run())
    return cluster.writes


def settle(server: ApiServer, namespace: Namespace, settings: OperatorSettings = SETTINGS) -> None:
    """Runs operators until one writes nothing."""
    for _ in range(10):
        if run_operator(namespace, CrashingCluster(server), settings=settings) == 0:
            return
    raise AssertionError("the tenth operator still wrote something")


def outcome(namespace: Namespace) -> str:
    """Everything that users and controllers read, without the fields that differ between namespaces."""
    found: dict[str, Any] = {}
    for kind in ("DiffusionWorkflow", *KINDS):
        for name, body in namespace.list(kind).items():
            metadata = body["metadata"]
            found[f"{kind}/{name}"] = {
                "spec": {k: v for k, v in body["spec"].items() if k not in ("clusterIP", "clusterIPs")},
                "status": _plain(body),
                "labels": metadata.get("labels"),
                "owners": [(o["kind"], o["name"]) for o in metadata.get("ownerReferences", ())],
            }
    return json.dumps(found, indent=1, sort_keys=True)


def _plain(body: Body) -> Body:
    kept = ("conditions", "models", "modelsReady", "replicas", "readyReplicas", "selector")
    status = {key: value for key, value in body.get("status", {}).items() if key in kept}
    return status if body["kind"].startswith("Diffusion") else {}


def create(server: ApiServer, namespace: Namespace) -> None:
    namespace.create(workflow())


def create_colocated(server: ApiServer, namespace: Namespace) -> None:
    namespace.create(colocated())


def change(server: ApiServer, namespace: Namespace) -> None:
    """A workflow that serves, with a changed denoiser that is ready."""
    create(server, namespace)
    settle(server, namespace)
    first = namespace.list("DiffusionModel")
    for model in first:
        _pod(namespace, model)
    settle(server, namespace)
    namespace.apply(workflow(source={"uri": "other"}))
    settle(server, namespace)
    for model in namespace.list("DiffusionModel").keys() - first.keys():
        _pod(namespace, model)


def _pod(namespace: Namespace, model: str) -> None:
    labels = {"latentflow.io/model": model, "app.kubernetes.io/managed-by": "latentflow-operator"}
    spec = {"containers": [{"name": "node", "image": "x"}]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": model, "labels": labels}, "spec": spec}
    namespace.create(body)
    report(namespace, model, ready=True)


@pytest.mark.parametrize("scenario", [create, create_colocated, change])
@pytest.mark.parametrize("delivered", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_does_not_change_the_outcome(
    api_server: ApiServer, scenario: Any, delivered: bool
) -> None:
    with new_namespace(api_server, "undisturbed") as namespace:
        scenario(api_server, namespace)
        writes = run_operator(namespace, CrashingCluster(api_server))
        settle(api_server, namespace)
        wanted = outcome(namespace)
    assert writes > 3
    for fails_at in range(1, writes + 1):
        with new_namespace(api_server, f"fails-at-{fails_at}") as namespace:
            scenario(api_server, namespace)
            run_operator(namespace, CrashingCluster(api_server, fails_at=fails_at, delivered=delivered))
            settle(api_server, namespace)
            assert outcome(namespace) == wanted


def test_a_second_delivery_of_every_object_does_not_change_the_outcome(api_server: ApiServer) -> None:
    with new_namespace(api_server, "once") as namespace:
        create(api_server, namespace)
        settle(api_server, namespace)
        wanted = outcome(namespace)
        # An operator that starts later gets every object twice.
        assert run_operator(namespace, CrashingCluster(api_server), twice=True) == 0
        assert outcome(namespace) == wanted


def test_a_replaced_model_is_kept_for_the_requests_that_began_with_it(
    api_server: ApiServer,
) -> None:
    with new_namespace(api_server, "retiring") as namespace:
        change(api_server, namespace)
        settle(api_server, namespace, SETTINGS.model_copy(update={"retire_seconds": 3600}))
        (body,) = namespace.list("DiffusionWorkflow").values()
        bound = {entry["model"] for entry in body["status"]["models"]}
        there = namespace.list("DiffusionModel").keys()
        assert len(bound) == 4
        assert bound < there
        settle(api_server, namespace)
        assert namespace.list("DiffusionModel").keys() == bound
